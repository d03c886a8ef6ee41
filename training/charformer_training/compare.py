"""`charformer-compare RUN RUN ... [--output PICTURE.png]`: learning curves and a table of several training runs."""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_charformer.loss_settings import LossFields

from .checks import checked_path
from .history import Curve, Entry, curve, is_training, term_curves, terms
from .manifest import MANIFEST
from .pushing import RESULT
from .running_means import group_by_layer
from .terminal import USER_ERRORS, error_message, one_line, use_safe_streams


if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE_FILE = "trainer_state.json"
EVALUATIONS = ("eval_bpc", "eval_loss")
MOST_TERMS = 9
"""With more common terms than this, terms that differ only in the layer are shown as their mean."""
# Fields of a configuration that change neither the model nor its training.
UNIMPORTANT = ("architectures", "auto_map", "dtype", "transformers_version", "use_cache")
_SCHEDULES = ("target_schedule", "intermediate_schedule", "classifier_schedule")
# Of these schedules, the length of the run changes nothing.
_OF_ANY_LENGTH = ("constant", "random", "rotate_2", "rotate_4", "rotate_8")
# Settings that say which terms there are: with the number of layers, all of targets, layers and the last position.
_OF_TERMS = {field.name for field in dataclasses.fields(LossFields)} | {"auxiliary_losses"}
_OF_LOSSES = _OF_TERMS | {
    "classifier_layers",
    "classifier_schedule",
    "classifier_weight",
    "label_smoothing_factor",
}
_DEPTHS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers"}
_LONGEST = 60
"""Characters of a value in the table."""
_UNKNOWN, _ABSENT = object(), object()


@dataclass(frozen=True)
class Run:
    """A training run, as read from its folder."""

    name: str
    log: list[Entry]
    step: int
    """Optimizer steps done."""
    max_steps: int
    settings: dict[str, Any]
    """The model's configuration, and the known settings of training and data, by name. What is not known is absent."""


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read the run in an output folder, from the folder or its newest checkpoint, or in the folder of a checkpoint.

    Raises:
        ValueError: If the folder does not exist, holds no run, or holds a file that cannot be read.
    """
    name, path = one_line(folder), checked_path("RUN", os.fspath(folder))
    if not path.is_dir():
        raise ValueError(f"{name} is not the folder of a run" if path.exists() else f"there is no folder {name}")
    states = [path / STATE_FILE] if (path / STATE_FILE).is_file() else sorted(path.glob(f"checkpoint-*/{STATE_FILE}"))
    if not states:
        raise ValueError(f"{name} holds no run: neither it nor a checkpoint in it has a {STATE_FILE}")
    read = {state.parent: _read_json(state) for state in states}
    newest = max(read, key=lambda folder: _whole(read[folder], "global_step"))
    state = read[newest]
    log = state.get("log_history")
    if not isinstance(log, list) or not all(map(_is_entry, log)):
        raise ValueError(f"{name}: the log_history of its {STATE_FILE} is not that of a Trainer")
    if not any(map(is_training, log)):
        raise ValueError(f"{name} has logged no loss yet (logging_steps={one_line(state.get('logging_steps'))})")
    return Run(name, log, _whole(state, "global_step"), _whole(state, "max_steps"), _settings(newest, state, log))


def _is_entry(entry: Any) -> bool:
    """Whether `entry` is a mapping with a step whose losses are numbers."""
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int) or not 0 <= entry["step"] < 2**53:
        return False
    used = [value for name, value in entry.items() if "loss" in name or name in (*EVALUATIONS, "learning_rate")]
    return all(isinstance(value, float) or isinstance(value, int) and abs(value) < 2**53 for value in used)


def _whole(state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    return value if isinstance(value, int) else 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{one_line(path)} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{one_line(path)} holds no JSON object")
    return content


def _settings(folder: Path, state: Mapping[str, Any], log: Sequence[Entry]) -> dict[str, Any]:
    """All that was saved of the settings: what resuming compares, else the model's configuration and a few facts."""
    saved = [_saved(folder / name).get("settings") for name in (RESULT, MANIFEST)]
    own = next((settings for settings in saved if isinstance(settings, dict)), {})
    rates = curve(log, "learning_rate")[1]
    results = _saved(folder / "metrics.json")
    facts = {
        "data": results.get("data"),
        "per_device_train_batch_size": state.get("train_batch_size"),
        # It depends on `logging_steps`, and is of use only if the setting was not saved.
        "highest learning rate logged": max(rates) if rates and "learning_rate" not in own else None,
    }
    splits = results.get("splits")
    for split, content in splits.items() if isinstance(splits, dict) else ():
        if isinstance(content, list) and len(content) == 2 and isinstance(content[0], int):
            # The saved setting is the part of the validation split that is evaluated (`max_eval_bytes`).
            name = "validation split" if split == "validation" else f"{split}_data"
            facts[name] = f"sha256 {content[1]}, {content[0]:,} bytes"
    # A field of the configuration that is null has a value (`--intermediate_layers none`); a fact that is null is unknown.
    known = {name: value for name, value in facts.items() if value is not None}
    settings = known | _saved(folder / "config.json") | own
    unknown = {name for name, value in settings.items() if name.endswith("_data") and value is None}
    return {name: value for name, value in settings.items() if name not in UNIMPORTANT and name not in unknown}


