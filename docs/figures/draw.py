"""Draws what each loss reads and predicts, and what the schedules do.

python docs/figures/draw.py    # writes losses.png and schedules.png beside this file
"""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from modeling_charformer.loss_settings import AuxiliaryLossSettings


FOLDER = Path(__file__).parent
# The same file for the same picture: nothing in it depends on the time or on random numbers.
matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}

TEXT = "To be or"
NUM_LAYERS, NUM_POSITIONS = 4, 6
READ, REST, LINE = "#2a6fb0", "#e8edf2", "#5f6b76"
# Title, the layer that is read, the positions that count, the number of steps ahead.
PANELS = (
    ("next_char\nnext character,\nevery position", 4, range(6), 1),
    ("last_position\nnext character,\nlast position", 4, [5], 1),
    ("target_2\ntwo steps ahead,\nevery position", 4, range(6), 2),
    ("layer_2\nnext character,\nread from layer 2", 2, range(6), 1),
)


def draw_losses() -> Figure:
    """One panel for each kind of term: which outputs it reads, and which characters it predicts from them."""
    figure = Figure(figsize=(10.4, 3.3), layout="constrained")
    for axes, (title, layer, positions, offset) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _draw_panel(axes, layer, list(positions), offset)
        axes.set_title(title, fontsize=9)
    return figure


def _draw_panel(axes: Axes, layer: int, positions: list[int], offset: int) -> None:
    for position in range(NUM_POSITIONS):
        axes.text(position, 0, _shown(position), ha="center", va="center", family="monospace")
        for row in range(1, NUM_LAYERS + 1):
            read = row == layer and position in positions
            box = FancyBboxPatch(
                (position - 0.32, row - 0.3),
                0.64,
                0.6,
                boxstyle="round,pad=0.02",
                ec="none",
                fc=READ if read else REST,
            )
            axes.add_patch(box)
        if position in positions:
            arrow = FancyArrowPatch(
                (position, layer + 0.34), (position, NUM_LAYERS + 1.1), arrowstyle="-|>", mutation_scale=8, color=READ
            )
            axes.add_patch(arrow)
            axes.text(
                position, NUM_LAYERS + 1.45, _shown(position + offset), ha="center", va="center", family="monospace",
                color=READ, weight="bold",
            )  # fmt: skip
    labels = ["text", *(f"layer {row}" for row in range(1, NUM_LAYERS + 1)), "predicted"]
    axes.set_yticks([*range(NUM_LAYERS + 1), NUM_LAYERS + 1.45], labels, color=LINE)
    axes.set(xlim=(-0.6, NUM_POSITIONS - 0.4), ylim=(-0.5, NUM_LAYERS + 1.9), xticks=[])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _shown(position: int) -> str:
    return TEXT[position].replace(" ", "␣")


def weights(field: str, schedule: str, steps: int = 200) -> dict[str, list[float]]:
    """The weight of each scheduled term at `steps + 1` points of training, as a model computes it."""
    targets = 4 if field == "target_schedule" else 1
    fields: dict[str, Any] = {"num_layers": NUM_LAYERS, "num_targets": targets, field: schedule}
    settings = AuxiliaryLossSettings(**fields)
    names = ["target_2", "target_3", "target_4"] if field == "target_schedule" else ["layer_1", "layer_2", "layer_3"]
    points = [settings.weights_at(step / steps, step) for step in range(steps + 1)]
    return {name: [point[name] for point in points] for name in names}


def draw_schedules() -> Figure:
    """The weight of each term against the share of training done, for each schedule."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    schedules = [
        ("intermediate_schedule", "paper"),
        ("intermediate_schedule", "linear"),
        ("intermediate_schedule", "cosine"),
        ("intermediate_schedule", "random"),
        ("intermediate_schedule", "rotate_2"),
        ("target_schedule", "forward"),
    ]
    for axes, (field, schedule) in zip(figure.subplots(2, 3).flat, schedules, strict=True):
        by_step = schedule in ("random", "rotate_2")
        steps = 12 if by_step else 200
        for number, values in enumerate(weights(field, schedule, steps).values()):
            # Each term has a row of its own, since their weights overlap.
            rows = [number + 0.8 * value / max(*values, 1e-9) for value in values]
            x = [step if by_step else step / steps for step in range(steps + 1)]
            axes.fill_between(
                x, number, rows, step="post" if schedule not in ("linear", "cosine") else None, alpha=0.75, color=READ
            )
            axes.axhline(number, color=LINE, linewidth=0.5)
        axes.set_yticks([0.4, 1.4, 2.4], list(weights(field, schedule, 1)))
        axes.set(ylim=(0, 3), xlim=(0, x[-1]))
        axes.set_title(f'{field}="{schedule}"', fontsize=9)
        axes.set_xlabel("optimizer step" if by_step else "share of training done")
        axes.tick_params(axis="y", length=0)
    return figure


def main() -> None:
    for name, draw in (("losses", draw_losses), ("schedules", draw_schedules)):
        draw().savefig(FOLDER / f"{name}.png", dpi=140)


if __name__ == "__main__":
    main()
