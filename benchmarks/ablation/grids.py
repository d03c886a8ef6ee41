"""The cells of each grid: settings of the losses by name, with the learning rates and seeds of their runs."""

from dataclasses import dataclass, field
from typing import Any

import torch


NONE: dict[str, Any] = {"num_targets": 1, "intermediate_layers": "none"}
LAYERS: dict[str, Any] = {"num_targets": 1, "intermediate_layers": "all"}
BOTH: dict[str, Any] = {"num_targets": 2, "intermediate_layers": "all", "intermediate_schedule": "paper"}
TWO: dict[str, Any] = {"num_targets": 2, "target_weights": [0.5]}  # the paper's weight
FOUR: dict[str, Any] = {"num_targets": 4, "target_weights": [0.2] * 3}
EIGHT: dict[str, Any] = {"num_targets": 8, "target_weights": [0.1] * 7}
MUON: dict[str, Any] = {"muon": True}
DROPOUT: dict[str, Any] = {"attention_dropout": 0.1, "activation_dropout": 0.1}
POST: dict[str, Any] = {"norm_placement": "post"}
# The paper's optimizer; its learning rate is 0.003.
MOMENTUM: dict[str, Any] = {"optim": "sgd", "optim_args": "momentum=0.99", "weight_decay": 0.0}
JUDGED_BY = {"eval_bpc": "per character", "last_position": "of the last character of a window"}


@dataclass(frozen=True)
class Grid:
    """Cells by name, each given by fields of a recipe; the learning rates and seeds of their runs."""

    recipe: str
    fields: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    learning_rates: tuple[float, ...]
    momentum_learning_rates: tuple[float, ...] = ()
    tuning_seed: int = 1
    seeds: tuple[int, ...] = (2, 3, 4)
    baselines: dict[str, str] = field(default_factory=dict)
    """The baseline of a cell; the default is `none`."""
    metric: str = "eval_bpc"
    """The figure compared: `"eval_bpc"`, all positions of a window, or `"last_position"`, bits at the last one."""
    at_its_best: bool = False
    """Whether the result of a run is its best evaluation, not its last."""
    cost_repeats: int = 30
    """How often each step is timed."""

    def baseline(self, cell: str) -> str:
        return self.baselines.get(cell, "none")

    @property
    def device(self) -> str:
        return "cuda" if "gpu" in self.recipe and torch.cuda.is_available() else "cpu"


def deep(layers: int, steps: int, window: int, batch: int) -> Grid:
    """Width 64; norms, optimizer and warm-up of the paper, and those common today."""
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
            "max_eval_bytes": 20_000,  # the whole split would take longer than training
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
    # Twenty epochs of little text, on which the model overfits: do the losses reduce that?
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
    # Grids that are too slow for `make ablation`.
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