def _saved(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def figures(runs: Sequence[Run]) -> dict[str, list[Curve]]:
    """A curve per run for each figure that all runs have: the evaluation, the loss if it can be compared, its terms."""
    keys = EVALUATIONS if why_losses_differ(runs) else (*EVALUATIONS, "loss")
    found = {key: [curve(run.log, key) for run in runs] for key in keys}
    found = {key: curves for key, curves in found.items() if all(steps for steps, _ in curves)}
    if "eval_bpc" in found:
        found.pop("eval_loss")  # the same figure in another unit
    names = _common_terms([run.log for run in runs])
    logs = [run.log for run in runs]
    if len(names) > MOST_TERMS:
        logs = [[_grouped(entry, names) for entry in log] for log in logs]
        names = _common_terms(logs)
    by_run = [term_curves(log) for log in logs]
    return found | {name: [curves[name] for curves in by_run] for name in names}


def _common_terms(logs: Sequence[Sequence[Entry]]) -> list[str]:
    by_run = [term_curves(log) for log in logs]
    return sorted((name for name in by_run[0] if all(name in curves for curves in by_run)), key=_place)


def _place(name: str) -> tuple[int, list[int]]:
    """Sort key: the main term first, then further targets, then layer by layer, then `last_position`."""
    kinds = ("target", "layer", "last_position")
    kind = next((number for number, kind in enumerate(kinds, 1) if name.startswith(kind)), 0)
    return kind, [int(number) for number in re.findall(r"\d+", name)]


def _grouped(entry: Entry, names: Sequence[str]) -> Entry:
    if not is_training(entry):
        return entry
    of_all = {name: value for name, value in terms(entry).items() if name in names}
    means = {f"loss_{name}": value for name, value in group_by_layer(of_all).items()}
    return {**{name: value for name, value in entry.items() if not name.startswith("loss_")}, **means}


def table(runs: Sequence[Run]) -> str:
    """A table with a column per run: figures, steps, and the settings in which the runs differ.

    A figure is the last one logged, with the best one in parentheses. A setting that only one run knows is left out.
    """
    rows = [["last (best at step)", *(run.name for run in runs)]]
    rows.append(["steps", *(f"{run.step:,} of {run.max_steps:,}" for run in runs)])
    rows += [[one_line(name), *map(_last_and_best, curves)] for name, curves in figures(runs).items()]
    if found := remarks(runs):
        rows += [[], *([remark] for remark in found)]
    differing = [row for name in differing_settings(runs) for row in _setting_rows(name, runs)]
    rows += [[], ["Settings that differ:" if differing else "Settings that differ: none known"], *differing]
    widths = [max((len(row[column]) for row in rows if len(row) > 1), default=0) for column in range(len(runs) + 1)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows)
    return "\n".join(lines)


def _last_and_best(points: Curve) -> str:
    step, best = min(zip(*points, strict=True), key=lambda point: (math.isnan(point[1]), point[1]))
    return f"{_figure(points[1][-1])} ({_figure(best)} at {step:,})"


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The names of the settings in which runs differ that know them."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if _differ([run.settings[name] for run in runs if name in run.settings])]


def _differ(values: Sequence[Any]) -> bool:
    # As text, since 1 is True in Python; but 1 and 1.0 are the same number, at any depth.
    same_numbers = (json.loads(json.dumps(value), parse_float=_number) for value in values)
    return len({json.dumps(value, sort_keys=True) for value in same_numbers}) > 1


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _setting_rows(name: str, runs: Sequence[Run]) -> list[list[str]]:
    """A row for a setting, or a row for each key in which mappings differ."""
    values = [run.settings.get(name, _UNKNOWN) for run in runs]
    known = [value for value in values if value is not _UNKNOWN]
    if not all(isinstance(value, dict) for value in known):
        return [[one_line(name), *_shown(values)]]
    rows = []
    for key in sorted({key for value in known for key in value}):
        parts = [value if value is _UNKNOWN else value.get(key, _ABSENT) for value in values]
        if _differ([None if part is _ABSENT else [part] for part in parts if part is not _UNKNOWN]):
            rows.append([one_line(f"{name}.{key}"), *_shown(parts)])
    return rows


def _shown(values: Sequence[Any]) -> list[str]:
    """Values for the table, cut to the part in which they differ if they are long."""
    texts = [_text(value) for value in values]
    known = {text for text in texts if text != "-"}
    start = len(os.path.commonprefix([*known])) if len(known) > 1 else 0
    if start > _LONGEST // 2 and max(map(len, texts)) > _LONGEST:
        texts = [text if text == "-" else f"...{text[start - 10 :]}" for text in texts]
    return [one_line(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...") for text in texts]


def _text(value: Any) -> str:
    if value is _UNKNOWN or value is _ABSENT:
        return "-"
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", text)  # the beginning of a checksum tells two apart


def remarks(runs: Sequence[Run]) -> list[str]:
    """What cannot be compared in these runs, and why."""
    differing, found = differing_settings(runs), []
    if why := why_losses_differ(runs):
        found.append(f"loss is left out, because {one_line(why)}")
    if "validation_data" in differing or "validation split" in differing:
        found.append("The validation texts differ, so figures of evaluations cannot be compared.")
    if "vocab_size" in differing:
        found.append("The vocabularies differ, so losses in nats per token cannot be compared.")
    return found


def why_losses_differ(runs: Sequence[Run]) -> str:
    """Why `loss`, the weighted sum, may be another figure in each run; empty if it is the same.

    Settings of losses decide where all runs have them, since logs of the same losses can have other terms: their names
    depend on `log_loss_terms`, and a schedule can bring a term in late. Terms that the model adds are known by name only.
    """
    by_run = [term_curves(run.log) for run in runs]
    names = [name for curves in by_run for name in curves]
    changing = any(map(_has_schedule, runs))
    listed = all(isinstance(_loss_settings(run).get("intermediate_layers"), list) for run in runs)
    by_depth = any(_place(name)[0] == 2 for name in names) and (changing or not listed)
    of_losses = _OF_LOSSES | (_DEPTHS if by_depth else set())
    differing = [name for name in differing_settings(runs) if name in of_losses]
    if changing and len({run.max_steps for run in runs}) > 1:
        differing.append("max_steps")
    if differing:
        return f"the runs weigh their terms differently: {_some(differing)} differ"
    # `auxiliary_losses` is null in a Charformer, and in another model without such losses, whose other fields are absent.
    fields = {frozenset(_OF_TERMS & {name for name in run.settings if _is_given(run, name)}) for run in runs}
    known = len(fields) == 1 and frozenset() not in fields
    of_some = {name for name in names if names.count(name) < len(runs) and not (known and _place(name)[0])}
    if not of_some:
        return ""
    unknown = "" if known else ", and their settings do not say why"
    return f"the runs may not add up the same terms: not all have logged {_some(sorted(of_some, key=_place))}{unknown}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _is_given(run: Run, name: str) -> bool:
    return name != "auxiliary_losses" or run.settings[name] is not None


def _loss_settings(run: Run) -> dict[str, Any]:
    """The settings, with those of losses that were added to a model beside the others."""
    added = run.settings.get("auxiliary_losses")
    return run.settings | (added if isinstance(added, dict) else {})


def _has_schedule(run: Run) -> bool:
    """Whether the weights of terms change during the run, at steps that depend on its length."""
    settings = _loss_settings(run)
    changing = [name for name in _SCHEDULES if settings.get(name, "constant") not in _OF_ANY_LENGTH]
    return bool(changing) and any(_place(name)[0] in (1, 2) for name in term_curves(run.log))


def draw(runs: Sequence[Run]) -> "Figure":
    """A figure with a panel for each of `figures`: the curves of all runs against steps."""
    from matplotlib.figure import Figure

    panels = figures(runs)
    unit = "nats per byte" if all(curve(run.log, "eval_bpb")[0] for run in runs) else "nats"
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * height + 0.25 * len(runs)), layout="constrained")
    axes = list(figure.subplots(height, columns, squeeze=False, sharex=True).flat)
    for axis, (name, curves) in zip(axes, panels.items(), strict=False):
        for number, points in enumerate(curves):
            marker = "o" if name in EVALUATIONS else "."
            axis.plot(*points, color=f"C{number % 10}", marker=marker, markersize=3, linewidth=1.2)
        title = "loss (the weighted sum of its terms)" if name == "loss" else one_line(name)
        axis.set_title(title, parse_math=False)
        axis.set(xlabel="step", ylabel="bits per character" if name == "eval_bpc" else unit)
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.remove()
    legend = figure.legend(figure.axes[0].lines, [run.name for run in runs], loc="outside lower center", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write a figure to a PNG file; a file that is there is replaced only by a complete one.

    Raises:
        OSError: If it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        figure.savefig(Path(folder) / "picture.png", dpi=120)
        os.replace(Path(folder) / "picture.png", path)


def main(argv: Sequence[str] | None = None) -> int:
    """The console program; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="charformer-compare",
        description="Draws the learning curves of several training runs in one figure and prints a table of their results.",
        epilog="Example: charformer-compare runs/with-losses runs/without --output losses.png",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run, finished or not; two or more")
    parser.add_argument(
        "--output", type=Path, default=Path("comparison.png"), help="PNG file to write (comparison.png)"
    )
    use_safe_streams()
    arguments = parser.parse_args(argv)
    try:
        if len({os.path.realpath(checked_path("RUN", run)) for run in arguments.runs}) < max(2, len(arguments.runs)):
            raise ValueError("give two or more different runs")
        checked_path("--output", str(arguments.output))
        replaced = not arguments.output.exists() or arguments.output.is_file()
        if arguments.output.suffix != ".png" or not replaced or not arguments.output.parent.is_dir():
            raise ValueError(f"--output is {one_line(arguments.output)}; give a PNG file in a folder that exists")
        runs = [read_run(run) for run in arguments.runs]
        print(table(runs))
        if not figures(runs):
            print("\nNo picture is drawn: the runs have logged no figure that can be compared.")
            return 0
        save(draw(runs), arguments.output)
    except USER_ERRORS as error:
        print(f"charformer-compare: error: {error_message(error)}", file=sys.stderr)
        return 1
    print(f"\nLearning curves: {one_line(arguments.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
