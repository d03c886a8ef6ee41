"""Runs the parts one after the other, each in a process of its own that ends when its time is over.

All processes start at once and import what they need while the first ones work: an import takes seconds, of which the device
would be idle. Each waits for a line on its standard input before it touches the device, and gives up if that is closed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import pictures
from .report import FINISHED, read, write


class Wave(NamedTuple):
    """Parts that run at the same time, and the most seconds that they take, beside what earlier waves have left over."""

    parts: tuple[str, ...]
    seconds: float


# In order of worth. The two trainings share the device: each alone would leave it idle most of the time, since the steps of a
# model this small take longer to launch than to compute.
WAVES = (
    Wave(("correctness",), 100),
    Wave(("training_step",), 95),
    Wave(("memory",), 20),
    Wave(("shakespeare", "shakespeare_without_losses"), 170),
    Wave(("drafting",), 55),
    Wave(("vocabulary",), 35),
    Wave(("tests",), 40),
)
MINUTES = 8.0


def run(
    folder: Path, command: Sequence[str], waves: Sequence[Wave] = WAVES, minutes: float = MINUTES, again: bool = False
) -> bool:
    """Run each part that is not finished yet, or all of them; returns whether all are finished.

    Args:
        folder: Where the parts write `NAME.json`.
        command: The command of a part, to which its name is added.
        waves: The parts.
        minutes: The limit of all together.
        again: Whether finished parts run again.
    """
    begin = time.monotonic()
    names = [name for wave in waves for name in wave.parts]
    if again:
        for name in names:
            _file(folder, name).unlink(missing_ok=True)
    open_parts = [name for name in names if read(_file(folder, name)).get("status") != FINISHED]
    processes = {name: _start([*command, name]) for name in open_parts}
    try:
        end = begin
        for wave in waves:
            end += wave.seconds
            own = {name: processes[name] for name in wave.parts if name in processes}
            _run_wave(folder, own, min(end, begin + 60 * minutes))
    finally:
        for process in processes.values():
            _end(process)
    return all(read(_file(folder, name)).get("status") == FINISHED for name in names)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def _run_wave(folder: Path, processes: dict[str, subprocess.Popen[str]], end: float) -> None:
    starts = time.monotonic() < end
    for process in processes.values():
        if starts and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has failed already, and said why
                process.stdin.write("go\n")
                process.stdin.flush()
    for name, process in processes.items():
        status = None
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
            if code and read(_file(folder, name)).get("status") not in ("failed", FINISHED):
                status = f"ended with exit status {code}"
        except subprocess.TimeoutExpired:
            _end(process)
            status = "stopped when its time was over" if starts else "no time was left"
        if status is not None:
            write(_file(folder, name), {**read(_file(folder, name)), "status": status})
        _show(folder, name)


def _end(process: subprocess.Popen[str]) -> None:
    """End a part, and what it has started: compilers, tests."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _show(folder: Path, name: str) -> None:
    report = read(_file(folder, name))
    print(f"== {name}: {report['status']}, {report.get('seconds', 0)} s", flush=True)
    try:
        pictures.draw(folder)
    except Exception as error:  # the figures are there
        print(f"no picture: {error!r}", file=sys.stderr)
