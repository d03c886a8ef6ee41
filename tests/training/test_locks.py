"""One run in a folder at a time."""

import os
import signal
import subprocess
import sys

import pytest

from charformer_training.locks import LOCK_FILE, run_lock


HOLD = "import sys, time; from charformer_training.locks import run_lock\nwith run_lock(sys.argv[1], sys.argv[2] == 'first'):\n print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Starts processes that hold the lock; they end with the test."""
    processes = []

    def hold(first: bool = True) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOLD, str(tmp_path), "first" if first else "other"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_second_run_is_refused_while_any_process_of_the_first_lives(tmp_path, holder):
    first, other = holder(), holder(first=False)
    with pytest.raises(FileExistsError, match=rf"another run is at work .*process {first.pid} on"), run_lock(tmp_path):
        pass
    end(first)
    with pytest.raises(FileExistsError, match="another run is at work"), run_lock(tmp_path):
        pass
    end(other)
    with run_lock(tmp_path) as was_killed:
        assert was_killed


def test_a_run_that_ended_by_itself_leaves_nothing_to_notice(tmp_path):
    with run_lock(tmp_path) as was_killed:
        assert not was_killed
        with run_lock(tmp_path):  # as the Trainer does inside of the program
            pass
    with pytest.raises(ValueError, match="refused"), run_lock(tmp_path):  # said already, and no kill
        raise ValueError("refused")
    with run_lock(tmp_path) as was_killed:
        assert not was_killed


@pytest.mark.slow
def test_forked_processes_do_not_keep_the_lock(tmp_path, holder):
    script = HOLD.replace("print(", "import os; os.fork() or time.sleep(60); print(")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), "first"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        child = int(file.read().split()[0])
    end(process)
    try:
        os.kill(child, 0)  # it lives
        with run_lock(tmp_path) as was_killed:
            assert was_killed
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_link_in_its_place_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(target)
    with pytest.raises(OSError), run_lock(tmp_path / "run"):
        pass
    assert target.read_text() == "mine"
