"""Auxiliary losses of causal language models."""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from modeling_charformer.auxiliary_heads import ResidualBlock
from modeling_charformer.linear_cross_entropy import LinearClassifier
from modeling_charformer.loss_settings import LossTerm, term_name
from modeling_charformer.self_drafting_charformer import SelfDraftingMixin

from .language_models import LanguageModelWithLosses
from .probe import Trace, through
from .probe_layers import Anatomy


class CausalLMWithLosses(SelfDraftingMixin, LanguageModelWithLosses):
    accepted_heads = ("shared", "own", "sequential")
    shifts_labels = True
    _is_sequential = False
    _kept_rows: tuple[Any, LinearClassifier] | None = None

    @classmethod
    def check(cls, model: PreTrainedModel, anatomy: Anatomy, trace: Trace, heads: str) -> dict[str, Any]:
        name = type(model).__name__
        if not anatomy.reads_forward:
            raise ValueError(
                f"{name} reads in both directions: its layers see the tokens that the heads would have to predict"
            )
        return {
            "_is_sequential": heads == "sequential",
            **cls._checked_loss(model, trace, "shifted", "for the next token"),
            **cls._checked_path(model, trace, heads),
        }

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        if heads == "sequential" and term.offset > 1:
            return ResidualBlock(self._anatomy.width, self._embedding_size)
        return super()._make_head(term, index, heads)

    @property
    def _embedding_size(self) -> int:
        return cast(Tensor, self.get_input_embeddings().weight).shape[1]

    def _head_reads(self, term: LossTerm, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """The layer's output; for sequential heads also the embeddings of the tokens between.

        Its shape is then `(B, S, d + (offset - 1) * d_e)`.
        """
        states = super()._head_reads(term, outputs, inputs)
        if not self._is_sequential or term.offset == 1:
            return states
        embedded = inputs.get("inputs_embeds")
        embedded = self._embedded(inputs["input_ids"]) if embedded is None else _normed(embedded)
        # The zeros at the end do not matter: no target belongs to them.
        between = [F.pad(embedded, (0, 0, 0, ahead))[:, ahead:] for ahead in range(1, term.offset)]
        return torch.cat([states, *between], dim=-1)

    def _embedded(self, ids: Tensor) -> Tensor:
        return _normed(self.get_input_embeddings()(ids))

    def _head_states(self, term: LossTerm, hidden_states: Tensor) -> Tensor:
        if not self._is_sequential or term.offset == 1:
            return super()._head_states(term, hidden_states)
        between = [self._embedding_size] * (term.offset - 1)
        states, *embeddings = hidden_states.split([hidden_states.shape[-1] - sum(between), *between], dim=-1)
        states = self._finished(term, states)
        for offset, embedded in enumerate(embeddings, start=2):
            name = term_name(term.layer, offset, self.loss_settings.num_layers, self.main)
            states = self.auxiliary_heads[name](states, embedded)
        return cast(Tensor, states)

    def _matrix_name(self, term: LossTerm) -> str:
        is_part = self.draft_vocabulary is not None and term.offset > 1
        return "draft_vocabulary" if is_part and not self._own_heads else super()._matrix_name(term)

    def _classifier(self, term: LossTerm) -> LinearClassifier | None:
        classifier = super()._classifier(term)
        if classifier is None or self._own_heads or self.draft_vocabulary is None or term.offset == 1:
            return classifier
        return self._rows_of(classifier, self.draft_vocabulary)

    def _rows_of(self, classifier: LinearClassifier, vocabulary: Tensor) -> LinearClassifier:
        """The rows of the draft vocabulary. They are kept until the classifier changes, since each draft needs them."""
        weight, bias = classifier.weight, classifier.bias
        if torch.is_grad_enabled() and weight.requires_grad:
            return classifier._replace(weight=weight[vocabulary], bias=None if bias is None else bias[vocabulary])
        version = None if weight.is_inference() else weight._version
        state = (weight.data_ptr(), version, weight.dtype, weight.device)
        if self._kept_rows is None or self._kept_rows[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                rows = weight[vocabulary], None if bias is None else bias[vocabulary]
            self._kept_rows = state, classifier._replace(weight=rows[0], bias=rows[1])
        return self._kept_rows[1]

    def _logits_of(self, term: LossTerm, hidden_states: Tensor) -> list[Tensor]:
        return [self._classified(term, self._head_states(term, hidden_states))]

    def _classified(self, term: LossTerm, states: Tensor) -> Tensor:
        """Logits `(..., n)` of a term over its head's vocabulary."""
        if self._own_heads:
            return cast(Tensor, self.auxiliary_heads[term.name](states))
        if self.draft_vocabulary is None or term.offset == 1:
            return self._logits(states)
        classifier = self._classifier(term)
        if classifier is None:
            return self._logits(states)[..., self.draft_vocabulary]
        logits = F.linear(through(self, self._path.modules[:-1], states), classifier.weight, classifier.bias)
        logits = logits * classifier.scale
        return logits if classifier.cap is None else torch.tanh(logits / classifier.cap) * classifier.cap

    def draft(self, offset: int, state: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        term = self._drafting_terms[offset]
        if self._is_sequential:
            state = self.auxiliary_heads[term.name](state, self._embedded(previous))
            logits = self._classified(term, state)
        else:
            logits = self._logits_of(term, state)[0]
        return self._over_all(term, logits), state

    @functools.cached_property
    def _drafting_terms(self) -> dict[int, LossTerm]:
        return {term.offset: term for term in self.loss_settings.terms if term.layer == self.loss_settings.num_layers}


def _normed(embedded: Tensor) -> Tensor:
    """Embeddings of unit size.

    In many models they are far smaller than hidden states, so that heads would learn late to use them.
    """
    return F.rms_norm(embedded, embedded.shape[-1:])
