"""Do the auxiliary losses help? A grid of them, with seeds and retuned learning rates; a report drawn from the runs.

    python benchmarks/ablation.py run cpu --data tinyshakespeare.txt [--workers 2] [--output benchmarks/results/ablation.jsonl]
    python benchmarks/ablation.py report benchmarks/results/ablation.jsonl

`run` goes through the grid cell by cell and appends one JSON line for each finished run; runs that are there already, of the
same settings, text, threads and device, are not run again, so that the same command goes on where it was stopped. First each
cell is run with one seed at each learning rate of the grid, since a comparison at one rate favours the cell it was tuned for;
then, at the cell's best rate, with other seeds, which alone count. The data order of a seed is the same in every cell, and so
are the initial weights of what cells share. Last, the time of a training step is measured for all cells by turns.

`report` writes a Markdown page and a figure beside the JSON lines.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import TENTHS, Step, times_by_turns
from tqdm import tqdm
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from charformer_training.arguments import Arguments
from charformer_training.data import load_corpus, split_corpus
from charformer_training.recipes import parse_arguments
from charformer_training.train import build_model, build_trainer
from modeling_charformer import CharformerTokenizer


ROOT = Path(__file__).resolve().parent.parent
NONE: dict[str, Any] = {"num_targets": 1, "intermediate_layers": "none"}
LAYERS: dict[str, Any] = {"num_targets": 1, "intermediate_layers": "all"}
BOTH: dict[str, Any] = {"num_targets": 2, "intermediate_layers": "all", "intermediate_schedule": "paper"}
TWO: dict[str, Any] = {"num_targets": 2, "target_weights": [0.5]}  # the paper's weight
FOUR: dict[str, Any] = {"num_targets": 4, "target_weights": [0.2] * 3}
EIGHT: dict[str, Any] = {"num_targets": 8, "target_weights": [0.1] * 7}
JUDGED_BY = {"eval_bpc": "per character", "last_position": "of the last character of a window"}
KEY = ("grid", "cell", "learning_rate", "seed", "settings", "data_sha256", "device", "threads")
# Two-sided 95% quantiles of Student's t, by degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
MUON: dict[str, Any] = {"muon": True}
DROPOUT: dict[str, Any] = {"attention_dropout": 0.1, "activation_dropout": 0.1}
POST: dict[str, Any] = {"norm_placement": "post"}
# The paper's optimizer; its learning rate is 0.003.
MOMENTUM: dict[str, Any] = {"optim": "sgd", "optim_args": "momentum=0.99", "weight_decay": 0.0}


@dataclass(frozen=True)
class Grid:
    """Cells by name, each with the fields of a recipe that make it; learning rates and seeds to run them at."""

    recipe: str
    fields: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    learning_rates: tuple[float, ...]
    momentum_learning_rates: tuple[float, ...] = ()
    tuning_seed: int = 1
    seeds: tuple[int, ...] = (2, 3, 4)
    baselines: dict[str, str] = field(default_factory=dict)
    """What a cell is compared with; `none` where nothing is said."""
    metric: str = "eval_bpc"
    """By what cells are judged: `"eval_bpc"`, all positions of a window, or `"last_position"`, bits of its last one."""
    at_its_best: bool = False
    """Whether a run counts as it was at its best evaluation, not at the end."""
    cost_repeats: int = 30
    """How often each step is timed for the costs."""

    def baseline(self, cell: str) -> str:
        return self.baselines.get(cell, "none")

    @property
    def device(self) -> str:
        return "cuda" if "gpu" in self.recipe and torch.cuda.is_available() else "cpu"


def deep(layers: int, steps: int, window: int, batch: int) -> Grid:
    """Width 64; norms, optimizer and warm-up as the paper's and as today's."""
    losses: dict[str, dict[str, Any]] = {
        "none": NONE,
        "layers, paper's schedule, 1": {**LAYERS, "intermediate_weight": 1.0},
    }
    variants: dict[str, dict[str, Any]] = {
        "": {},
        "post-norm: ": POST,
        "post-norm, momentum SGD, no warm-up: ": POST | MOMENTUM | {"warmup_steps": 0},
    }
    return Grid(
        "shakespeare-cpu.yaml",
        {
            "num_hidden_layers": layers,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "max_position_embeddings": window,
            "per_device_train_batch_size": batch,
            "max_steps": steps,
            "eval_steps": steps // 10,
            "max_eval_bytes": 20_000,  # all of them would take longer than training
        },
        {prefix + name: fields | more for prefix, more in variants.items() for name, fields in losses.items()},
        learning_rates=(5e-4, 2e-3, 8e-3),
        momentum_learning_rates=(3e-3, 1e-2, 3e-2),
        baselines={prefix + name: f"{prefix}none" for prefix in variants for name in losses},
        cost_repeats=10,
    )


GRIDS = {
    # nanoGPT's CPU setting: 4 layers, width 128, window 64, batch 12, 2,000 steps.
    "cpu": Grid(
        "shakespeare-cpu.yaml",
        {"eval_steps": 200},
        {
            "none": NONE,
            "layers, paper's schedule, 1": LAYERS | {"intermediate_weight": 1.0},
            "layers, paper's schedule, 0.1": LAYERS | {"intermediate_weight": 0.1},
            "every second layer, constant, 0.1": LAYERS
            | {"intermediate_layers": [2], "intermediate_weight": 0.1, "intermediate_schedule": "constant"},
            "2 targets": NONE | {"num_targets": 2},
            "4 targets, 0.2 each": NONE | FOUR,
            "all of the paper's": BOTH | {"intermediate_weight": 1.0},
        },
        learning_rates=(2e-3, 4e-3, 8e-3),
    ),
    # The same model and data with Muon.
    "cpu-muon": Grid(
        "shakespeare-cpu.yaml",
        {"eval_steps": 200},
        {
            "none": NONE,
            "Muon": NONE | MUON,
            "Muon; 4 targets, 0.2 each": NONE | MUON | FOUR,
            "Muon; 8 targets, 0.1 each, sequential": NONE | MUON | EIGHT | {"target_heads": "sequential"},
            "Muon; all of the paper's": BOTH | MUON | {"intermediate_weight": 1.0},
        },
        learning_rates=(2e-3, 4e-3, 8e-3),
        baselines={
            f"Muon; {losses}": "Muon"
            for losses in ("4 targets, 0.2 each", "8 targets, 0.1 each, sequential", "all of the paper's")
        },
    ),
    # Twenty epochs of little text, which the model learns by heart: do the losses keep it from that?
    "small-data": Grid(
        "shakespeare-cpu.yaml",
        {"eval_steps": 100, "train_share": 0.05, "max_steps": 1500},
        {
            "none": NONE | MUON,
            "layers, paper's schedule, 1": LAYERS | MUON | {"intermediate_weight": 1.0},
            "4 targets, 0.2 each": NONE | MUON | FOUR,
            "all of the paper's": BOTH | MUON | {"intermediate_weight": 1.0},
            "dropout": NONE | MUON | DROPOUT,
            "dropout; 4 targets, 0.2 each": NONE | MUON | DROPOUT | FOUR,
            "dropout; 4 targets, 0.5 each": NONE | MUON | DROPOUT | {"num_targets": 4, "target_weights": [0.5] * 3},
            "dropout; 8 targets, 0.2 each": NONE | MUON | DROPOUT | {"num_targets": 8, "target_weights": [0.2] * 7},
            "dropout; all of the paper's": BOTH | MUON | DROPOUT | {"intermediate_weight": 1.0},
        },
        learning_rates=(1e-3, 2e-3, 4e-3),
        baselines={
            f"dropout; {losses}": "dropout"
            for losses in ("4 targets, 0.2 each", "4 targets, 0.5 each", "8 targets, 0.2 each", "all of the paper's")
        },
        at_its_best=True,
    ),
    # A loss at every position against one at the last position only.
    "positions": Grid(
        "shakespeare-cpu.yaml",
        {"eval_steps": 200},
        {"none": NONE, "last position only": NONE | {"position_loss": "last"}},
        learning_rates=(2e-3, 4e-3),
        metric="last_position",
    ),
    # What `make ablation` has no time for.
    "cpu-more": Grid(
        "shakespeare-cpu.yaml",
        {"eval_steps": 200},
        {
            "none": NONE,
            "layers, paper's schedule, 0.3": LAYERS | {"intermediate_weight": 0.3},
            "layers, constant, 0.1": LAYERS | {"intermediate_weight": 0.1, "intermediate_schedule": "constant"},
            "2 targets, sequential": NONE | {"num_targets": 2, "target_heads": "sequential"},
            "4 targets, 0.2 each, sequential": NONE | FOUR | {"target_heads": "sequential"},
            "8 targets, 0.1 each": NONE | EIGHT,
            "8 targets, 0.1 each, sequential": NONE | EIGHT | {"target_heads": "sequential"},
            "8 targets, 0.1 each, sequential, forward": NONE
            | EIGHT
            | {"target_heads": "sequential", "target_schedule": "forward"},
            "2 targets; layers, paper's schedule, 0.1": BOTH | {"intermediate_weight": 0.1},
        },
        learning_rates=(2e-3, 4e-3, 8e-3),
    ),
    "depth-12": deep(12, 1000, 64, 12),
    "depth-64": deep(64, 500, 128, 4),
    # nanoGPT's GPU setting: 6 layers, width 384, window 256, batch 64, 5,000 steps.
    "gpu": Grid(
        "shakespeare-gpu.yaml",
        {"report_to": "none", "eval_steps": 250},
        {
            "none": NONE,
            "layers, paper's schedule, 0.1": LAYERS | {"intermediate_weight": 0.1},
            "2 targets": NONE | TWO,
            "4 targets, 0.2 each": NONE | FOUR,
            "4 targets, 0.2 each, sequential": NONE | FOUR | {"target_heads": "sequential"},
            "8 targets, 0.1 each": NONE | EIGHT,
            "all of the paper's": BOTH | TWO | {"intermediate_weight": 1.0},
            "Muon": NONE | MUON,
            "Muon; 4 targets, 0.2 each": NONE | MUON | FOUR,
            "Muon; all of the paper's": BOTH | TWO | MUON | {"intermediate_weight": 1.0},
        },
        learning_rates=(1e-3, 2e-3),
        baselines={f"Muon; {losses}": "Muon" for losses in ("4 targets, 0.2 each", "all of the paper's")},
        at_its_best=True,
    ),
}


class Curve(TrainerCallback):
    """Validation bits per character, seconds of training alone, and the gradient that each term has on the layers."""

    def __init__(self, batch: dict[str, torch.Tensor], metric: str):
        self.batch, self.metric, self.seconds = batch, metric, 0.0
        self.points: list[list[float]] = []
        self.gradients: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.begin

    def on_evaluate(self, args, state, control, **kwargs):
        metrics, model = kwargs["metrics"], kwargs["model"]
        if self.metric == "last_position":
            bits = metrics["eval_loss_last_position"] / math.log(2)  # of windows of ASCII
        else:
            bits = metrics["eval_bpc"]
        self.points.append([state.global_step, round(self.seconds, 2), round(bits, 5)])
        self.gradients.append({"step": state.global_step, **self.gradient_norms(model, state)})

    def gradient_norms(self, model: Any, state: Any) -> dict[str, float]:
        """Norm of the weighted gradient of each term of the loss, on all layers together."""
        progress = min(state.global_step / state.max_steps, 0.999)
        batch = {name: value.to(model.device) for name, value in self.batch.items()}
        model.train()
        outputs = model(**batch, use_cache=False, training_progress=progress, training_step=state.global_step)
        trunk = list(model.model.layers.parameters())
        norms = {}
        for name, value in outputs.loss_dict.items():
            if outputs.loss_weights[name]:
                gradients = torch.autograd.grad(value, trunk, retain_graph=True, allow_unused=True)
                norm = math.sqrt(sum(float(g.float().square().sum()) for g in gradients if g is not None))
                norms[name] = round(outputs.loss_weights[name] * norm, 5)
        return norms


def arguments_of(grid: str, cell: str, learning_rate: float, seed: int, data: str, folder: str) -> Arguments:
    """What `charformer-train` would be called with, for one run."""
    # The recipe's own choice of optimizer is not a cell's.
    fields = {"muon": False, **GRIDS[grid].fields, **GRIDS[grid].cells[cell]}
    fields |= {"learning_rate": learning_rate, "seed": seed}
    fields |= {"data_path": data, "output_dir": folder, "sample_length": 0, "save_strategy": "no"}
    fields |= {"load_best_model_at_end": False, "disable_tqdm": True, "logging_steps": fields["eval_steps"]}
    fields["lr_scheduler_kwargs"] = json.dumps({"min_lr": learning_rate / 10})
    words = [str(ROOT / "training" / "configs" / GRIDS[grid].recipe)]
    for name, value in fields.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return parse_arguments(words)


def run_one(grid: str, cell: str, learning_rate: float, seed: int, data: str, data_sha256: str) -> dict[str, Any]:
    """A run from start to end, in this process."""
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_of(grid, cell, learning_rate, seed, data, f"{folder}/run")
        model_arguments, data_arguments, _, training = arguments
        set_seed(seed)
        model = build_model(model_arguments)
        corpus = load_corpus(data_arguments)
        splits = split_corpus(corpus, data_arguments.train_share, data_arguments.validation_share)
        trainer = build_trainer(arguments, model, CharformerTokenizer(), splits)
        rows = [trainer.train_dataset[index] for index in range(training.per_device_train_batch_size)]  # type: ignore[index]
        curve = Curve(
            {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}, GRIDS[grid].metric
        )
        trainer.add_callback(curve)
        diverged = None
        try:
            trainer.train()
        except FloatingPointError as error:
            diverged = str(error)
    return {
        **key_of(grid, cell, learning_rate, seed, data_sha256),
        "final_bpc": curve.points[-1][2] if curve.points and diverged is None else None,
        "best_bpc": min((point[2] for point in curve.points), default=None),
        "seconds_per_step": round(curve.seconds / max(1, trainer.state.global_step), 5),
        "curve": curve.points,
        "gradient_norms": curve.gradients,
        "diverged": diverged,
        "steps": training.max_steps,
        "parameters": model.num_parameters(),
        "inference_parameters": model.without_auxiliary_heads().num_parameters(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def key_of(grid: str, cell: str, learning_rate: float, seed: int, data_sha256: str) -> dict[str, Any]:
    """What tells one run from another: two with the same key, of the same recipe and program, would come to the same."""
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
    """The runs in a file; one whose line was cut off is not there."""
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            runs.append(json.loads(line))
    return runs


def result(run: dict[str, Any], grid: Grid) -> float:
    """Validation bits per character at the end, or at the run's best; infinite if it diverged."""
    return math.inf if run["final_bpc"] is None else float(run["best_bpc" if grid.at_its_best else "final_bpc"])


