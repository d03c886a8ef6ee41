"""Reads the log of a Trainer: training entries, evaluations, terms of the loss.

A training entry has `loss`, and `loss_<name>` for each term; an evaluation has `eval_loss`. A log history is
`trainer.state.log_history`, or the `log_history` in `trainer_state.json`. Terms are in nats, unweighted.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modeling_charformer.loss_settings import AuxiliaryLossSettings


Entry = Mapping[str, Any]
Curve = tuple[list[int], list[float]]
"""Steps, and the value at each step."""


def is_training(entry: Entry) -> bool:
    """Whether the training loop logged the entry."""
    return "loss" in entry


def is_evaluation(entry: Entry) -> bool:
    """Whether an evaluation logged the entry."""
    return "eval_loss" in entry


def terms(entry: Entry) -> dict[str, float]:
    """The terms of the loss in a training entry, by name (without `loss_`)."""
    return {name.removeprefix("loss_"): value for name, value in entry.items() if name.startswith("loss_")}


def final_terms(log_history: Sequence[Entry]) -> dict[str, tuple[int, float]]:
    """The last logged value of each term of the training loss, as `(step, nats)` by name."""
    last: dict[str, tuple[int, float]] = {}
    for entry in filter(is_training, log_history):
        last |= {name: (int(entry["step"]), value) for name, value in terms(entry).items()}
    return last


def last_evaluation(log_history: Sequence[Entry]) -> dict[str, float]:
    """The figures of the last evaluation, without runtime and rates; empty if there was no evaluation."""
    evaluations = [entry for entry in log_history if is_evaluation(entry)]
    return {
        name: value
        for name, value in (evaluations[-1] if evaluations else {}).items()
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second"))
    }


def term_curves(log_history: Sequence[Entry]) -> dict[str, Curve]:
    """The curve of each term of the training loss, by name."""
    return _curves((entry["step"], terms(entry)) for entry in log_history if is_training(entry))


def curve(log_history: Sequence[Entry], key: str) -> Curve:
    """The curve of one key of the log, such as `loss` or `eval_bpc`; it is empty if the key was never logged."""
    return _curves((entry["step"], {key: entry[key]}) for entry in log_history if key in entry).get(key, ([], []))


def _curves(entries: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for step, figures in entries:
        for name, value in figures.items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return curves


def drop_steps(settings: AuxiliaryLossSettings, max_steps: int) -> dict[int, int]:
    """By intermediate layer, the first step (from 1) without losses of that layer, in a run of `max_steps`.

    Layers whose losses come back, like in a rotating schedule, are left out. In a run of more than 4,000 steps, an
    absence shorter than 1/2000 of the run may be missed.
    """

    def with_losses(step: int) -> set[int]:
        weights = settings.weights_at(step / max_steps, step)
        return {term.layer for term in settings.terms if weights[term.name]}

    stride = max(1, max_steps // 2000)
    dropped: dict[int, int] = {}
    returned: set[int] = set()
    for step in range(0, max_steps, stride):
        active = with_losses(step)
        returned |= active & dropped.keys()
        for layer in set(settings.layers) - active - dropped.keys():
            # The layer drops out at one of the steps since the last step looked at.
            earlier = range(max(0, step - stride + 1), step)
            dropped[layer] = 1 + next((seen for seen in earlier if layer not in with_losses(seen)), step)
    return {layer: dropped[layer] for layer in settings.layers if layer in dropped and layer not in returned}
