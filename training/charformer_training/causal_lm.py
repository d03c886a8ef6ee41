"""Auxiliary losses of causal language models."""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_charformer.auxiliary_heads import AuxiliaryHead, ResidualBlock
from modeling_charformer.auxiliary_losses import LossStep, Targets, causal_lm_losses, loss_of_logits, sampled_loss
from modeling_charformer.loss_settings import AuxiliaryLossSettings, LossFields, LossTerm

from .added_losses import ModelWithLosses
from .models import label_inputs
from .probe import Anatomy, Trace
from .probe_loss import LogitsPath, logits_path, own_loss_of


class CausalLMWithLosses(ModelWithLosses):
    accepted_settings = [field.name for field in fields(LossFields)]
    accepted_heads = ("shared", "own")
    main = "next_token"
    takes_target_counts = True
    accepts_loss_kwargs = True
    shifts_labels = True
    _path: LogitsPath

    @classmethod
    def settings_for(cls, num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        return AuxiliaryLossSettings(num_layers=num_layers, main=cls.main, **settings)

    @classmethod
    def check(cls, model: PreTrainedModel, anatomy: Anatomy, trace: Trace, heads: str) -> dict[str, Any]:
        name = type(model).__name__
        if not anatomy.reads_forward:
            raise ValueError(
                f"{name} reads in both directions: its layers see the tokens that the heads would have to predict"
            )
        return cls._checked_loss(model, trace, "shifted", "for the next token") | cls._checked_path(
            model, trace, heads
        )

    @staticmethod
    def _checked_loss(model: PreTrainedModel, trace: Trace, layout: str, of: str) -> dict[str, Any]:
        own_loss = own_loss_of(model, trace)
        if own_loss.layout != layout:
            raise ValueError(
                f"the loss of {type(model).__name__} is not the mean cross-entropy of its logits {of}, so the auxiliary losses"
                " would not be comparable"
            )
        return {"_own_loss": own_loss}

    @staticmethod
    def _checked_path(model: PreTrainedModel, trace: Trace, heads: str) -> dict[str, Any]:
        path = logits_path(model, trace) if heads == "shared" else LogitsPath()
        if path is None:
            raise ValueError(
                f"the logits of {type(model).__name__} are not its output embeddings applied to its last hidden state."
                " heads='shared' does not know the further operations of this model; choose heads='own'"
            )
        return {"_path": path}

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        if heads == "own":
            return self.linear_head(self._vocab_size, index)
        return nn.Identity() if term.offset == 1 else ResidualBlock(self._anatomy.width)

    @property
    def _vocab_size(self) -> int:
        return cast(Tensor, self.get_output_embeddings().weight).shape[0]

    def _logits(self, hidden_states: Tensor) -> Tensor:
        return self._path.logits(self, hidden_states)

    def _logits_of(self, term: LossTerm, hidden_states: Tensor) -> list[Tensor]:
        head, hidden_states = self.auxiliary_heads[term.name], self._finished(term, hidden_states)
        return [head(hidden_states) if isinstance(head, AuxiliaryHead) else self._logits(head(hidden_states))]

    def _targets(self, inputs: dict[str, Any], target_counts: Tensor | None) -> Targets:
        if inputs.get("shift_labels") is not None and not self._own_loss.follows_shift_labels:
            raise ValueError(f"the loss of {type(self).__name__} does not follow shift_labels; give labels alone")
        num_items = inputs.get("num_items_in_batch")
        return Targets(label_inputs(self, inputs), self.loss_settings.num_targets, num_items, target_counts)

    def logits_of_head(self, term: LossTerm, outputs: Any) -> Tensor:
        """Logits `(B, S, V)` of a term's head, from the model's output with its hidden states."""
        return self._logits_of(term, self._head_input(term, outputs))[0]

    def _add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        targets = self._targets(inputs, target_counts)
        own_loss: Tensor = outputs.loss
        num_items = inputs.get("num_items_in_batch")
        if (num_items is None or not self._own_loss.follows_num_items) and (num_items, target_counts) != (None, None):
            own_loss = own_loss * targets.share_of_step()  # the model took the mean over this batch alone

        def loss_of(term: LossTerm) -> Tensor:
            if term.name == self.main:
                return own_loss
            if term.is_main:
                return loss_of_logits(outputs.logits, term, targets)
            logits_of, states = functools.partial(self._logits_of, term), self._head_input(term, outputs)
            if samples := step.samples([term], targets):
                sample = samples[term]
                return sampled_loss(sample.of(states), logits_of, term, sample, targets, self._vocab_size)
            # One term at a time: with a large vocabulary, several at once would run on smaller chunks.
            losses = causal_lm_losses(states, logits_of, [term], targets, self._vocab_size)
            return losses[term.name]

        if not self.training:
            step.add({self.main: own_loss})  # no further head runs in evaluation
            return targets.share_of_step
        step.add_main(loss_of)
        for term in step.terms:
            if not term.is_main:
                step.add({term.name: loss_of(term)})
        return targets.share_of_step
