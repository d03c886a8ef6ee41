"""Runs the missing runs of a grid, several at a time, each in a separate process; then times the steps."""

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.measure import TENTHS, Step, times_by_turns
from charformer_training.train import build_model

from .grids import GRIDS
from .one_run import arguments_of
from .runs import KEY, best_rate, key_of, read


class Sweep:
    """Runs the missing runs, several at a time, each in a separate process."""

    def __init__(self, grid: str, data: str, output: Path, workers: int):
        self.grid, self.data, self.output, self.workers = grid, data, output, workers
        self.data_sha256 = hashlib.sha256(Path(data).read_bytes()).hexdigest()
        self.threads = max(1, (os.cpu_count() or 1) // workers)

    def missing(self, wanted: Iterable[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
        """The wanted (cell, learning rate, seed) that are not in the file yet."""
        done = [{name: run.get(name) for name in KEY} for run in read(self.output)]
        here = {"threads": self.threads}  # the threads of a run, not of this process
        return [key for key in wanted if key_of(self.grid, *key, self.data_sha256) | here not in done]

    def _run(self, key: tuple[str, float, int]) -> None:
        cell, learning_rate, seed = key
        one = json.dumps(
            {
                "grid": self.grid,
                "cell": cell,
                "learning_rate": learning_rate,
                "seed": seed,
                "data": self.data,
                "data_sha256": self.data_sha256,
            }
        )
        result = subprocess.run(
            [sys.executable, "-m", "benchmarks.ablation", "one", one],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
        )
        if result.returncode:
            raise RuntimeError(f"{key}: {result.stderr[-3000:]}")
        with self.output.open("a", encoding="utf-8") as file:
            file.write(result.stdout.splitlines()[-1] + "\n")

    def _all(self, keys: list[tuple[str, float, int]], name: str) -> None:
        with ThreadPoolExecutor(self.workers) as pool:
            for _ in tqdm(pool.map(self._run, keys), total=len(keys), desc=name, unit="run"):
                pass

    def run(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        grid = GRIDS[self.grid]

        def rates(cell: str) -> tuple[float, ...]:
            return grid.momentum_learning_rates if "optim" in grid.cells[cell] else grid.learning_rates

        tuning = ((cell, rate, grid.tuning_seed) for cell in grid.cells for rate in rates(cell))
        self._all(self.missing(tuning), f"{self.grid}: learning rates")
        runs = [run for run in read(self.output) if run["grid"] == self.grid]
        best = {cell: best_rate(runs, cell, grid) for cell in grid.cells}
        seeds = [(cell, rate, seed) for seed in grid.seeds for cell, rate in best.items() if rate is not None]
        self._all(self.missing(seeds), f"{self.grid}: seeds")
        costs = self.output.with_name(f"{self.output.stem}_{self.grid}_costs.json")
        costs.write_text(json.dumps(step_costs(self.grid, self.data), indent=2) + "\n", encoding="utf-8")


def step_costs(name: str, data: str) -> dict[str, float]:
    """Seconds of a training step of each cell, averaged over its schedule. The cells take turns in this process.

    Cells of momentum SGD are timed with AdamW, as their baselines are: what differs is the losses.
    """
    grid = GRIDS[name]
    steps: dict[tuple[str, float], Step] = {}
    for cell in grid.cells:
        model_arguments, _, _, training = arguments_of(name, cell, 1e-3, 1, data, "unused")
        model = build_model(model_arguments)
        ids = torch.randint(0, 256, (training.per_device_train_batch_size, model.config.max_position_embeddings))
        step = Step(model, ids, grid.device, muon=training.muon)
        steps |= {(cell, at): step.given(training_progress=at) for at in TENTHS}
    times = times_by_turns(steps, grid.cost_repeats, f"{name}: cost of a step")
    return {cell: statistics.mean(times[cell, at] for at in TENTHS) for cell in grid.cells}
