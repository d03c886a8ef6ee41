"""Auxiliary losses of causal language models."""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_charformer.auxiliary_heads import AuxiliaryHead, ResidualBlock
from modeling_charformer.auxiliary_losses import (
    HeadInput,
    LossStep,
    Targets,
    causal_lm_losses,
    linear_losses,
    sampled_loss,
)
from modeling_charformer.distillation import add_distillation
from modeling_charformer.linear_cross_entropy import LinearClassifier, linear_classifier
from modeling_charformer.loss_settings import AuxiliaryLossSettings, LossFields, LossTerm
from modeling_charformer.self_drafting_charformer import SelfDraftingMixin

from .added_losses import ModelWithLosses
from .models import evaluating
from .probe import Anatomy, logit_scale, own_loss_of, probe_ids


class CausalLMWithLosses(SelfDraftingMixin, ModelWithLosses):
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

    def _classifier(self, term: LossTerm) -> LinearClassifier | None:
        head = self.auxiliary_heads[term.name]
        if isinstance(head, AuxiliaryHead):
            return linear_classifier(head)
        return linear_classifier(self.get_output_embeddings(), self._logit_scale, _logit_cap(self))

    def _classifier_input(self, term: LossTerm, hidden_states: Tensor) -> Tensor:
        head, hidden_states = self.auxiliary_heads[term.name], self._finished(term, hidden_states)
        return hidden_states if isinstance(head, AuxiliaryHead) else head(hidden_states)

    def _logits_of(self, term: LossTerm, hidden_states: Tensor) -> list[Tensor]:
        if term.is_main:
            return [self._logits(hidden_states)]
        head, states = self.auxiliary_heads[term.name], self._classifier_input(term, hidden_states)
        return [head(states) if isinstance(head, AuxiliaryHead) else self._logits(states)]

    def logits_of_head(self, term: LossTerm, outputs: Any) -> Tensor:
        """Logits `(B, S, V)` of a term's head, from the model's output with its hidden states."""
        return self._logits_of(term, self._head_input(term, outputs))[0]

    def draft(self, offset: int, state: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        return self._logits_of(self._drafting_terms[offset], state)[0], state

    @functools.cached_property
    def _drafting_terms(self) -> dict[int, LossTerm]:
        return {term.offset: term for term in self.loss_settings.terms if term.layer == self.loss_settings.num_layers}

    def add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        if inputs.get("shift_labels") is not None and not self._follows_shift_labels:
            raise ValueError(f"the loss of {type(self).__name__} does not follow shift_labels; give labels alone")
        targets = Targets(inputs, self.loss_settings.num_targets, inputs.get("num_items_in_batch"), target_counts)

        own_loss: Tensor = outputs.loss

        def main_loss(term: LossTerm) -> Tensor:
            if term.name == self.main:
                return own_loss
            return causal_lm_losses(
                self._head_input(term, outputs),
                functools.partial(self._logits_of, term),
                [term],
                targets,
                self._vocab_size,
            )[term.name]

        if not self.training:
            step.add({self.main: outputs.loss})  # no further head runs in evaluation
            return targets.share_of_step
        step.add_main(main_loss)
        self._add_auxiliary_losses(step, outputs, targets)
        add_distillation(step, targets, outputs.logits, self._logits_of)
        return targets.share_of_step

    def _add_auxiliary_losses(self, step: LossStep, outputs: Any, targets: Targets) -> None:
        terms = [term for term in step.terms if not term.is_main]
        samples = step.samples(terms, targets) or {}
        together: dict[int, tuple[LinearClassifier, list[HeadInput]]] = {}
        for term in terms:
            states, sample = self._head_input(term, outputs), samples.get(term)
            states = states if sample is None else sample.of(states)
            step.record(term, states, sample)
            classifier = self._classifier(term) if term.positions == "all" else None
            if classifier is not None:  # one run for all terms that share it
                read = HeadInput(term, self._classifier_input(term, states), sample)
                together.setdefault(id(classifier.weight), (classifier, []))[1].append(read)
                continue
            logits_of = functools.partial(self._logits_of, term)
            if sample is not None:
                step.add({term.name: sampled_loss(states, logits_of, term, sample, targets, self._vocab_size)})
            else:
                # One term at a time: with a large vocabulary, several at once would run on smaller chunks.
                step.add(causal_lm_losses(states, logits_of, [term], targets, self._vocab_size))
        for classifier, inputs in together.values():
            step.add(linear_losses(classifier, inputs, targets, step.expected_weights(self.loss_uncertainty)))


def _logit_cap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma's


def _logit_scale_of(model: PreTrainedModel) -> float | None:
    with evaluating(model):
        outputs: Any = model(input_ids=probe_ids(model), output_hidden_states=True, return_dict=True)
        made = cast(nn.Module, model.get_output_embeddings())(outputs.hidden_states[-1])
    return logit_scale(made, outputs.logits, _logit_cap(model))
