"""The terms of a model's loss in training: counted, scaled and averaged over optimizer steps and processes.

`LossTerms` is for a loop of your own. `AuxiliaryLossMixin` uses it in any Trainer.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.state import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modeling_charformer.loss_settings import AuxiliaryLossSettings, ScheduleContext, scheduled

from .models import targets_of, unwrap_peft, unwrapped
from .running_means import TrainingTerms, group_by_layer


Batch = Mapping[str, Any]
# The name of the model's own loss, where it is one term among others.
MAIN = "main"
# What a model with auxiliary losses takes in training, beside its inputs.
TRAINING_INPUTS = ("training_progress", "training_step", "training_seed", "target_counts")


class AddedTerm(NamedTuple):
    """A term of the loss that `LossTerms.add_term` has added."""

    function: Callable[[Any, Mapping[str, Any]], Tensor]
    weight: float
    schedule: str


class LossTerms:
    """The terms of a model's loss over the optimizer steps of a training loop.

    - It counts the targets of a whole optimizer step, over its micro-batches and all processes, and tells the model these
      counts and how far training is.
    - Each micro-batch's loss is its share of the step's loss. The gradients of a step add up to that of one big batch.
    - `means` returns the mean of each term since its last call. No value depends on how a batch is split.

    Example::

        terms = LossTerms(model, num_steps=1000)
        for micro_batches in terms.steps(loader, accumulation=4):
            for batch in micro_batches:
                terms.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if terms.steps_done % 100 == 0:
                print(terms.means())

    Terms are taken from `loss_dict` in the model's output, and from scalars whose name ends in `loss`. A model without
    auxiliary losses gets no counts, and its losses are averaged over micro-batches.

    Args:
        model: The model that the loop calls, in its wrappers (DistributedDataParallel, `torch.compile`, PEFT) if it has any.
            Heads that drop out need `find_unused_parameters=True` of DistributedDataParallel.
        num_steps: Number of optimizer steps, for the schedules of the weights. Without it, weights stay as they are at first.
        seed: Seed of what the model draws for its terms alone.
    """

    def __init__(self, model: nn.Module, num_steps: int | None = None, seed: int = 0):
        self.num_steps, self.seed = num_steps, seed
        self.use(model)
        self.step = 0
        """Optimizer steps done before the present one."""
        self.steps_done = 0
        """Optimizer steps begun, the present one included."""
        self.progress = 0.0
        """Share of training done, 0 to 1."""
        self.parts = 1
        """Micro-batches of the present optimizer step in this process."""
        self.counts: Tensor | None = None
        """Numbers of targets in the present optimizer step, see `Targets.counts`."""
        self.weights: dict[str, Tensor | float] = {}
        """The weights of the terms in the last micro-batch, by name."""
        self._added: dict[str, AddedTerm] = {}
        self._held: list[tuple[dict[str, Tensor], float]] = []
        self._held_added: list[Tensor] = []
        self._sums = TrainingTerms()

    def use(self, model: nn.Module) -> None:
        """Take the terms of another model from now on; terms given to `add_term` stay."""
        self.model = model
        base = unwrapped(model)
        self.settings: AuxiliaryLossSettings | None = getattr(base, "loss_settings", None)
        self.takes = frozenset(name for name in TRAINING_INPUTS if takes(base, name))
        """The names among `TRAINING_INPUTS` that the model takes."""
        wrapper = getattr(model, "_orig_mod", model)  # of a compiled model
        if isinstance(wrapper, DistributedDataParallel) and not wrapper.find_unused_parameters:
            self._check_all_heads_run(base)

    def _check_all_heads_run(self, base: Any) -> None:
        """Refuse a wrapper that would stop in the middle of training, at parameters without a gradient."""
        heads = getattr(base, "auxiliary_heads", getattr(base, "auxiliary_classifiers", {}))
        with_weights = [name for name, head in heads.items() if any(True for _ in head.parameters())]
        moments = [self.settings.weights_at(percent / 100, percent) for percent in range(101)] if self.settings else []
        dropped = [name for name in with_weights if any(not weights.get(name, 1.0) for weights in moments)]
        if dropped:
            raise ValueError(
                f"DistributedDataParallel has find_unused_parameters=False, and the heads of {dropped} do not run at each step;"
                " torch would stop there. Set it to True, with Accelerate by"
                " Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])"
            )

    # ---- Terms of one's own ----

    def add_term(
        self,
        name: str,
        function: Callable[[Any, Mapping[str, Any]], Tensor],
        weight: float = 1.0,
        schedule: str = "constant",
    ) -> None:
        """Add `weight * function(outputs, inputs)` to the loss in training, and keep its raw value as the term `name`.

        Args:
            name: Name of the term; the model must not have a term of that name.
            function: Takes the model's output and the batch; returns a scalar, the mean over this batch. All
                micro-batches of an optimizer step, on all processes, have the same weight.
            weight: Any finite number.
            schedule: How the weight changes in training: one of `modeling_charformer.schedule_names()`. The term counts
                as layer 1 of 1. So `"paper"` drops it after half of training, and `"linear"` and `"cosine"` reduce it
                to 0 by then.

        Raises:
            ValueError: If the name is taken, the weight not finite or the schedule unknown.
        """
        taken = [term.name for term in self.settings.terms] if self.settings is not None else []
        if name in (*taken, *self._added):
            raise ValueError(f"a loss term {name!r} exists already; choose a name other than {[*taken, *self._added]}")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of the loss term {name!r} is {weight}; it must be a finite number")
        term = AddedTerm(function, weight, schedule)
        for progress in (0.0, 0.5, 1.0):  # a wrong schedule raises here
            _weight_of(term, progress, self.step)
        self._added[name] = term

    def added_values(self, outputs: Any, inputs: Batch, weighted: bool = True) -> dict[str, tuple[float, Tensor]]:
        """The weight now and the raw value of each term of `add_term`; with `weighted`, without terms of weight 0.

        Raises:
            ValueError: If a function returns anything but a scalar, or the model has a term of that name too.
        """
        own = loss_dict_of(outputs) | further_losses_of(outputs)
        values: dict[str, tuple[float, Tensor]] = {}
        for name, term in self._added.items():
            if name in own:
                raise ValueError(f"the model has a loss term {name!r} too; give the term that was added another name")
            weight = _weight_of(term, self.progress, self.step)
            if weight or not weighted:
                values[name] = weight, self.added_value(name, outputs, inputs)
        return values

    def added_names(self) -> list[str]:
        """The names of the terms of `add_term` that have a weight now."""
        return [name for name, term in self._added.items() if _weight_of(term, self.progress, self.step)]

    def added_value(self, name: str, outputs: Any, inputs: Batch) -> Tensor:
        """The raw value of a term of `add_term`."""
        return _scalar(name, self._added[name].function(outputs, inputs))

    # ---- An optimizer step ----

    def steps(self, batches: Iterable[Batch], accumulation: int = 1) -> Iterator[list[Batch]]:
        """The micro-batches of one optimizer step after the other, up to `num_steps`; fewer in the last if they run out.

        Args:
            batches: Micro-batches of this process, such as a `DataLoader`.
            accumulation: Micro-batches of an optimizer step, in this process.
        """
        if accumulation < 1:
            raise ValueError(f"accumulation is {accumulation}; it must be 1 or more")
        remaining = iter(batches)
        while self.num_steps is None or self.steps_done < self.num_steps:
            micro_batches = list(itertools.islice(remaining, accumulation))
            if not micro_batches:
                return
            self.begin_step(micro_batches)
            yield micro_batches

    def begin_step(
        self,
        micro_batches: Sequence[Any] = (),
        step: int | None = None,
        progress: float | None = None,
        parts: int | None = None,
        over_processes: bool = True,
    ) -> None:
        """Begin an optimizer step: count its targets and set how far training is. All processes call this together.

        Args:
            micro_batches: All micro-batches of the step in this process. Without them nothing is counted, and each loss
                is the mean of its micro-batch.
            step: Optimizer steps done before; by default those begun so far.
            progress: Share of training done; by default `step / num_steps`.
            parts: Number of micro-batches, if they are not given.
            over_processes: Whether targets are counted over all processes, or in each by itself.
        """
        self.step = self.steps_done if step is None else step
        self.steps_done = self.step + 1
        if progress is None:
            progress = min(1.0, self.step / self.num_steps) if self.num_steps else 0.0
        self.progress = progress
        self.parts = parts or max(1, len(micro_batches))
        self.counts = self._counted(micro_batches, over_processes) if "target_counts" in self.takes else None

    def _counted(self, micro_batches: Sequence[Any], over_processes: bool) -> Tensor | None:
        if self.settings is None or not micro_batches:
            return None
        if not all(isinstance(batch, Mapping) and "labels" in batch for batch in micro_batches):
            return None
        base = unwrapped(self.model)
        targets = [targets_of(base, batch) for batch in micro_batches]
        own = [of_batch.counts() for of_batch in targets]
        device = next(self.model.parameters()).device
        counts = torch.stack(own).sum(0).to(device)
        if over_processes and PartialState().num_processes > 1:
            counts = reduce(counts, "sum")
        return counts

    def model_inputs(self) -> dict[str, Any]:
        """What the model is told in this step beside the batch: those of `TRAINING_INPUTS` that it takes."""
        values = (self.progress, self.step, self.seed, self.counts)
        return {name: value for name, value in zip(TRAINING_INPUTS, values, strict=True) if name in self.takes}

    def loss(self, batch: Batch) -> Tensor:
        """Run the model on a micro-batch; returns its share of the step's loss, to be back-propagated.

        `DistributedDataParallel` and Accelerate take the mean of the gradients over processes, and the share allows for that.

        Raises:
            ValueError: If the model returns no loss.
        """
        told = self.model_inputs()
        if self.counts is not None:
            told["num_items_in_batch"] = self.counts[0, 0]
        outputs = self.model(**batch, **told)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None:
            raise ValueError(
                f"{type(self.model).__name__} returned no loss for the inputs {sorted(batch)}; models of Transformers need labels"
            )
        counted = self.counts is not None
        scale = float(PartialState().num_processes) if counted else 1 / self.parts
        loss = self.hold(loss * scale, outputs, batch, loss_scale=1.0, scale=scale)
        self.keep_held()
        return loss

    def shares_of(self, outputs: Any, inputs: Batch) -> dict[str, Tensor]:
        """The terms in a model's output, which are means over this batch, as shares of the whole step's means."""
        terms = loss_dict_of(outputs)
        if self.counts is None:
            return terms
        of_step = self._by_term(self.counts.clamp(min=1))
        own = self.counts_by_term(inputs)
        return {
            name: value * (own[name].clamp(min=1).to(value.device) / of_step[name]) for name, value in terms.items()
        }

    def counts_by_term(self, inputs: Batch) -> dict[str, Tensor]:
        """The number of targets in a batch for each term of a language model; empty for other models."""
        if self.settings is None or "target_counts" not in self.takes or inputs.get("labels") is None:
            return {}
        base = unwrapped(self.model)
        return self._by_term(targets_of(base, inputs).counts())

    def _by_term(self, counts: Tensor) -> dict[str, Tensor]:
        terms = self.settings.terms if self.settings is not None else ()
        return {term.name: counts[int(term.positions == "last"), term.offset - 1] for term in terms}

    def hold(
        self,
        loss: Tensor,
        outputs: Any,
        inputs: Batch,
        *,
        loss_scale: float,
        scale: float,
        terms: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Hold the terms of a micro-batch until `keep_held`; returns the loss, with the terms of `add_term` added.

        Args:
            loss: The loss of the micro-batch.
            outputs: The model's output.
            inputs: The batch.
            loss_scale: Factor that makes the loss this micro-batch's part of the step's loss.
            scale: The same for the terms.
            terms: The terms by name; by default those in `loss_dict` of the output.
        """
        terms, means = loss_dict_of(outputs) if terms is None else terms, further_losses_of(outputs)
        given = outputs.get("loss_weights") if isinstance(outputs, Mapping) else None
        # The output leaves out terms that have dropped out.
        self.weights = dict.fromkeys((term.name for term in (self.settings.terms if self.settings else ())), 0.0)
        self.weights |= given or {}
        main = {} if terms or not self._added else {MAIN: loss}
        for name, (weight, value) in self.added_values(outputs, inputs).items():
            means[name], self.weights[name] = value, weight
            self._held_added.append(weight * value / self.parts)
            loss = loss + self._held_added[-1] / loss_scale
        self._held = [({"loss": loss, **main}, loss_scale), (terms, scale), (means, 1 / self.parts)]
        return loss

    def keep(self, figures: Mapping[str, float]) -> None:
        """Add figures of the present step to the sums, the same on all processes."""
        device = next(self.model.parameters()).device
        values = {name: torch.tensor(value, device=device) for name, value in figures.items()}
        self._sums.add(self.step + 1, values, 1.0)

    def auxiliary_parts(self, terms: Mapping[str, Tensor], weights: Batch, scale: float) -> list[Tensor]:
        """What each auxiliary term, and each of `add_term`, gives to the step's loss in the micro-batch that is held."""
        return [value * scale for value in weighted_terms(terms, weights, self.settings)] + self._held_added

    def drop_held(self) -> None:
        self._held, self._held_added = [], []

    def keep_held(self) -> None:
        """Add what is held to the sums; a micro-batch whose backward pass failed runs again, and must count once."""
        for terms, scale in self._held:
            if terms:
                self._sums.add(self.step + 1, terms, scale)
        self.drop_held()

    # ---- Means ----

    def means(self, over_layers: bool = False) -> dict[str, float]:
        """The mean of each term since the last call, unweighted, by its name in a log: `loss`, `loss_next_char`, ...

        A term that has dropped out in part of the steps is averaged over the others. All processes call this together.

        Args:
            over_layers: Take the mean over the layers, too: `loss_layers`, `loss_layers_target_2`, ...
        """
        found = self._sums.means()
        self.forget()
        found = group_by_layer(found) if over_layers else found
        return {log_key(name): value for name, value in found.items()}

    def forget(self) -> None:
        """Forget the sums since the last call of `means`."""
        self._sums = TrainingTerms()
        self.drop_held()

    def first_not_finite(self) -> tuple[int, list[str]] | None:
        """The first step since `means` at which a term was nan or infinite on any process, and the names of these terms."""
        return self._sums.first_not_finite()

    def state(self) -> dict[str, Any]:
        """The sums since the last call of `means`, as values for JSON."""
        return self._sums.state()

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue the sums that `state` returned."""
        self._sums = TrainingTerms(state, device)


def takes(model: nn.Module | None, parameter: str) -> bool:
    """Whether the model's `forward` has a parameter of that name."""
    if model is None:
        return False
    model = unwrap_peft(model)  # a PEFT wrapper passes all arguments on
    return parameter in inspect.signature(model.forward).parameters


