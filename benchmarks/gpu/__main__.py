"""What a CPU cannot tell, measured on one GPU in at most eight minutes.

    python -m benchmarks.gpu --text data/tinyshakespeare.txt [--again] [--output benchmarks/results/gpu]

The parts, in order of worth: correctness beside the CPU; the time of a training step of T12 and T64 beside comparable models;
the peak memory of T64; tiny Shakespeare at nanoGPT's GPU setting, with and without auxiliary losses; the speed of drafting;
the cost of the losses of a model with a large vocabulary; the project's tests of losses and model on this device.

Each part writes NAME.json, and most a picture, as soon as a figure is there, and is stopped when its time is over. Another
call goes on with what is missing. The exit status is 0 if every part is finished and nothing failed. `--toy` runs everything
at toy size on a CPU, where the figures mean nothing.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

from . import pictures, runner
from .report import Report, write_whole


# The module and the function of each part. They are imported in the part's own process.
PARTS = {
    "correctness": ("correctness", "measure"),
    "training_step": ("training_step", "measure"),
    "memory": ("training_step", "measure_memory"),
    "shakespeare": ("shakespeare", "measure"),
    "shakespeare_without_losses": ("shakespeare", "measure_without_losses"),
    "drafting": ("drafting", "measure"),
    "vocabulary": ("training_step", "measure_vocabulary"),
    "tests": ("correctness", "measure_tests"),
}


def run_part(name: str, folder: Path, text: str, is_toy: bool, wait: bool = True) -> bool:
    """Run one part in this process, once a line comes; returns whether nothing failed."""
    module, function = PARTS[name]
    measure = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    from benchmarks.measure import machine

    from .scale import Scale, toy

    if wait and not sys.stdin.readline():
        return False
    scale = toy(text) if is_toy else Scale("cuda", text)
    facts = {**machine(scale.device), "python": sys.version.split()[0], "toy": is_toy}
    report = Report(folder / f"{name}.json", facts)
    measure(report, scale)
    return report.finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="data/tinyshakespeare.txt", help="the file of tiny Shakespeare")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=runner.MINUTES, help="limit of all parts together")
    parser.add_argument("--again", action="store_true", help="run finished parts again too")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.part:
        return 0 if run_part(arguments.part, arguments.output, arguments.text, arguments.toy) else 1
    if not Path(arguments.text).is_file():
        parser.error(f"--text: there is no file {arguments.text}; it is data/tinyshakespeare/input.txt of char-rnn")
    command = [sys.executable, "-m", "benchmarks.gpu", "--text", arguments.text, "--output", str(arguments.output)]
    command += [*(["--toy"] if arguments.toy else []), "--part"]
    finished = runner.run(arguments.output, command, minutes=arguments.minutes, again=arguments.again)
    write_whole(arguments.output / "README.md", pictures.table(arguments.output, PARTS).encode())
    print(f"The table is in {arguments.output / 'README.md'}")
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main())
