"""Auxiliary losses of causal language models."""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_charformer.auxiliary_heads import AuxiliaryHead, ResidualBlock
from modeling_charformer.auxiliary_losses import LossStep, Targets, causal_lm_losses, sampled_loss
from modeling_charformer.loss_settings import AuxiliaryLossSettings, LossFields, LossTerm

from .added_losses import ModelWithLosses
from .models import evaluating
from .probe import Anatomy, logit_scale, own_loss_of, probe_ids


class CausalLMWithLosses(ModelWithLosses):
    accepted_settings = [field.name for field in fields(LossFields)]
    accepted_heads = ("shared", "own")
    main = "next_token"
    takes_target_counts = True
    _logit_scale: float
    _follows_shift_labels: bool

    @staticmethod
    def settings_for(num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        return AuxiliaryLossSettings(num_layers=num_layers, main="next_token", **settings)

    @staticmethod
    def check(model: PreTrainedModel, anatomy: Anatomy, heads: str) -> dict[str, Any]:
        name = type(model).__name__
        if not anatomy.reads_forward:
            raise ValueError(
                f"{name} reads in both directions: its layers see the tokens that the heads would have to predict"
            )
        own_loss = own_loss_of(model)
        if not own_loss.is_shifted:
            raise ValueError(
                f"the loss of {name} is not the mean cross-entropy of its logits for the next token, so the auxiliary losses"
                " would not be comparable"
            )
        scale = _logit_scale_of(model) if heads == "shared" else 1.0
        if scale is None:
            raise ValueError(
                f"the logits of {name} are not its output embeddings applied to its last hidden state. heads='shared' does not"
                " know the further operations of this model; choose heads='own'"
            )
        return {"_logit_scale": scale, "_follows_shift_labels": own_loss.follows_shift_labels}

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        if heads == "own":
            return self.linear_head(self._vocab_size, index)
        return nn.Identity() if term.offset == 1 else ResidualBlock(self._anatomy.width)

    @property
    def _vocab_size(self) -> int:
        return cast(Tensor, self.get_output_embeddings().weight).shape[0]

    def _logits(self, hidden_states: Tensor) -> Tensor:
        logits = self.get_output_embeddings()(hidden_states)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        cap = _logit_cap(self)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _logits_of(self, term: LossTerm, hidden_states: Tensor) -> list[Tensor]:
        if term.is_main:
            return [self._logits(hidden_states)]
        head, hidden_states = self.auxiliary_heads[term.name], self._finished(term, hidden_states)
        return [head(hidden_states) if isinstance(head, AuxiliaryHead) else self._logits(head(hidden_states))]

    def logits_of_head(self, term: LossTerm, outputs: Any) -> Tensor:
        """Logits `(B, S, V)` of a term's head, from the model's output with its hidden states."""
        return self._logits_of(term, self._head_input(term, outputs))[0]

    def _add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        if inputs.get("shift_labels") is not None and not self._follows_shift_labels:
            raise ValueError(f"the loss of {type(self).__name__} does not follow shift_labels; give labels alone")
        targets = Targets(inputs, self.loss_settings.num_targets, inputs.get("num_items_in_batch"), target_counts)

        own_loss: Tensor = outputs.loss

        def loss_of(term: LossTerm) -> Tensor:
            if term.name == self.main:
                return own_loss
            logits_of, states = functools.partial(self._logits_of, term), self._head_input(term, outputs)
            if not term.is_main and (samples := step.samples([term], targets)):
                sample = samples[term]
                return sampled_loss(sample.of(states), logits_of, term, sample, targets, self._vocab_size)
            # One term at a time: with a large vocabulary, several at once would run on smaller chunks.
            losses = causal_lm_losses(states, logits_of, [term], targets, self._vocab_size)
            return losses[term.name]

        if not self.training:
            step.add({self.main: outputs.loss})  # no further head runs in evaluation
            return targets.share_of_step
        step.add_main(loss_of)
        for term in step.terms:
            if not term.is_main:
                step.add({term.name: loss_of(term)})
        return targets.share_of_step


def _logit_cap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma's


def _logit_scale_of(model: PreTrainedModel) -> float | None:
    with evaluating(model):
        outputs: Any = model(input_ids=probe_ids(model), output_hidden_states=True, return_dict=True)
        made = cast(nn.Module, model.get_output_embeddings())(outputs.hidden_states[-1])
    return logit_scale(made, outputs.logits, _logit_cap(model))
