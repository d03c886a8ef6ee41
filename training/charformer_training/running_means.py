"""Running sums of loss terms, kept on the device: between two log entries nothing synchronizes with it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor


T = TypeVar("T")


class TrainingTerms:
    """Sums of the loss terms over the optimizer steps since the last log entry.

    A term whose head drops out is present in some steps only, and is averaged over those steps.

    Args:
        state: Sums to continue from, as returned by `state`.
        device: Device of the terms.
    """

    def __init__(self, state: Mapping[str, Any] | None = None, device: torch.device | None = None) -> None:
        # The first two are keyed by the names of terms added together, whose values form one tensor `(len(names),)`.
        # The last two are keyed by a single name.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._first_bad_step: dict[tuple[str, ...], Tensor] = {}
        self._num_steps: dict[str, int] = {}
        self._last_step: dict[str, int] = {}
        if state is not None:
            self._num_steps, self._last_step = dict(state["num_steps"]), dict(state["last_step"])
            for names, values in state["sums"]:
                self._sums[tuple(names)] = torch.tensor(values, device=device)
                self._first_bad_step[tuple(names)] = torch.full((len(values),), float("inf"), device=device)

    def state(self) -> dict[str, Any]:
        """The sums as JSON values, exactly; all terms must be finite."""
        sums = [[list(names), values.tolist()] for names, values in self._sums.items()]
        return {"sums": sums, "num_steps": self._num_steps, "last_step": self._last_step}

    def add(self, step: int, terms: Mapping[str, Tensor], scale: float) -> None:
        """Add one micro-batch's share of each term in optimizer step `step`; a step's shares add up to its value."""
        names = tuple(terms)
        values = torch.stack([value.detach().float() for value in terms.values()]) * scale
        bad_step = torch.where(values.isfinite(), float("inf"), float(step))
        if names in self._sums:
            self._sums[names] += values
            self._first_bad_step[names] = torch.minimum(self._first_bad_step[names], bad_step)
        else:
            self._sums[names], self._first_bad_step[names] = values, bad_step
        for name in names:
            if self._last_step.get(name) != step:
                self._last_step[name] = step
                self._num_steps[name] = self._num_steps.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The mean of each term over its steps and over processes, by name; all processes call this together."""
        totals: dict[str, float] = {}
        for names, sums in self._sums.items():
            for name, value in zip(names, sums.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + value
        own = {name: total / self._num_steps[name] for name, total in totals.items()}
        return {name: sum(values) / len(values) for name, values in _by_name(gather_object([own])).items()}

    def first_not_finite(self) -> tuple[int, list[str]] | None:
        """The first step at which a term was nan or infinite on any process, and the names of these terms."""
        own: dict[str, float] = {}
        for names, steps in self._first_bad_step.items():
            for name, step in zip(names, steps.tolist(), strict=True):
                own[name] = min(step, own.get(name, float("inf")))
        bad = {name: min(steps) for name, steps in _by_name(gather_object([own])).items()}
        first = min(bad.values(), default=float("inf"))
        if first == float("inf"):
            return None
        return int(first), [name for name, step in bad.items() if step == first]


class EvaluationTerms:
    """Sums of the loss terms over an evaluation, each batch weighted by the number of targets it counts."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, count: Tensor | int) -> None:
        # Double precision, since an evaluation may add up millions of characters. MPS does not support it.
        dtype = torch.float32 if value.device.type == "mps" else torch.float64
        count = torch.as_tensor(count, device=value.device)
        total = torch.where(count > 0, value.detach().to(dtype) * count, 0.0)
        entry = torch.stack([total, count.to(dtype)])
        self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def totals(self) -> dict[str, tuple[float, int]]:
        """`(sum, count)` of each term over all processes, by name; all processes call this together.

        A process without a batch adds nothing.
        """
        own = {name: tuple(entry.tolist()) for name, entry in self._sums.items()}
        return {
            name: (sum(total for total, _ in parts), round(sum(count for _, count in parts)))
            for name, parts in _by_name(gather_object([own])).items()
        }


def _by_name(processes: Iterable[Mapping[str, T]]) -> dict[str, list[T]]:
    """The values of each name, from the processes that have it."""
    values: dict[str, list[T]] = {}
    for own in processes:
        for name, value in own.items():
            values.setdefault(name, []).append(value)
    return values


def group_by_layer(terms: Mapping[str, float]) -> dict[str, float]:
    """Replace terms that differ only in the layer number (`layer_1`, `layer_2`, ...) by their mean (`layers`)."""
    groups: dict[str, list[float]] = {}
    for name, value in terms.items():
        groups.setdefault(re.sub(r"^(loss_|gradient_[a-z]+_)?layer_\d+", r"\1layers", name), []).append(value)
    return {name: sum(values) / len(values) for name, values in groups.items()}
