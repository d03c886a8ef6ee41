"""The terms of a model's loss in the log of a Trainer whose class stays as it is."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .evaluated_terms import counts_of
from .logger_names import LoggerNames
from .loss_terms import LossTerms, further_losses_of, log_key, loss_dict_of
from .models import shifts_labels
from .running_means import EvaluationTerms


class LossTermsCallback(TrainerCallback):
    """Logs each term of a model's loss as `loss_<name>`, in training and in evaluations, in any Trainer.

    For models whose own loss is right already, such as the DETR family and mixtures of experts. It changes no loss and
    tells the model nothing; schedules and `add_loss_term` need `AuxiliaryLossMixin`. Terms are taken from `loss_dict` in the
    output of the model, and from scalars whose name ends in `loss`. They are means over micro-batches, steps and
    processes, and in evaluations over targets.

    Example:

        trainer = Trainer(model, args, train_dataset=train_dataset)
        LossTermsCallback(trainer)
        trainer.train()

    Args:
        trainer: The Trainer, before training. The callback adds itself before the loggers.
        log_group_prefix: Prefix of the groups in which loggers show the terms, see `LoggerNames`.
    """

    def __init__(self, trainer: Trainer, log_group_prefix: str = "loss_"):
        self.trainer, self.names = trainer, LoggerNames(log_group_prefix)
        model: Any = trainer.model
        self.terms = LossTerms(model)
        self._shifts_labels = bool(shifts_labels(model))
        self._evaluated = EvaluationTerms()
        self._hooked: nn.Module | None = None
        self._hook: Any = None
        trainer.callback_handler.callbacks.insert(0, self)
        self._watch(model)

    def _watch(self, model: Any) -> None:
        """Look at the outputs of the model as the Trainer calls it, in its wrappers."""
        if model is not self._hooked:
            if self._hooked is not None:
                self._hook.remove()
            self._hooked = model
            self._hook = model.register_forward_hook(self._ran, with_kwargs=True)

    def _ran(self, model: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        terms = loss_dict_of(outputs) | further_losses_of(outputs)
        if not terms or torch.compiler.is_compiling():
            return
        if model.training and torch.is_grad_enabled():
            parts = getattr(self.trainer, "current_gradient_accumulation_steps", 1)
            # This project's models divide by the number of targets in the whole step.
            is_share = self.terms.settings is not None and kwargs.get("num_items_in_batch") is not None
            scale = float(self.trainer.accelerator.num_processes) if is_share else 1 / parts
            self.terms.parts, self.terms.step = parts, self.trainer.state.global_step
            loss = outputs.get("loss")
            loss = next(iter(terms.values())) if loss is None else loss  # a Trainer may compute it itself
            self.terms.hold(loss, outputs, kwargs, loss_scale=scale, scale=scale)
        elif not model.training:
            positions, rows = counts_of(kwargs, self._shifts_labels)
            for name, value in terms.items():
                self._evaluated.add(log_key(name), value, rows if name == "last_position" else positions)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watch(self.trainer.model_wrapped)
        self.terms.forget()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.terms.keep_held()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.terms.keep_held()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        self._evaluated = EvaluationTerms()  # of no entry in the log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = {} if logs is None else logs
        found: dict[str, float] = {}
        evaluation = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), "")
        if "loss" in logs:
            found, evaluation = self.terms.means(), ""
            found.pop("loss", None)
            self.names.show_weights(self.terms.weights)
        elif evaluation not in ("", "train"):
            totals = self._evaluated.totals()
            self._evaluated = EvaluationTerms()
            found = {name: total / count for name, (total, count) in totals.items() if count}
        self.names.add(found, evaluation)
        self.names.use_in(self.trainer.callback_handler.callbacks)
        found = {f"{evaluation}_{name}" if evaluation else name: value for name, value in found.items()}
        logs.update(found)
        if state.log_history:  # the Trainer has written its entry already
            state.log_history[-1].update(found)
