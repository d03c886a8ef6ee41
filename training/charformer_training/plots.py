"""Figures of a training run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .history import Curve, Entry, curve, term_curves
from .terminal import one_line


if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = np.ndarray[Any, np.dtype[np.float64]]

PICTURE = "loss_terms.png"
MOST_NAMES = 16
"""The largest number of layers that a figure names."""


def plot_loss_terms(
    log_history: Sequence[Entry],
    drops: Mapping[int, int],
    path: str | Path,
    title: str,
    unit: str | None = None,
) -> None:
    """Draw every term of the loss against steps, unweighted, into a PNG file.

    The upper panel shows the final layer, whose `next_char` is the language-model loss, and the validation loss. The
    lower panel shows the intermediate layers, if there are any, from dark (first) to bright (last). Dotted lines mark
    the steps at which they drop out.

    Args:
        log_history: `trainer.state.log_history`.
        drops: Layer to the step at which its losses drop out, see `history.drop_steps`.
        path: The file to write.
        title: Title of the figure.
        unit: The unit over which the losses are means, such as `"byte"` or `"token"`; `None` leaves it out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A model without terms of its own has its loss alone.
    curves = term_curves(log_history) or {"loss": curve(log_history, "loss")}
    of_layers = {name: points for name, points in curves.items() if name.startswith("layer")}
    of_final = {name: points for name, points in curves.items() if name not in of_layers}
    figure, axes = pyplot.subplots(
        2 if of_layers else 1,
        1,
        figsize=(9, 8.5 if of_layers else 5),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    _draw_final_layer(axes[0, 0], of_final, curve(log_history, "eval_loss"))
    axes[0, 0].set_title(f"{one_line(title)}\nfinal layer", parse_math=False)
    if of_layers:
        _draw_intermediate_layers(axes[1, 0], of_layers, drops)
        axes[1, 0].set_title("intermediate layers (dashed: further targets; dotted: a layer's losses drop out)")
    for axis in axes[:, 0]:
        axis.set_ylabel(f"loss (nats per {unit})" if unit else "loss (nats)")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_final_layer(axis: "Axes", curves: Mapping[str, Curve], validation: Curve) -> None:
    main = "next_char" if "next_char" in curves else "loss"
    for number, (name, points) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": f"C{number}"}
        if name == "last_position":
            style = {"color": "0.6", "linewidth": 1, "zorder": 1}
        axis.plot(*points, label=name, **style)
    if validation[0]:
        axis.plot(*validation, "o", color="C0", markersize=5, markeredgecolor="black", label=f"{main}, validation")
    if axis.has_data():
        axis.legend()


def _draw_intermediate_layers(axis: "Axes", curves: Mapping[str, Curve], drops: Mapping[int, int]) -> None:
    from matplotlib import pyplot

    numbers = {name: int(match[1]) for name in curves if (match := re.match(r"layer_(\d+)", name))}
    deepest = max(numbers.values(), default=1)
    colors = pyplot.get_cmap("viridis")
    labelled = len(curves) <= MOST_NAMES
    for name, points in curves.items():
        axis.plot(
            *points,
            "--" if "target" in name else "-",
            color=colors(0.9 * (numbers.get(name, deepest) - 1) / max(1, deepest - 1)),
            linewidth=1.2,
            label=name if labelled else None,
        )
    for layer, step in drops.items():
        axis.axvline(step, color="0.5", linewidth=0.8, linestyle=":")
        if len(drops) <= MOST_NAMES:
            axis.annotate(
                f"layer {layer} drops out",
                (step, 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(2, 0),
                textcoords="offset points",
                va="top",
                rotation=90,
                fontsize=7,
            )
    if labelled:
        axis.legend(ncols=2, fontsize=8)


def plot_bits_by_position(bits: Mapping[str, Values], path: str | Path) -> None:
    """Draw the result of `evaluation.bits_by_position` into a PNG file: the gain from context and from depth.

    The left panel shows bits per byte by position in the window, for the model and the head of each layer. The right
    panel shows their means by layer.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = {int(name.removeprefix("layer_")): values for name, values in bits.items() if name != "next_char"}
    figure, axes = pyplot.subplots(
        1, 2 if layers else 1, figsize=(11 if layers else 7, 4.5), squeeze=False, layout="constrained"
    )
    left = axes[0, 0]
    colors, deepest = pyplot.get_cmap("viridis"), max(layers, default=0)
    for layer, values in sorted(layers.items()):
        left.plot(_smoothed(values), color=colors(0.9 * layer / (deepest + 1)), linewidth=1, label=f"layer {layer}")
    left.plot(_smoothed(bits["next_char"]), color="black", linewidth=1.5, label="the model")
    left.set_xscale("symlog", linthresh=1)
    left.set(xlabel="bytes of context before the last byte", ylabel="bits per byte", title="Gain from context")
    if len(layers) <= MOST_NAMES:
        left.legend(fontsize=8)
    if layers:
        right = axes[0, 1]
        means = {layer: float(values.mean()) for layer, values in layers.items()}
        means[deepest + 1] = float(bits["next_char"].mean())
        right.plot(*zip(*sorted(means.items()), strict=True), "o-", color="black")
        right.set(
            xlabel="layer (the last is the model)",
            ylabel="bits per byte, mean over the window",
            title="Gain from depth",
        )
        right.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smoothed(values: Values) -> Values:
    """Means over neighbouring positions, at position `p` over `p // 20` to either side, as late positions differ little."""
    sums = np.concatenate([[0.0], values.cumsum()])
    places = np.arange(len(values))
    low, high = places - places // 20, np.minimum(places + places // 20, len(values) - 1) + 1
    means: Values = (sums[high] - sums[low]) / (high - low)
    return means
