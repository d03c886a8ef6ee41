"""A few kills by `kill_program`, of each kind; the program itself makes as many as asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import CODE_FILES


def kill(folder: Path, kills: int, *kinds: str) -> None:
    words = [str(folder), "--kills", str(kills), "--seed", "3", "--kinds", *kinds]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.training.kill_program", *words],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(kinds)


@pytest.mark.parametrize("kinds", [("single", "last_save"), ("pair",), ("corpus", "evaluation")])
@pytest.mark.slow
def test_a_killed_run_becomes_the_uninterrupted_one(tmp_path, kinds):
    kill(tmp_path, len(kinds), *kinds)


@pytest.mark.slow
def test_a_run_with_sharded_weights_writes_samples_and_saves_the_models_own_code(tmp_path):
    kill(tmp_path, 0, "sharded")
    folder = tmp_path / "whole" / "sharded" / "run"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sample["step"] for sample in samples] == [4, 8]
    for saved in (folder, folder / "checkpoint-6"):
        assert {path.name for path in saved.glob("*.py")} == CODE_FILES
        classes = json.loads((saved / "config.json").read_text())["auto_map"]
        assert classes["AutoModelForCausalLM"] == "modeling_charformer.CharformerForCausalLM"
