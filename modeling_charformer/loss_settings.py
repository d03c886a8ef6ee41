"""The terms of the loss and their weights in the course of training: schedules, terms, settings.

Everything here is a pure function of Python numbers. Weights therefore need no device synchronisation, and a head whose
weight is 0 is not run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class ScheduleContext(NamedTuple):
    """The argument of a schedule: a term of the loss, and the progress of training."""

    layer: int
    """The layer (1..num_layers) that the term's classifier reads."""
    offset: int
    """How many steps ahead its target is (1..num_targets)."""
    num_layers: int
    num_targets: int
    layers: tuple[int, ...]
    """The intermediate layers that carry losses."""
    progress: float
    """Share of training done, 0 to 1."""
    step: int
    """Optimizer steps done."""


Schedule = Callable[[ScheduleContext], float]
"""Returns the factor, 0 or more, on the weight of a term."""


def paper_schedule(at: ScheduleContext) -> float:
    """1 until `layer / (2 * num_layers)` of training is done, then 0: the first layer drops out first (paper, section 3)."""
    return 1.0 if at.progress * 2 * at.num_layers < at.layer else 0.0


def constant_schedule(at: ScheduleContext) -> float:
    """1 throughout."""
    return 1.0


def linear_schedule(at: ScheduleContext) -> float:
    """From 1 down a straight line to 0 at the point where the paper's schedule drops the layer."""
    return max(0.0, 1.0 - at.progress * 2 * at.num_layers / at.layer)


def cosine_schedule(at: ScheduleContext) -> float:
    """From 1 down half a cosine to 0 at the point where the paper's schedule drops the layer."""
    return (1.0 + math.cos(math.pi * min(1.0, at.progress * 2 * at.num_layers / at.layer))) / 2


def forward_schedule(at: ScheduleContext) -> float:
    """Targets come in one after the other: the `k`-th when `(k - 1) / (2 * num_targets)` of training is done, to stay.

    The forward curriculum of Aynetdinov and Akbik (2025, arXiv 2505.22757).
    """
    return 1.0 if at.progress * 2 * at.num_targets >= at.offset - 1 else 0.0


def random_schedule(at: ScheduleContext) -> float:
    """1 for one random intermediate layer and 0 for the others. The step's number alone determines which."""
    _check_chooses("random", at)
    # Integer arithmetic is random enough here, and torch.compile can trace it.
    draw = (at.step * 7919 + 104_729) % 65_537
    draw = (draw * draw + 12_345) % 65_521
    return 1.0 if at.layers[draw % len(at.layers)] == at.layer else 0.0


def rotating_schedule(interval: int) -> Schedule:
    """1 for each `interval`-th of the intermediate layers, another set at each step; LayerSkip's rotational curriculum.

    Elhoushi et al. (2024, arXiv 2404.16710), section 4.1.2.
    """

    def rotate(at: ScheduleContext) -> float:
        _check_chooses(f"rotate_{interval}", at)
        return 1.0 if (at.layers.index(at.layer) - at.step) % interval == 0 else 0.0

    return _choosing(rotate)


def _choosing(schedule: Schedule) -> Schedule:
    """Mark a schedule that chooses among the intermediate layers, and so never chooses the final layer's targets."""
    schedule.chooses_layers = True  # type: ignore[attr-defined]  # a mark on the function
    return schedule


def _chooses_layers(name: str) -> bool:
    return getattr(_SCHEDULES.get(name), "chooses_layers", False)


def _check_chooses(name: str, at: ScheduleContext) -> None:
    if at.layer not in at.layers:
        raise ValueError(
            f"schedule {name!r} chooses among the layers {list(at.layers)}; layer {at.layer} is none of them"
        )


_SCHEDULES: dict[str, Schedule] = {
    "paper": paper_schedule,
    "constant": constant_schedule,
    "linear": linear_schedule,
    "cosine": cosine_schedule,
    "forward": forward_schedule,
    "random": _choosing(random_schedule),
    "rotate_2": rotating_schedule(2),
    "rotate_4": rotating_schedule(4),
    "rotate_8": rotating_schedule(8),
}


