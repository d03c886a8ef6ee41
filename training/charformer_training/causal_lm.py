"""Auxiliary losses of causal language models."""

import functools
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from modeling_charformer.loss_settings import LossTerm
from modeling_charformer.self_drafting_charformer import SelfDraftingMixin

from .language_models import LanguageModelWithLosses
from .probe import Anatomy, Trace


class CausalLMWithLosses(SelfDraftingMixin, LanguageModelWithLosses):
    shifts_labels = True

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

    def draft(self, offset: int, state: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        return self._logits_of(self._drafting_terms[offset], state)[0], state

    @functools.cached_property
    def _drafting_terms(self) -> dict[int, LossTerm]:
        return {term.offset: term for term in self.loss_settings.terms if term.layer == self.loss_settings.num_layers}