def best_rate(runs: list[dict[str, Any]], cell: str, grid: Grid) -> float | None:
    """The learning rate that is best for a cell with the seed that is there for choosing it."""
    own = [run for run in runs if run["cell"] == cell and run["seed"] == grid.tuning_seed]
    return min(own, key=lambda run: result(run, grid))["learning_rate"] if own else None


def of_cell(runs: list[dict[str, Any]], cell: str, grid: Grid) -> dict[int, dict[str, Any]]:
    """The runs of a cell that count, by their seeds: those at its best learning rate that did not choose it."""
    rate = best_rate(runs, cell, grid)
    own = [run for run in runs if run["cell"] == cell and run["learning_rate"] == rate]
    return {run["seed"]: run for run in own if run["seed"] in grid.seeds}


class Sweep:
    """Runs what is missing, some at a time, each in a process of its own."""

    def __init__(self, grid: str, data: str, output: Path, workers: int):
        self.grid, self.data, self.output, self.workers = grid, data, output, workers
        self.data_sha256 = hashlib.sha256(Path(data).read_bytes()).hexdigest()
        self.threads = max(1, (os.cpu_count() or 1) // workers)

    def _missing(self, wanted: Iterable[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
        done = [{name: run.get(name) for name in KEY} for run in read(self.output)]
        here = {"threads": self.threads}  # those of a run, not of this process
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
            [sys.executable, __file__, "one", one],
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
        self._all(self._missing(tuning), f"{self.grid}: learning rates")
        runs = [run for run in read(self.output) if run["grid"] == self.grid]
        best = {cell: best_rate(runs, cell, grid) for cell in grid.cells}
        seeds = [(cell, rate, seed) for seed in grid.seeds for cell, rate in best.items() if rate is not None]
        self._all(self._missing(seeds), f"{self.grid}: seeds")
        costs = self.output.with_name(f"{self.output.stem}_{self.grid}_costs.json")
        costs.write_text(json.dumps(step_costs(self.grid, self.data), indent=2) + "\n", encoding="utf-8")


def step_costs(name: str, data: str) -> dict[str, float]:
    """Seconds of a training step of each cell, averaged over its schedule. All take turns in this process.

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


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; not a number where a run diverged or there is one only."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def reaches(curve: list[list[float]], bpc: float, axis: int) -> float | None:
    """Steps (axis 0) or seconds (axis 1) until a curve is down at `bpc`, between two points along a straight line."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after[2] <= bpc < before[2]:
            return float(before[axis] + (after[axis] - before[axis]) * (before[2] - bpc) / (before[2] - after[2]))
    return None


@dataclass(frozen=True)
class Row:
    """A cell in the report. Ratios are to the cell's baseline, seed by seed, of how far each is when it first comes down to
    the baseline's result; `None` if one seed never does."""

    cell: str
    learning_rate: float
    at_edge: bool
    """Whether the best learning rate is the grid's lowest or highest: a better one may lie beyond."""
    seeds: int
    diverged: int
    bpc: float
    error: float
    gain: float
    gain_error: float
    steps_ratio: float | None
    seconds_ratio: float | None
    step_cost: float
    training_only: int
    """Parameters that only training needs."""
    gradient_shares: tuple[float, float]
    """What of the norms of all terms' gradients on the layers is the auxiliary terms', at the first evaluation and the last."""

    @property
    def verdict(self) -> str:
        """By a paired t-test at 5%."""
        if self.diverged:
            return f"diverged with {self.diverged} of {self.seeds} seeds"
        if math.isnan(self.gain_error):
            return "has too few seeds to tell"
        if abs(self.gain) <= T_QUANTILES[self.seeds - 1] * self.gain_error:
            return "makes no difference that these seeds can show"
        return "helps" if self.gain > 0 else "hurts"


def auxiliary_share(norms: dict[str, float]) -> float:
    """What of the norms of the terms' gradients, added up, is that of terms other than the language model's."""
    terms = {name: norm for name, norm in norms.items() if name != "step"}
    main = sum(norm for name, norm in terms.items() if name in ("next_char", "last_position"))
    return 1 - main / sum(terms.values()) if any(terms.values()) else math.nan


def rows(runs: list[dict[str, Any]], grid: Grid, costs: dict[str, float]) -> list[Row]:
    table = []
    for cell in grid.cells:
        baseline = grid.baseline(cell)
        own, base = of_cell(runs, cell, grid), of_cell(runs, baseline, grid)
        shared = sorted(own.keys() & base.keys())
        if not shared:
            continue
        bpc, error = mean_and_error([result(own[seed], grid) for seed in shared])
        gain, gain_error = mean_and_error([result(base[seed], grid) - result(own[seed], grid) for seed in shared])
        ratios = []
        for seed in shared:
            bpc_to_reach = result(base[seed], grid)
            steps, of_base = (reaches(run["curve"], bpc_to_reach, 0) for run in (own[seed], base[seed]))
            if steps is not None and of_base is not None:
                ratios.append(steps / of_base)
        steps_ratio = statistics.mean(ratios) if len(ratios) == len(shared) else None
        cost = costs[cell] / costs[baseline]
        first = own[shared[0]]
        gradients = [own[seed]["gradient_norms"] for seed in shared if own[seed]["gradient_norms"]]
        tried = sorted({run["learning_rate"] for run in runs if run["cell"] == cell})
        table.append(
            Row(
                cell=cell,
                learning_rate=first["learning_rate"],
                at_edge=first["learning_rate"] in (tried[0], tried[-1]),
                seeds=len(shared),
                diverged=sum(math.isinf(result(own[seed], grid)) for seed in shared),
                bpc=bpc,
                error=error,
                gain=gain,
                gain_error=gain_error,
                steps_ratio=steps_ratio,
                seconds_ratio=None if steps_ratio is None else steps_ratio * cost,
                step_cost=cost,
                training_only=first["parameters"] - first["inference_parameters"],
                gradient_shares=(
                    statistics.mean(auxiliary_share(norms[0]) for norms in gradients) if gradients else math.nan,
                    statistics.mean(auxiliary_share(norms[-1]) for norms in gradients) if gradients else math.nan,
                ),
            )
        )
    return table


def report(path: Path) -> str:
    """A Markdown page of the runs in `path`; draws a figure of each grid beside it.

    Raises:
        ValueError: If the runs of a grid are not of one text, device and number of threads.
    """
    runs = read(path)
    pages = ["# Ablation of the auxiliary losses", ""]
    for name in dict.fromkeys(run["grid"] for run in runs):
        grid = GRIDS[name]
        settings = {cell: {**grid.fields, **fields} for cell, fields in grid.cells.items()}
        own = [run for run in runs if run["grid"] == name and settings.get(run["cell"]) == run["settings"]]
        for field_name in ("data_sha256", "device", "threads", "torch", "transformers"):
            if len(values := {run[field_name] for run in own}) > 1:
                raise ValueError(f"{path}: the runs of {name} differ in {field_name}: {sorted(map(str, values))}")
        costs = json.loads(path.with_name(f"{path.stem}_{name}_costs.json").read_text(encoding="utf-8"))
        table, one = rows(own, grid, costs), own[0]
        tried = sorted({run["learning_rate"] for run in own if run["seed"] == grid.tuning_seed})
        with_muon = all(fields.get("muon") for fields in grid.cells.values())
        optimizer = "Muon in all cells" if with_muon else "AdamW where a cell says nothing else"
        figure = path.with_name(f"{path.stem}_{name}.png")
        draw(own, grid, costs, figure)
        pages += [
            f"## {name}",
            "",
            f"{one['steps']:,} steps, {grid.recipe} with {grid.fields}, {optimizer};"
            f" {one['device']}, {one['threads']} thread(s) a run, torch {one['torch']}, transformers {one['transformers']}; data sha256 {one['data_sha256']}. Each cell has"
            f" the learning rate that was best for it with seed {grid.tuning_seed} (tried: {tried}); the figures are of seeds"
            f" {list(grid.seeds)}.",
            "",
            f"{'Best' if grid.at_its_best else 'Final'} validation bits {JUDGED_BY[grid.metric]}, mean and standard error;"
            " gain over the baseline seed by seed (same data order); steps and seconds to the baseline's value, as shares of"
            " the baseline's (a dash: not reached with every seed); cost of a step; what of the gradient on the layers is the auxiliary terms' (of the norms of all"
            f" terms' weighted gradients, added up) after {int(grid.fields['eval_steps']):,} steps and at the end. `*`: the best"
            " learning rate is at the edge of those tried.",
            "",
            "| Cell | learning rate | seeds | bpc | gain | steps | seconds | cost of a step | gradient |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in table:
            ratios = ["-" if value is None else f"{value:.2f}" for value in (row.steps_ratio, row.seconds_ratio)]
            pages.append(
                f"| {row.cell} | {row.learning_rate:g}{'*' if row.at_edge else ''} | {row.seeds} |"
                f" {row.bpc:.4f} +- {row.error:.4f} | {row.gain:+.4f} +- {row.gain_error:.4f} | {ratios[0]} | {ratios[1]} |"
                f" {row.step_cost:.2f} | {row.gradient_shares[0]:.0%}, {row.gradient_shares[1]:.0%} |"
            )
        pages += ["", f"![Learning curves]({figure.name})", "", *conclusions(table, grid), ""]
    return "\n".join(pages)


def conclusions(table: list[Row], grid: Grid) -> list[str]:
    """What the table says of each cell that is compared with another."""
    compared = [row for row in table if row.cell != grid.baseline(row.cell)]
    return [
        f"- {row.cell}, beside {grid.baseline(row.cell)}: {row.verdict} ({row.gain:+.4f} +- {row.gain_error:.4f} bpc,"
        f" {row.step_cost:.2f} x a step)."
        for row in compared
    ] + [f"\nOf {len(compared)} comparisons at 5% each, {len(compared) * 0.05:.1f} would show a difference by chance."]


def draw(runs: list[dict[str, Any]], grid: Grid, costs: dict[str, float], path: Path) -> None:
    """Validation bpc against steps and against seconds: the mean of the seeds of each cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    lowest, highest = math.inf, 0.0
    for number, cell in enumerate(grid.cells):
        own = [run for run in of_cell(runs, cell, grid).values() if run["final_bpc"] is not None]
        if not own:
            continue
        points = list(zip(*(run["curve"] for run in own), strict=True))
        bpc = [statistics.mean(point[2] for point in group) for group in points]
        steps = [group[0][0] for group in points]
        lowest, highest = min(lowest, min(bpc)), max(highest, bpc[-1])
        style = {
            "label": cell,
            "color": plt.get_cmap("tab20")(number % 20),
            "linewidth": 2.5 if cell == "none" else 1.2,
            "linestyle": "-" if number < 10 else "--",
        }
        axes[0].plot(steps, bpc, **style)
        axes[1].plot([step * costs[cell] for step in steps], bpc, **style)
    axes[0].set(xlabel="steps", ylabel=f"validation bits {JUDGED_BY[grid.metric]}")
    axes[1].set(xlabel="seconds of training")
    axes[0].set_ylim(lowest - 0.03, max(lowest + 0.6, highest + 0.3))  # the end of every curve is in the picture
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run what is missing of a grid")
    running.add_argument("grid", choices=GRIDS)
    running.add_argument("--data", required=True, help="tiny Shakespeare, 1,115,394 bytes, or another text")
    running.add_argument("--workers", type=int, default=1, help="runs at a time, which share the cores")
    running.add_argument("--output", type=Path)
    reporting = commands.add_parser("report", help="a page and figures of the runs in a file")
    reporting.add_argument("runs", type=Path)
    one = commands.add_parser("one", help="one run, in JSON; what `run` calls")
    one.add_argument("settings", type=json.loads)
    arguments = parser.parse_args()
    if arguments.command == "one":
        print(json.dumps(run_one(**arguments.settings)))
    elif arguments.command == "run":
        if not Path(arguments.data).is_file():
            sys.exit(f"--data: there is no file {arguments.data!r}; give the text to train on")
        output = arguments.output or ROOT / "benchmarks" / "results" / "ablation.jsonl"
        Sweep(arguments.grid, arguments.data, output, arguments.workers).run()
        print(f"Runs: {output}; now: python benchmarks/ablation.py report {output}")
    else:
        page = report(arguments.runs)
        arguments.runs.with_suffix(".md").write_text(page, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
