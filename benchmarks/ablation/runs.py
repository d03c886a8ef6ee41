"""The file of finished runs: one JSON line each."""

import contextlib
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

from .grids import GRIDS, Grid


KEY = ("grid", "cell", "learning_rate", "seed", "settings", "data_sha256", "device", "threads")


def key_of(grid: str, cell: str, learning_rate: float, seed: int, data_sha256: str) -> dict[str, Any]:
    """The identity of a run: runs with the same key, recipe and program have the same result."""
    return {
        "grid": grid,
        "cell": cell,
        "learning_rate": learning_rate,
        "seed": seed,
        "settings": {**GRIDS[grid].fields, **GRIDS[grid].cells[cell]},
        "data_sha256": data_sha256,
        "device": torch.cuda.get_device_name() if GRIDS[grid].device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a file, without a last one whose line is incomplete."""
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            runs.append(json.loads(line))
    return runs


def result(run: dict[str, Any], grid: Grid) -> float:
    """Validation bits per character at the end, or the best; infinite if the run diverged."""
    return math.inf if run["final_bpc"] is None else float(run["best_bpc" if grid.at_its_best else "final_bpc"])


def best_rate(runs: list[dict[str, Any]], cell: str, grid: Grid) -> float | None:
    """The best learning rate of a cell, by the seed reserved for this choice."""
    own = [run for run in runs if run["cell"] == cell and run["seed"] == grid.tuning_seed]
    return min(own, key=lambda run: result(run, grid))["learning_rate"] if own else None


def of_cell(runs: list[dict[str, Any]], cell: str, grid: Grid) -> dict[int, dict[str, Any]]:
    """The runs of a cell that count, by seed: those at its best learning rate, without the seed that chose the rate."""
    rate = best_rate(runs, cell, grid)
    own = [run for run in runs if run["cell"] == cell and run["learning_rate"] == rate]
    return {run["seed"]: run for run in own if run["seed"] in grid.seeds}
