"""Says once that a model's auxiliary losses are not trained, by what the first backward pass through the model shows."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import unserializable_hook

from .loss_settings import AuxiliaryLossSettings


logger = logging.getLogger(__name__)


class LossWatch:
    """Watches a model until its first backward pass: a gradient that reaches the body must have come from its losses, too.

    Nothing is watched in evaluation, without gradients, or in a compiled graph. A loss whose auxiliary terms have all
    dropped out counts as trained.

    Args:
        name: Name of the model's class.
        body: The part of the model that its auxiliary heads read.
        settings: The model's losses.
    """

    def __init__(self, name: str, body: nn.Module, settings: AuxiliaryLossSettings):
        self._name = name
        self._had_labels = self._is_queued = False
        self._is_over = not any(term.weight and not term.is_main for term in settings.terms)
        if not self._is_over:
            body.register_forward_hook(self.body_ran)

    def body_ran(self, body: nn.Module, args: Any, outputs: Any) -> None:
        """A forward hook of the body."""
        if self._is_over or not body.training or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        state = outputs[0]
        if isinstance(state, Tensor) and state.requires_grad:
            state.register_hook(self._gradient_came)

    def watched(self, breakdown: dict[str, Any]) -> dict[str, Any]:
        """Take note of the `loss` and `loss_dict` that the model has computed; returns them unchanged."""
        if self._is_over or breakdown["loss"] is None or torch.compiler.is_compiling():
            return breakdown
        self._had_labels = True
        for loss in (breakdown["loss"], *breakdown["loss_dict"].values()):
            if loss.requires_grad:
                loss.register_hook(self._is_trained)
        return breakdown

    @unserializable_hook
    def _is_trained(self, gradient: Tensor) -> None:
        self._is_over = True

    @unserializable_hook
    def _gradient_came(self, gradient: Tensor) -> None:
        if not (self._is_over or self._is_queued):
            self._is_queued = True
            # The losses of lower layers get their gradient after the body's output.
            Variable._execution_engine.queue_callback(self._judge)

    def _judge(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        found = "the loss that it returned is not part of what was" if self._had_labels else "without labels it was"
        logger.warning(
            "The auxiliary losses of this %s are not trained: %s differentiated in the first step. The package"
            " charformer_training has AuxiliaryLossTrainer, which trains them, and AuxiliaryLossMixin for other Trainers",
            self._name,
            found,
        )
