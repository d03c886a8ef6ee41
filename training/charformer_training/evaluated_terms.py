"""The terms of a model's loss in the evaluations of any Trainer: means over targets, on all processes."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput, default_compute_objective
from transformers.utils.generic import ModelOutput

from modeling_charformer.auxiliary_losses import IGNORE_INDEX, Targets

from .batch_errors import reason_in_batch
from .fused_head import FusedHead, learned_rows
from .gradient_options import bare_model
from .head_accuracy import head_accuracies
from .logger_names import LoggerNames
from .loss_terms import MAIN, TRAINING_INPUTS, LossTerms, further_losses_of, log_key, loss_dict_of
from .models import runs_reference
from .running_means import EvaluationTerms, group_by_layer
from .units import NATS_PER_BIT, begins_character


def counts_of(inputs: Mapping[str, Any], shifts_labels: bool) -> tuple[Tensor | int, Tensor | int]:
    """Numbers of the targets in a batch over which a loss is a mean, and of the rows that have one.

    Args:
        inputs: The batch. Without labels, both are its number of rows.
        shifts_labels: Whether the model is a language model, which predicts the label of the next position.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        rows = find_batch_size(inputs) or 1
        return rows, rows
    if labels.dim() == 2 and shifts_labels:
        positions, of_rows = Targets(inputs, 1).counts()[:, 0]
        return positions, of_rows
    count = labels.ne(IGNORE_INDEX).sum()
    return count, count


# No Trainer by itself, so that Python accepts the wrong order of bases, and the mixin can say which one is right.
if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