def register_schedule(name: str, schedule: Schedule) -> None:
    """Make `schedule` available as `intermediate_schedule=name` and `target_schedule=name`.

    A process that loads a model saved with such a name registers it first.

    Raises:
        ValueError: If `name` is taken already by another function.
    """
    if _SCHEDULES.get(name, schedule) is not schedule:
        raise ValueError(
            f"a schedule named {name!r} is registered already; choose a name other than {schedule_names()}"
        )
    _SCHEDULES[name] = schedule


def schedule_names() -> list[str]:
    """The accepted values of `intermediate_schedule` and `target_schedule`."""
    return sorted(_SCHEDULES)


def scheduled(schedule: str, at: ScheduleContext) -> float:
    """The factor of the schedule of that name.

    Raises:
        ValueError: If it is not known, or returns a value that is negative or not finite.
    """
    if schedule not in _SCHEDULES:
        raise ValueError(_unknown_schedule("schedule", schedule))
    factor = _SCHEDULES[schedule](at)
    if not (math.isfinite(factor) and factor >= 0.0):
        raise ValueError(
            f"schedule {schedule!r} returned {factor} for layer {at.layer} of {at.num_layers} and target {at.offset} at"
            f" training_progress {at.progress}; a schedule returns a finite number that is 0 or more"
        )
    return factor


def _unknown_schedule(field: str, name: str) -> str:
    return (
        f"{field} is {name!r}; known schedules: {schedule_names()}. A schedule of your own is made known with"
        " modeling_charformer.register_schedule(name, function)"
    )


class LossTerm(NamedTuple):
    """One term of the loss: a head on the output of `layer` (1..n) that predicts `offset` (1..K) steps ahead."""

    name: str
    layer: int
    offset: int
    weight: float
    """The weight before the schedules apply."""
    is_main: bool
    """Whether the model's main head predicts it, so that it needs no auxiliary head."""
    positions: str = "all"
    """The positions that count: `"all"`, or the `"last"` one of each row that has a target."""


LAST_POSITION = "last_position"


def term_name(layer: int, offset: int, num_layers: int, main: str = "next_char") -> str:
    """`main`, `target_2`, ... for the final layer; `layer_3`, `layer_3_target_2`, ... for the others."""
    if layer == num_layers:
        return main if offset == 1 else f"target_{offset}"
    return f"layer_{layer}" if offset == 1 else f"layer_{layer}_target_{offset}"


@dataclass
class LossFields:
    """The fields that say how a language model is trained; `CharformerConfig` has them too. The defaults are the paper's.

    Args:
        num_targets: Number of symbols predicted at each position, `K`; 1 is only the next.
        target_weights: Weights of targets 2..K; `None` is the paper's 0.5 each.
        target_schedule: How they change in training: `"constant"`, `"forward"` (targets come in one after the other),
            or another of `modeling_charformer.schedule_names()`.
        intermediate_layers: Layers with auxiliary losses: `"all"`, a list of numbers in 1..n-1, or `None`.
        intermediate_weight: Factor on the losses of all intermediate layers; the paper's is 1.
        intermediate_schedule: How that factor changes in training: `"paper"`, `"constant"`, `"linear"`, `"cosine"`,
            `"random"`, `"rotate_2"`, `"rotate_4"`, `"rotate_8"`, or a name given to `register_schedule`. With `"paper"`
            layer `l` of `n` drops out when `l / (2n)` of training is done. `"random"` takes one layer a step; the
            rotations take every second, fourth or eighth layer.
        position_loss: `"all"`: every position of the window counts equally; `"last"`: only the last one counts.
        position_share: Share of the positions on which training computes each auxiliary term, above 0 to 1 (all). They are
            drawn anew for each step and term. Expected values and gradients stay the same; the cost falls with the share.
        term_weights: Weights of terms by name (`{"target_2": 0.4, "layer_1": 0.8}`), in place of those that follow from
            the fields above; before the schedules apply.
        loss_weighting: `"fixed"`, or `"uncertainty"`: training also learns a factor for each term from the term's
            homoscedastic uncertainty (Kendall et al. 2018, arXiv 1705.07115).
        distillation: Weight, relative to its term's, at which each auxiliary head also learns from the distribution of
            the model's own head. 0 turns this off; with 1 it weighs as much as the text. See `distillation.py`.
    """

    num_targets: int = 2
    target_weights: list[float | int] | tuple[float | int, ...] | None = None
    target_schedule: str = "constant"
    intermediate_layers: str | list[int] | tuple[int, ...] | None = "all"
    intermediate_weight: float | int = 1.0
    intermediate_schedule: str = "paper"
    position_loss: str = "all"
    position_share: float | int = 1.0
    term_weights: dict[str, float | int] | None = None
    loss_weighting: str = "fixed"
    distillation: float | int = 0.0


