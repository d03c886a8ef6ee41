"""Kills runs at random moments, gives the same command again, and compares with a run that was left alone.

    python -m tests.training.kill_program FOLDER [--kills N] [--kinds KIND ...] [--seed S]

A run is killed at a random one of all its operations on files (so that each moment of each save comes up), or at a
random time; some are killed again while they go on. Weights, logs, samples and files must be those of the run that was
left alone. Not a test by itself: test_kills.py runs a few kills; 60 take some minutes.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

import yaml

from charformer_training import data, evaluate_cli, train  # imported once: each run is a fork of this process
from charformer_training.shipped import shipped_path
from tests.helpers import small_command
from tests.training.distributed_program import use_fsdp_on_cpus


FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate")
TIMES = re.compile(r"runtime|per_second|seconds|flos")
STOPPED = {128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}


@dataclass(frozen=True)
class Kill:
    """When a process gets a signal: at its `event`-th operation on a file below `folder`, or after so many seconds."""

    event: int | None = None
    seconds: float | None = None
    signum: int = signal.SIGKILL
    rank: int = 0


@dataclass
class Case:
    """What is run: each process's program, and what is compared of the folder that it leaves."""

    program: Callable[[Path], int]
    compared: Callable[[Path], Any]
    processes: int = 1
    signals: tuple[int, ...] = (signal.SIGKILL,)
    events: list[int] = field(default_factory=list)
    last_events: int | None = None


def run(case: Case, folder: Path, kill: Kill | None = None, count_to: Path | None = None) -> list[int]:
    """Run a case's processes in forks of this one; returns their exit statuses, `-9` for a process that was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    children = [os.fork() or _child(case, folder, rank, port, kill, count_to) for rank in range(case.processes)]
    if kill is not None and kill.seconds is not None:
        threading.Timer(kill.seconds, _send, (children[kill.rank], kill.signum)).start()
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        pid, status = os.wait()
        if pid not in children:
            continue
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if statuses[pid] < 0:
            for other in set(children) - statuses.keys():  # as a launcher does
                _send(other, signal.SIGKILL)
    return [statuses[pid] for pid in children]


def _send(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass


def _child(case: Case, folder: Path, rank: int, port: int, kill: Kill | None, count_to: Path | None) -> Any:
    status = 1
    try:
        output = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        for signum in STOPPED:
            signal.signal(signum - 128, signal.default_int_handler if signum == 130 else signal.SIG_DFL)
        if case.processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.processes)}
            os.environ |= {
                "LOCAL_WORLD_SIZE": str(case.processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        count = _watch_files(folder, kill if kill is not None and kill.rank == rank else None)
        status = case.program(folder)
        if count_to is not None and rank == 0:
            count_to.write_text(str(count[0]))
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def _watch_files(folder: Path, kill: Kill | None) -> list[int]:
    """Count this process's operations on files below `folder`, and send the signal at the one that was chosen."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and arguments and str(arguments[0]).startswith(str(folder)):
            count[0] += 1
            if kill is not None and count[0] == kill.event:
                os.kill(os.getpid(), kill.signum)

    sys.addaudithook(hook)
    return count


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# ---- What is run ----


def training(text: Path, folder: Path, cache: Path | None = None, **settings: Any) -> int:
    """The command that is given again and again."""
    if cache is not None:
        data.HF_HOME = str(cache)  # type: ignore[attr-defined]  # a name that it imports
    chosen: dict[str, Any] = {
        "data_path": text,
        "output_dir": folder,
        "max_steps": 8,
        "eval_steps": 4,
        "save_steps": 3,
    }
    chosen |= {"logging_steps": 5, "save_total_limit": 3, "activation_dropout": 0.1, "disable_tqdm": "true"}
    return train.main([*small_command(**(chosen | settings)), "--resume", "auto"])


def evaluating(model: Path, text: Path, folder: Path) -> int:
    """An evaluation that keeps what is done."""
    state, output = folder / "state.json", folder / "results.json"
    words = [
        str(model),
        str(text),
        "--stride",
        "3",
        "--max_bytes",
        "2000",
        "--batch_size",
        "4",
        "--device",
        "cpu",
        "--split",
        "all",
    ]
    return evaluate_cli.main([*words, "--state_file", str(state), "--output", str(output)])