def log_key(term: str) -> str:
    """The name of a term in a log: `loss_` and its name. Figures of gradients keep theirs."""
    return term if term == "loss" or term.startswith(("loss_", "gradient_")) else f"loss_{term}"


def loss_dict_of(outputs: Any) -> dict[str, Tensor]:
    """The scalars in `loss_dict` of a model's output."""
    terms = outputs.get("loss_dict") if isinstance(outputs, Mapping) else None
    return {name: value for name, value in (terms or {}).items() if isinstance(value, Tensor) and value.numel() == 1}


def further_losses_of(outputs: Any) -> dict[str, Tensor]:
    """Scalars of a model's output whose name ends in `loss`, such as `aux_loss`: means over the batch."""
    values = outputs.items() if isinstance(outputs, Mapping) else ()
    return {
        name: value
        for name, value in values
        if name != "loss" and name.endswith("loss") and isinstance(value, Tensor) and value.numel() == 1
    }


def weighted_terms(
    terms: Mapping[str, Tensor], weights: Batch, settings: AuxiliaryLossSettings | None
) -> list[Tensor]:
    """A model's terms times their weights, without those of its own head and those that have dropped out."""
    main = [term.name for term in settings.terms if term.is_main] if settings is not None else []
    return [weights[name] * value for name, value in terms.items() if name not in main and weights[name]]


def auxiliary_loss(
    terms: Mapping[str, Tensor], weights: Batch, settings: AuxiliaryLossSettings | None
) -> Tensor | float:
    """The weighted sum of a model's terms without those of its own head; 0 if all of them have dropped out."""
    summands = weighted_terms(terms, weights, settings)
    return torch.stack(summands).sum() if summands else 0.0


def _weight_of(term: AddedTerm, progress: float, step: int) -> float:
    at = ScheduleContext(1, 1, num_layers=1, num_targets=1, layers=(1,), progress=progress, step=step)
    return term.weight * scheduled(term.schedule, at)


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"a tensor of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"the function of the loss term {name!r} returned {kind}; it must return a scalar tensor")
    return value.reshape(())
