"""Pictures of the parts, and a table of the main figures."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .report import read, write_whole


# Those of `benchmarks/generate.py`.
DECODINGS = ("greedy", "temperature 0.7", "temperature 1")


def draw(folder: Path) -> None:
    """Draw what the parts in `folder` have measured so far, each picture into `NAME.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, picture in PICTURES.items():
        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        try:
            if picture(axes, folder):
                content = io.BytesIO()
                figure.savefig(content, format="png", dpi=130)
                write_whole(folder / f"{name}.png", content.getvalue())
        finally:
            pyplot.close(figure)


def _results(folder: Path, part: str) -> dict[str, Any]:
    results: dict[str, Any] = read(folder / f"{part}.json").get("results", {})
    return results


def _device(folder: Path, part: str) -> str:
    return str(read(folder / f"{part}.json").get("device", ""))


def _bars(axes: Any, values: Mapping[str, float], labels: Iterable[str], title: str, unit: str) -> bool:
    bars = axes.barh([*values], [*values.values()])
    axes.bar_label(bars, [*labels], padding=3)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit, xlim=(0, 1.3 * max(values.values(), default=1)))
    axes.spines[["top", "right"]].set_visible(False)
    return bool(values)


def _training_step(axes: Any, folder: Path) -> bool:
    results = _results(folder, "training_step")
    steps = {
        name: results[name]
        for name in sorted(results, key=lambda name: name.split(",")[0], reverse=True)  # T64, then T12
        if isinstance(results[name], dict) and "seconds" in results[name]
    }
    shares = {name: value.get("of_matrix_multiply_rate") for name, value in steps.items()}
    labels = [
        f"{1000 * steps[name]['seconds']:.1f}" + (f" ({share:.0%} of the matrix product's rate)" if share else "")
        for name, share in shares.items()
    ]
    milliseconds = {name: 1000 * value["seconds"] for name, value in steps.items()}
    title = f"A training step in bf16, batch 64, {_device(folder, 'training_step')}"
    return _bars(axes, milliseconds, labels, title, "milliseconds")


def _shakespeare(axes: Any, folder: Path) -> bool:
    drawn = False
    for part, label in (("shakespeare", "with the paper's losses"), ("shakespeare_without_losses", "without")):
        points = _results(folder, part).get("steps, seconds, validation loss", [])
        if points:
            steps, _, losses = zip(*points, strict=True)
            axes.plot(steps, losses, marker=".", label=f"{label}: {min(losses):.4f} at best")
            drawn = True
    axes.axhline(1.4697, color="gray", linestyle="--", label="nanoGPT: 1.4697")
    axes.set(title="Tiny Shakespeare at nanoGPT's GPU setting", xlabel="step", ylabel="validation loss, nats")
    axes.legend()
    return drawn


def _drafting(axes: Any, folder: Path) -> bool:
    results = _results(folder, "drafting")
    speeds = {
        f"{decoding}: {way}": figures["speed_ratio"]
        for name in DECODINGS
        for decoding, ways in results.get(name, {}).items()
        for way, figures in ways.items()
        if way != "plain"
    }
    labels = [f"{value:.2f} x" for value in speeds.values()]
    title = f"Speed of generation beside plain generation, {_device(folder, 'drafting')}"
    return _bars(axes, speeds, labels, title, "ratio")


def _vocabulary(axes: Any, folder: Path) -> bool:
    ratios: dict[str, float] = _results(folder, "vocabulary").get("ratios of seconds", {})
    labels = [f"{value:.2f} x" for value in ratios.values()]
    title = f"GPT-2 with auxiliary losses: time of a step, {_device(folder, 'vocabulary')}"
    return _bars(axes, ratios, labels, title, "ratio to GPT-2 without")


PICTURES: dict[str, Callable[[Any, Path], bool]] = {
    "training_step": _training_step,
    "shakespeare": _shakespeare,
    "drafting": _drafting,
    "vocabulary": _vocabulary,
}


def table(folder: Path, names: Iterable[str]) -> str:
    """All figures of the parts as Markdown, and what failed."""
    lines = ["# On a GPU", "", "Measured by `python -m benchmarks.gpu`; times are medians of one run.", ""]
    for name in names:
        report = read(folder / f"{name}.json")
        heading = f"## {name.replace('_', ' ')}: {report.get('status', 'not run')}"
        machine = ", ".join(str(report[key]) for key in ("device", "torch", "transformers") if key in report)
        lines += [heading, "", f"{machine}; {report.get('seconds', 0)} s", "", "| What | Figure |", "| --- | --- |"]
        lines += [f"| {what} | {_shown(value)} |" for what, value in _flat(report.get("results", {}))]
        lines += [f"| {what} | **failed**: {_shown(error)} |" for what, error in report.get("errors", {}).items()]
        lines.append("")
    return "\n".join(lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}: ")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return f"{len(value)} points"
    return str(value).strip().split("\n")[-1].replace("|", "\\|")