def trained_folder(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for times, and with the folder's own name left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name in ("command.txt", "_run.lock"):
            continue
        content: Any = path.read_bytes()
        if path.suffix in (".png", ".pt", ".pth", ".bin"):
            content = "a file"  # pickles and pictures hold names of places and times
        elif path.name in ("manifest.json", "_result.json", "trainer_state.json", "metrics.json", "running_sums.json"):
            content = _without_times(json.loads(content))
        elif path.suffix in (".yaml", ".md", ".jsonl", ".json", ".py"):
            content = content.decode().replace(str(folder), "FOLDER")
        found[name] = content
    return found


def evaluation_folder(folder: Path) -> dict[str, Any]:
    """The figures of an evaluation, but for times."""
    return {"results": _without_times(json.loads((folder / "results.json").read_text()))}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("files", "sha256", "best_model_checkpoint", "stateful_callbacks", "state_file")
        return {k: _without_times(v) for k, v in value.items() if not TIMES.search(k) and k not in left_out}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def cases(folder: Path) -> dict[str, Case]:
    """What is killed, by kind."""
    text = folder / "text.txt"
    text.write_text("".join(f"Zeile {n}: Die Größe von {n * 7 % 13} wächst.\n" for n in range(600)), encoding="utf-8")
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(40):
        (texts / f"{number:02}.txt").write_text(f"Строка {number}\n" * 40, encoding="utf-8")

    def single(out: Path) -> int:
        return training(text, out)

    def pair(out: Path) -> int:
        return training(text, out, per_device_train_batch_size=2)

    def sharded(out: Path) -> int:
        settings = yaml.safe_load(shipped_path("accelerate/fsdp2.yaml").read_text())["fsdp_config"]
        os.environ |= {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in settings.items()}}
        use_fsdp_on_cpus()
        return pair(out)

    def cached(out: Path) -> int:
        return training(texts, out, cache=out.parent / f"{out.name}-cache", max_steps=2, save_steps=2, eval_steps=2)

    def evaluation(out: Path) -> int:
        return evaluating(folder / "whole" / "single" / "run", text, out)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return {
        "single": Case(single, trained_folder),
        "pair": Case(pair, trained_folder, processes=2),
        "last_save": Case(single, trained_folder, last_events=160),
        "signal": Case(single, trained_folder, signals=signals),
        "signal_to_pair": Case(pair, trained_folder, processes=2, signals=signals),
        "sharded": Case(sharded, trained_folder, processes=2),
        "corpus": Case(cached, trained_folder),
        "evaluation": Case(evaluation, evaluation_folder),
    }


def check(kind: str, case: Case, folder: Path, kills: int, draw: random.Random) -> int:
    """Kill a case so many times; returns how many of the kills hit a living process.

    Raises:
        AssertionError: If what a run leaves is not what one leaves that was left alone.
    """
    whole, counted = folder / "whole" / kind / "run", folder / f"{kind}.count"
    began = time.monotonic()
    assert run(case, whole, count_to=counted) == [0] * case.processes, f"see {whole}.log"
    seconds, events = time.monotonic() - began, int(counted.read_text())
    expected, hit = case.compared(whole), 0
    for number in range(kills):
        place = folder / "killed" / f"{kind}-{number}" / "run"
        told: list[tuple[Kill | None, list[int]]] = []
        for _ in range(draw.choice((1, 1, 2))):
            first = 1 if case.last_events is None else max(1, events - case.last_events)
            by_event = case.signals == (signal.SIGKILL,) and draw.random() < 0.75
            kill = Kill(
                event=draw.randint(first, events) if by_event else None,
                seconds=None if by_event else draw.uniform(0.0, seconds),
                signum=draw.choice(case.signals),
                rank=draw.randrange(case.processes),
            )
            statuses = run(case, place, kill)
            told.append((kill, statuses))
            hit += statuses != [0] * case.processes
        statuses = run(case, place)
        told.append((None, statuses))
        assert statuses == [0] * case.processes, f"{told}; see {place}.log"
        found = case.compared(place)
        differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not differing, f"{sorted(differing)} differ after {told}; see {place}"
        shutil.rmtree(place.parent)
    return hit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--kinds", nargs="*", default=None)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    draw, all_cases = random.Random(arguments.seed), cases(folder)
    kinds = arguments.kinds or list(all_cases)
    if "evaluation" in kinds and "single" not in kinds:
        run(all_cases["single"], folder / "whole" / "single" / "run")
    for index, kind in enumerate(kinds):
        share = arguments.kills // len(kinds) + (index < arguments.kills % len(kinds))
        hit = check(kind, all_cases[kind], folder, share, draw)
        print(f"{kind}: {share} runs, {hit} kills that hit; equal to the uninterrupted run", flush=True)


if __name__ == "__main__":
    main()