class EvaluatesTerms(Base):
    """The part of `AuxiliaryLossMixin` that evaluates."""

    loss_terms: LossTerms
    logger_names: LoggerNames
    evaluates_terms: bool
    _evaluation_terms: EvaluationTerms
    _fused_head: FusedHead | None
    _reported: Set[str] = frozenset()
    """The names of the metrics that the mixin added to the last evaluation."""

    @property
    def _training_progress(self) -> float:
        # max_steps is 0 before training.
        return min(1.0, self.state.global_step / self.state.max_steps) if self.state.max_steps > 0 else 0.0

    @contextlib.contextmanager
    def _hooked(
        self, model: nn.Module, tell: Callable[..., Any], record: Callable[..., Any], inputs: Mapping[str, Any]
    ) -> Iterator[None]:
        """Call `record` after each call of the model, and `tell` before it if the model takes `TRAINING_INPUTS`."""
        hooks = [model.register_forward_hook(record, with_kwargs=True)]
        if self.loss_terms.takes:
            hooks.append(model.register_forward_pre_hook(tell, with_kwargs=True))
        if self._fused_head is not None:
            self._fused_head.rows = functools.partial(learned_rows(type(self)), inputs)
        try:
            yield
        except TypeError as error:
            if any(f"unexpected keyword argument '{name}'" in str(error) for name in TRAINING_INPUTS):
                raise ValueError(
                    f"{type(self).__name__} runs a function of its own in place of the model's forward, which does not compute"
                    f" auxiliary losses ({error}). Train a model without them there"
                ) from error
            raise
        finally:
            for hook in hooks:
                hook.remove()
            if self._fused_head is not None:
                self._fused_head.rows = None

    def _given_compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The `compute_loss` of whatever class.

        Raises:
            ValueError: If the model fails because of the batch: rows too long for it, or ids that it does not have.
        """
        given = dict(inputs)
        try:
            return type(self).compute_loss(self, model, inputs, *args, **kwargs)
        except (IndexError, RuntimeError) as error:
            reason = reason_in_batch(error, bare_model(self), given)
            if reason is None:
                raise
            raise ValueError(reason) from error

    def _evaluate_with_terms(self, model: nn.Module, inputs: Any, return_outputs: bool) -> Any:
        # Without counts of the whole step, the losses are means over this batch; they are weighted below.
        kept = self._rows_not_repeated(inputs)
        if kept is not None:
            labels = inputs["labels"].clone()
            labels[kept:] = IGNORE_INDEX
            inputs = {**inputs, "labels": labels}
        given = dict(inputs)
        told = {"training_progress": self._training_progress, "training_step": self.state.global_step}
        told = {name: value for name, value in told.items() if self.evaluates_terms and name in self.loss_terms.takes}
        seen: list[tuple[Any, dict[str, Tensor]]] = []

        def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs if runs_reference(model) else {**told, **kwargs}

        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
            if not runs_reference(model):
                seen.append((outputs, self._counts_by_term(outputs, kwargs)))

        with self._hooked(model, tell, record, given):
            computed = self._given_compute_loss(model, inputs, return_outputs, num_items_in_batch=None)
        loss, outputs = computed if return_outputs else (computed, None)
        # TRL calls the model without labels, too, if logits are asked for.
        passes = [each for each in seen if loss_dict_of(each[0])] or seen or [(outputs, {})]
        self._add_evaluation_terms(loss, *passes[-1], given, kept)
        return computed

    def _counts_by_term(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Numbers of the targets of each term in a call of the model."""
        if not loss_dict_of(outputs):
            return {}
        if self._fused_head is not None and inputs.get("fused_lm_head"):
            inputs = {**inputs, "labels": self._fused_head.learned(inputs["labels"])}
        return self.loss_terms.counts_by_term(inputs)

    def _rows_not_repeated(self, inputs: dict[str, Any]) -> int | None:
        """How many rows do not just fill the last batch on several processes, as repeats of the first rows; `None` for all."""
        labels, loader = inputs.get("labels"), self.accelerator.gradient_state
        if self.args.world_size == 1 or not isinstance(labels, Tensor):
            return None
        if not loader.end_of_dataloader or loader.remainder <= 0:
            return None
        rows = labels.shape[0]
        return int(min(max(loader.remainder - self.args.process_index * rows, 0), rows))

    def _add_evaluation_terms(
        self, loss: Tensor, outputs: Any, counts: dict[str, Tensor], inputs: dict[str, Any], kept: int | None
    ) -> None:
        labels, terms = inputs.get("labels"), loss_dict_of(outputs) | further_losses_of(outputs)
        positions, rows = counts_of(inputs, self._loss_shifts_labels)
        self._evaluation_terms.add("loss", loss, positions)
        if getattr(self.args, "eval_head_accuracy", False):
            with self.compute_loss_context_manager():
                for name, figures in head_accuracies(bare_model(self), inputs).items():
                    self._evaluation_terms.add(name, *figures)
        if outputs is not None and kept != 0:
            if kept is not None:
                outputs, inputs = (first_rows(each, len(inputs["labels"]), kept) for each in (outputs, inputs))
            own = self.loss_terms.added_values(outputs, inputs, weighted=False)
            terms |= {name: value for name, (_, value) in own.items()} | ({} if terms or not own else {MAIN: loss})
        counts = {"last_position": torch.as_tensor(rows), **counts}
        for name, value in terms.items():
            self._evaluation_terms.add(log_key(name), value, counts.get(name, positions))
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        if "next_char" in terms and isinstance(labels, Tensor) and getattr(config, "vocab_size", None) == 256:
            targets = Targets(inputs, 1).ahead(1)
            characters = ((targets != IGNORE_INDEX) & begins_character(targets)).sum()
            self._evaluation_terms.add("characters", torch.zeros_like(terms["next_char"]), characters)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if ignore_keys is None:
            config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        return super().prediction_step(
            model, inputs, prediction_loss_only, [*ignore_keys, "loss_dict", "loss_weights"], **kwargs
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._evaluation_terms = EvaluationTerms()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        totals = self._evaluation_terms.totals()
        _, characters = totals.pop("characters", (0.0, 0))
        metrics = {name: total / count for name, (total, count) in totals.items() if count}
        if characters:
            nats, num_bytes = totals["loss_next_char"]
            metrics["bpb"] = nats / NATS_PER_BIT / num_bytes
            if getattr(dataloader.dataset, "is_utf8", True):  # characters can be counted in UTF-8 only
                metrics["bpc"] = nats / NATS_PER_BIT / characters
        if getattr(self.args, "log_loss_terms", "each") == "groups":
            metrics = group_by_layer(metrics)
        self.logger_names.add(metrics, metric_key_prefix)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self._reported = named.keys() - {"eval_loss"}
        if self.is_in_train and (names := [name for name, value in named.items() if not math.isfinite(value)]):
            raise self._not_finite_error(self.state.global_step, names)
        return output._replace(metrics={**(output.metrics or {}), **named})

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The search of Transformers.

        By default its objective is `eval_loss`, or the sum of your own metrics, without the terms.
        """

        def objective(metrics: dict[str, float]) -> float:
            theirs = {name: value for name, value in metrics.items() if name not in self._reported}
            return float(default_compute_objective(theirs))

        return super().hyperparameter_search(hp_space, compute_objective or objective, *args, **kwargs)

    def _not_finite_error(self, step: int, names: list[str]) -> FloatingPointError:
        return FloatingPointError(
            f"not finite at step {step}: {', '.join(names)}. Lower the learning rate, warm it up for longer, or clip gradients"
            " (max_grad_norm)"
        )


def first_rows(batch: Any, rows: int, kept: int) -> Any:
    """A batch, or a model's output, with the first `kept` of its `rows` in each tensor that holds one entry a row."""
    values = {
        name: value[:kept] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
        for name, value in batch.items()
    }
    return type(batch)(**values) if isinstance(batch, ModelOutput) else values