@dataclass(kw_only=True)
class AuxiliaryLossSettings(LossFields):
    """The losses that a model is trained with: the fields of `LossFields`, and what the model determines.

    Args:
        num_layers: Number of layers `n` of the model.
        main: Name of the main term.
        has_last_position: Whether the model predicts at every position, so that there is a term `last_position`.
        prefix: Prefix of the names of the intermediate layers' fields in messages: `intermediate_layers`, ...

    Raises:
        ValueError: If a value is not accepted; the message names the field, the value and what is accepted.
    """

    num_layers: int
    main: str = "next_char"
    has_last_position: bool = True
    prefix: str = field(default="intermediate", compare=False)

    def __post_init__(self) -> None:
        self._check_types()
        if self.num_targets < 1:
            raise ValueError(f"num_targets is {self.num_targets}; it must be 1 or more")
        if self.target_weights is not None:
            if len(self.target_weights) != self.num_targets - 1:
                raise ValueError(
                    f"target_weights has {len(self.target_weights)} entries ({list(self.target_weights)}); with"
                    f" num_targets={self.num_targets} it needs {self.num_targets - 1}: one for each target from 2 on"
                )
            for weight in self.target_weights:
                _check_weight("target_weights contains", weight)
        _check_weight(f"{self.prefix}_weight is", self.intermediate_weight)
        self._check_intermediate_layers()
        self._check_schedules()
        if self.position_loss not in ("all", "last"):
            raise ValueError(f"position_loss is {self.position_loss!r}; it must be 'all' or 'last'")
        _check_position_share(self.position_share, self.position_loss)
        if self.loss_weighting not in ("fixed", "uncertainty"):
            raise ValueError(f"loss_weighting is {self.loss_weighting!r}; it must be 'fixed' or 'uncertainty'")
        self._check_distillation()
        names = [term.name for term in self.terms]
        for name, weight in (self.term_weights or {}).items():
            if name not in names:
                raise ValueError(f"term_weights names {name!r}; the terms of this model are {names}")
            _check_weight(f"term_weights[{name!r}] is", weight)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "position_share":
            # As a text, because torch.compile takes a number that differs between two models for one that varies.
            self.position_share_text = repr(value)

    def _check_types(self) -> None:
        layers = self.intermediate_layers
        if type(self.num_targets) is not int:
            raise ValueError(f"num_targets is {self.num_targets!r}; it must be a whole number, 1 or more")
        if not isinstance(self.target_weights, list | tuple | None):
            raise ValueError(f"target_weights is {self.target_weights!r}; it must be a list of weights, or None")
        if not isinstance(self.term_weights, dict | None):
            raise ValueError(
                f"term_weights is {self.term_weights!r}; it must be a mapping of terms to weights, or None"
            )
        if not isinstance(layers, str | list | tuple | None):
            raise ValueError(f"{self.prefix}_layers is {layers!r}; it must be 'all', a list of layer numbers, or None")
        if wrong := [layer for layer in layers or () if type(layer) is not int and not isinstance(layers, str)]:
            raise ValueError(f"{self.prefix}_layers contains {wrong}; layers are whole numbers")

    def _check_schedules(self) -> None:
        fields = {"target_schedule": self.target_schedule, f"{self.prefix}_schedule": self.intermediate_schedule}
        for name, schedule in fields.items():
            if not isinstance(schedule, str) or schedule not in _SCHEDULES:
                raise ValueError(_unknown_schedule(name, schedule))
        if _chooses_layers(self.target_schedule):
            raise ValueError(
                f"target_schedule is {self.target_schedule!r}, which chooses among the intermediate layers and would never"
                " train the final layer's targets; give it as intermediate_schedule, or take 'constant' or 'forward' here"
            )

    def check_schedules_are_on(self, num_steps: int) -> None:
        """
        Raises:
            ValueError: If the factor of a schedule is 0 for all its terms throughout a training of that many steps.
        """
        of_layers = [(layer, 1) for layer in self.layers]
        of_targets = [(self.num_layers, offset) for offset in range(2, self.num_targets + 1)]
        for name, schedule, terms in (
            (f"{self.prefix}_schedule", self.intermediate_schedule, of_layers),
            ("target_schedule", self.target_schedule, of_targets),
        ):
            moments = (self._moment(*term, step / num_steps, step) for step in range(num_steps) for term in terms)
            if terms and not any(scheduled(schedule, at) for at in moments):
                raise ValueError(
                    f"{name} is {schedule!r}, whose factor is 0 at each of the {num_steps} steps: it would never train the"
                    f" terms that it weighs. Give one of {schedule_names()}, or leave these terms out"
                )

    def never_trained(self, num_steps: int) -> list[str]:
        """The names of the terms whose weight is 0 at each step of a short training only because of a schedule."""
        if num_steps > 1000:  # enough for each of the known schedules
            return []
        names, step = [term.name for term in self.terms if term.weight], 0
        while names and step < num_steps:
            weights = self.weights_at(step / num_steps, step)
            names, step = [name for name in names if not weights[name]], step + 1
        return names

    def _check_distillation(self) -> None:
        _check_weight("distillation is", self.distillation)
        if self.distillation and all(term.is_main for term in self.terms):
            raise ValueError(
                f"distillation is {self.distillation}, and there are no auxiliary heads to learn from the model's own; it"
                " must be 0"
            )
        if self.distillation and self.loss_weighting != "fixed":
            raise ValueError(
                f"distillation is {self.distillation} and loss_weighting {self.loss_weighting!r}; with distillation it must"
                " be 'fixed'"
            )

    def _check_intermediate_layers(self) -> None:
        layers, last = self.intermediate_layers, self.num_layers - 1
        if layers is None or layers == "all":
            return
        if isinstance(layers, str):
            raise ValueError(f"{self.prefix}_layers is {layers!r}; it must be 'all', a list of layer numbers, or None")
        wrong = [layer for layer in layers if not 1 <= layer <= last]
        if wrong:
            raise ValueError(
                f"{self.prefix}_layers contains {wrong}; with num_hidden_layers={self.num_layers} the intermediate"
                f" layers are 1 to {last}" + (" (there are none)" if last == 0 else "")
            )
        if len(set(layers)) != len(layers):
            raise ValueError(f"{self.prefix}_layers names a layer twice: {list(layers)}")

    @property
    def layers(self) -> tuple[int, ...]:
        """The intermediate layers that carry losses."""
        if self.intermediate_layers == "all":
            return tuple(range(1, self.num_layers))
        return tuple(sorted(int(layer) for layer in self.intermediate_layers or ()))

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """All terms of the loss: those of the main head, then the further targets, then the intermediate layers in order.

        With `position_loss="last"` the term `last_position` has the weight of the main term. Otherwise its weight is 0,
        and its value is only reported.
        """
        of_targets = [1.0, *(self.target_weights or [0.5] * (self.num_targets - 1))]
        given, positions = self.term_weights or {}, self.position_loss
        of_main = given.get(self.main, 1.0)
        at_all, at_last = (0.0, of_main) if positions == "last" else (of_main, 0.0)
        terms = [LossTerm(self.main, self.num_layers, 1, at_all, True)]
        if self.has_last_position:
            weight = given.get(LAST_POSITION, at_last)
            terms.append(LossTerm(LAST_POSITION, self.num_layers, 1, weight, True, "last"))
        for layer in (self.num_layers, *self.layers):
            for offset in range(1, self.num_targets + 1):
                name = term_name(layer, offset, self.num_layers, self.main)
                if name == self.main:
                    continue
                weight = of_targets[offset - 1] * (1.0 if layer == self.num_layers else self.intermediate_weight)
                terms.append(LossTerm(name, layer, offset, given.get(name, weight), False, positions))
        return tuple(terms)

    @property
    def evaluation_weights(self) -> dict[str, float]:
        """The weights in evaluation: the loss is the main one alone, at all positions."""
        return {term.name: float(term.positions == "all") for term in self.terms if term.is_main}

    def _moment(self, layer: int, offset: int, progress: float, step: int) -> ScheduleContext:
        return ScheduleContext(layer, offset, self.num_layers, self.num_targets, self.layers, progress, step)

    def weights_at(self, progress: float | None, step: int | None = None) -> dict[str, float]:
        """The weight of each term by name when the share `progress` of training, and `step` steps, are done.

        Raises:
            ValueError: If `progress` is outside 0..1 or a schedule returns a value that is negative or not finite.
        """
        return self._weights_at(progress, step, chosen=False)

    def evaluated_at(self, progress: float | None, step: int | None = None) -> list[str]:
        """The auxiliary terms that an evaluation at that point of training reports: those with a weight.

        For a schedule that chooses among the layers at each step, like `"random"`, these are the terms of all layers.
        """
        weights = self._weights_at(progress, step, chosen=True)
        return [term.name for term in self.terms if not term.is_main and weights[term.name]]

    def _weights_at(self, progress: float | None, step: int | None, chosen: bool) -> dict[str, float]:
        """The weights; with `chosen`, as if a schedule that chooses among layers chose each of them."""
        progress = 0.0 if progress is None else progress
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"training_progress is {progress}; it is the share of training done, from 0 to 1")
        weights = {}
        for term in self.terms:
            at = self._moment(term.layer, term.offset, progress, step or 0)
            factor = 1.0 if term.offset == 1 else scheduled(self.target_schedule, at)
            if term.layer < self.num_layers:
                factor *= (
                    1.0
                    if chosen and _chooses_layers(self.intermediate_schedule)
                    else scheduled(self.intermediate_schedule, at)
                )
            weights[term.name] = term.weight * factor
        return weights


