"""Pictures of a training run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from modeling_charformer.loss_settings import AuxiliaryLossSettings


PICTURE = "loss_terms.png"


def drop_steps(settings: AuxiliaryLossSettings, max_steps: int) -> dict[int, int]:
    """The first step (from 1) from which on an intermediate layer has no loss, by layer, to 1/2000 of a run.

    Layers that lose and regain theirs, as in rotation, are left out.
    """
    steps: dict[int, int] = {}
    returned = set()
    for step in range(0, max_steps, max(1, max_steps // 2000)):
        weights = settings.weights_at(step / max_steps, step)
        for layer in settings.layers:
            if not any(weights[term.name] for term in settings.terms if term.layer == layer):
                steps.setdefault(layer, step + 1)
            elif layer in steps:
                returned.add(layer)
    return {layer: step for layer, step in steps.items() if layer not in returned}


def plot_loss_terms(
    log_history: Sequence[Mapping[str, float]], drops: Mapping[int, int], path: str | Path, title: str
) -> None:
    """Draw every term of the loss against steps, unweighted, into a PNG file.

    Above: the final layer, whose `next_char` is the language-model loss, with the validation loss. Below, if there
    are any: the intermediate layers, from dark (first) to bright (last), with the steps at which they drop out marked.

    Args:
        log_history: `trainer.state.log_history`.
        drops: Layer to the step at which its losses drop out, see `drop_steps`.
        path: File to write.
        title: What the run is.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A model without terms of its own has its loss alone.
    curves = _curves(log_history, "loss_", marker="loss") or _curves(log_history, "loss", marker="loss")
    validation = _curves(log_history, "eval_loss", marker="eval_loss").get("eval_loss")
    main = "next_char" if "next_char" in curves else "loss"
    of_layers = {name: curve for name, curve in curves.items() if name.startswith("layer")}
    of_final = {name: curve for name, curve in curves.items() if name not in of_layers}

    figure, axes = pyplot.subplots(
        2 if of_layers else 1,
        1,
        figsize=(9, 8.5 if of_layers else 5),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    top = axes[0, 0]
    for number, (name, (steps, values)) in enumerate(of_final.items()):
        style = {"color": "0.6", "linewidth": 1, "zorder": 1} if name == "last_position" else {"color": f"C{number}"}
        top.plot(steps, values, label=name, **style)
    if validation:
        top.plot(*validation, "o", color="C0", markersize=5, markeredgecolor="black", label=f"{main}, validation")
    top.set_title(f"{title}\nfinal layer")
    if top.has_data():
        top.legend()

    if of_layers:
        bottom = axes[1, 0]
        numbers = {name: int(match[1]) for name in of_layers if (match := re.match(r"layer_(\d+)", name))}
        colors = pyplot.get_cmap("viridis")
        deepest = max(numbers.values(), default=1)
        labelled = len(of_layers) <= 16
        for name, (steps, values) in of_layers.items():
            color = colors(0.9 * (numbers.get(name, deepest) - 1) / max(1, deepest - 1))
            line = "--" if "target" in name else "-"
            bottom.plot(steps, values, line, color=color, linewidth=1.2, label=name if labelled else None)
        for layer, step in drops.items():
            bottom.axvline(step, color="0.5", linewidth=0.8, linestyle=":")
            if len(drops) <= 16:
                bottom.annotate(
                    f"layer {layer} drops out",
                    (step, 0.98),
                    xycoords=("data", "axes fraction"),
                    xytext=(2, 0),
                    textcoords="offset points",
                    va="top",
                    rotation=90,
                    fontsize=7,
                )
        bottom.set_title("intermediate layers (dashed: further targets; dotted: a layer's losses drop out)")
        if labelled:
            bottom.legend(ncols=2, fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("loss (nats per character)")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_bits_by_position(bits: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Draw what context and what depth buy, `evaluation.bits_by_position`, into a PNG file.

    Left: bits per byte by position in the window, for the model and each layer's classifier. Right: their means by layer.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = {int(name.removeprefix("layer_")): curve for name, curve in bits.items() if name != "next_char"}
    figure, axes = pyplot.subplots(
        1, 2 if layers else 1, figsize=(11 if layers else 7, 4.5), squeeze=False, layout="constrained"
    )
    left = axes[0, 0]
    colors, deepest = pyplot.get_cmap("viridis"), max(layers, default=0)
    for layer, curve in sorted(layers.items()):
        left.plot(_smoothed(curve), color=colors(0.9 * layer / (deepest + 1)), linewidth=1, label=f"layer {layer}")
    left.plot(_smoothed(bits["next_char"]), color="black", linewidth=1.5, label="the model")
    left.set_xscale("symlog", linthresh=1)
    left.set(
        xlabel="bytes seen before in the window, besides the last", ylabel="bits per byte", title="What context buys"
    )
    if len(layers) <= 16:
        left.legend(fontsize=8)
    if layers:
        right = axes[0, 1]
        means = {layer: float(curve.mean()) for layer, curve in layers.items()}
        means[deepest + 1] = float(bits["next_char"].mean())
        right.plot(*zip(*sorted(means.items()), strict=True), "o-", color="black")
        right.set(
            xlabel="layer (the last: the model)", ylabel="bits per byte, mean of the window", title="What depth buys"
        )
        right.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smoothed(curve: np.ndarray) -> np.ndarray:
    """Means over a twentieth of the way to either side: far positions are alike, near ones are not."""
    sums = np.concatenate([[0.0], curve.cumsum()])
    places = np.arange(len(curve))
    low, high = places - places // 20, np.minimum(places + places // 20, len(curve) - 1) + 1
    return (sums[high] - sums[low]) / (high - low)


def _curves(
    log_history: Sequence[Mapping[str, float]], prefix: str, *, marker: str
) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for entry in log_history:
        if marker in entry:
            for name, value in entry.items():
                if name.startswith(prefix):
                    steps, values = curves.setdefault(name.removeprefix("loss_"), ([], []))
                    steps.append(entry["step"])
                    values.append(value)
    return curves
