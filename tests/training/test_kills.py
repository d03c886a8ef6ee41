"""A few kills by `kill_program`, of each kind; the program itself makes as many as asked for."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kinds", [("single", "last_save"), ("pair",), ("corpus", "evaluation")])
@pytest.mark.slow
def test_a_killed_run_becomes_the_uninterrupted_one(tmp_path, kinds):
    words = [str(tmp_path), "--kills", str(len(kinds)), "--seed", "3", "--kinds", *kinds]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.training.kill_program", *words],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(kinds)