def classifier_settings(
    num_layers: int,
    layers: list[int] | tuple[int, ...] | str | None = "thirds",
    weight: float = 0.3,
    schedule: str = "constant",
    **more: Any,
) -> AuxiliaryLossSettings:
    """The losses of a sequence or token classification model with auxiliary classifiers like Inception's.

    Szegedy et al. (2015, arXiv 1409.4842), section 5: two classifiers, after about one and two thirds of the network,
    weighted 0.3, which predictions do not use. The main term is called `classification`.
    """
    if layers == "thirds":
        layers = sorted({round(num_layers / 3), round(2 * num_layers / 3)} & set(range(1, num_layers)))
    return AuxiliaryLossSettings(
        num_layers=num_layers,
        num_targets=1,
        intermediate_layers=layers,
        intermediate_weight=weight,
        intermediate_schedule=schedule,
        has_last_position=False,
        main="classification",
        **more,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_weight(field: str, weight: float) -> None:
    if not _is_number(weight) or not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{field} {weight!r}; a weight is a finite number that is 0 or more")


def _check_position_share(share: float, position_loss: str | None) -> None:
    if not _is_number(share) or not (math.isfinite(share) and 0 < share <= 1):
        raise ValueError(f"position_share is {share!r}; it must be a number above 0, at most 1 (all positions)")
    if share < 1 and position_loss == "last":
        raise ValueError(
            f"position_share is {share} and position_loss 'last': a loss at the last position alone has no positions to"
            " choose from. Give position_share=1, or position_loss='all'"
        )
