"""Do the auxiliary losses help? A grid of runs with seeds and tuned learning rates, and a report on them.

    python -m benchmarks.ablation run cpu --data tinyshakespeare.txt [--workers 2] [--output benchmarks/results/ablation.jsonl]
    python -m benchmarks.ablation report benchmarks/results/ablation.jsonl

`run` goes through the grid cell by cell and appends one JSON line per finished run. It skips runs that are in the file with
the same settings, text, threads and device, so the same command continues a stopped grid. Each cell is first run with one
seed at each learning rate of the grid, since a comparison at one rate favours the cell for which it was tuned. The cell's best
rate is then run with other seeds, and only these runs count. A seed gives every cell the same data order, and the same
initial weights where cells share them. Finally the training steps of all cells are timed, taking turns.

`report` writes a Markdown page and a figure next to the JSON file.
"""

import argparse
import json
import sys
from pathlib import Path

from .grids import GRIDS
from .one_run import run_one
from .report import report
from .sweep import Sweep


RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run the missing runs of a grid")
    running.add_argument("grid", choices=GRIDS)
    running.add_argument("--data", required=True, help="tiny Shakespeare, 1,115,394 bytes, or another text")
    running.add_argument("--workers", type=int, default=1, help="number of runs at a time, which share the cores")
    running.add_argument("--output", type=Path)
    reporting = commands.add_parser("report", help="write a page and figures of the runs in a file")
    reporting.add_argument("runs", type=Path)
    one = commands.add_parser("one", help="one run, with its result in JSON; called by `run`")
    one.add_argument("settings", type=json.loads)
    arguments = parser.parse_args()
    if arguments.command == "one":
        print(json.dumps(run_one(**arguments.settings)))
    elif arguments.command == "run":
        if not Path(arguments.data).is_file():
            sys.exit(f"--data: there is no file {arguments.data!r}; give the text to train on")
        output = arguments.output or RESULTS / "ablation.jsonl"
        Sweep(arguments.grid, arguments.data, output, arguments.workers).run()
        print(f"Runs: {output}; now: python -m benchmarks.ablation report {output}")
    else:
        try:
            page = report(arguments.runs)
        except (ValueError, OSError) as error:
            sys.exit(f"report: {error}")
        arguments.runs.with_suffix(".md").write_text(page, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
