"""Auxiliary losses of language models: what all have in common, masked language models, and encoder-decoders."""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_charformer.auxiliary_heads import AuxiliaryHead, ResidualBlock
from modeling_charformer.auxiliary_losses import (
    HeadInput,
    LossStep,
    Targets,
    causal_lm_losses,
    linear_losses,
    loss_of_logits,
    sampled_loss,
)
from modeling_charformer.distillation import add_distillation
from modeling_charformer.linear_cross_entropy import LinearClassifier, linear_classifier
from modeling_charformer.loss_settings import AuxiliaryLossSettings, LossFields, LossTerm

from .added_losses import ModelWithLosses
from .models import targets_of
from .probe import Trace, through
from .probe_layers import Anatomy
from .probe_loss import LogitsPath, logits_path, own_loss_of


# The logit of a token outside the draft vocabulary. It is finite, so that processors may forbid all tokens inside.
NEVER = -1e4


class LanguageModelWithLosses(ModelWithLosses):
    """A model whose logits predict a token at every position; subclasses say which."""

    accepted_settings = [field.name for field in fields(LossFields)]
    accepted_heads: tuple[str, ...] = ("shared", "own")
    main = "next_token"
    takes_target_counts = True
    accepts_loss_kwargs = True
    _path: LogitsPath

    @classmethod
    def settings_for(cls, num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        return AuxiliaryLossSettings(num_layers=num_layers, main=cls.main, **settings)

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
        path = LogitsPath() if heads == "own" else logits_path(model, trace)
        if path is None:
            raise ValueError(
                f"the logits of {type(model).__name__} are not its output embeddings applied to its last hidden state."
                f" heads={heads!r} does not know the further operations of this model; choose heads='own'"
            )
        return {"_path": path}

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        if heads == "own":
            vocabulary = self.draft_vocabulary if term.offset > 1 else None
            return self.linear_head(self._vocab_size if vocabulary is None else len(vocabulary), index)
        return nn.Identity() if term.offset == 1 else ResidualBlock(self._anatomy.width)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the plain model, and with it the heads that predict all tokens.

        Raises:
            ValueError: If tokens of the draft vocabulary would be removed.
        """
        vocabulary = self.draft_vocabulary
        if vocabulary is not None and new_num_tokens is not None and new_num_tokens <= vocabulary.max():
            raise ValueError(
                f"new_num_tokens is {new_num_tokens}; it must be above {int(vocabulary.max())}, the largest id of the"
                " draft_vocabulary of the auxiliary heads"
            )
        embeddings: nn.Embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for term in self.loss_settings.terms:
            head = None if term.is_main else self.auxiliary_heads[term.name]
            if isinstance(head, AuxiliaryHead) and (vocabulary is None or term.offset == 1):
                self.auxiliary_heads[term.name] = head.resized(self._vocab_size, self._deviation)
        return embeddings

    @property
    def draft_vocabulary(self) -> Tensor | None:
        """Ids `(n,)`, the only ones that the heads of further targets predict; `None` if they predict all."""
        return cast(Tensor | None, getattr(self.auxiliary_heads, "draft_vocabulary", None))

    @property
    def _vocab_size(self) -> int:
        return cast(Tensor, self.get_output_embeddings().weight).shape[0]

    def _logits(self, hidden_states: Tensor) -> Tensor:
        return self._path.logits(self, hidden_states)

    def _classifier(self, term: LossTerm) -> LinearClassifier | None:
        head = self.auxiliary_heads[term.name]
        if self._own_heads:
            return linear_classifier(head)
        last = self.get_submodule(self._path.modules[-1])
        if last is not self.get_output_embeddings() or self._path.bias is not None:
            return None
        return linear_classifier(last, self._path.scale, self._path.cap)

    def _head_states(self, term: LossTerm, hidden_states: Tensor) -> Tensor:
        head, hidden_states = self.auxiliary_heads[term.name], self._finished(term, hidden_states)
        return hidden_states if self._own_heads else head(hidden_states)

    def _classifier_input(self, term: LossTerm, hidden_states: Tensor) -> Tensor:
        states = self._head_states(term, hidden_states)
        if self._own_heads:
            return states
        return through(self, self._path.modules[:-1], states)

    def _logits_of(self, term: LossTerm, hidden_states: Tensor) -> list[Tensor]:
        head, states = self.auxiliary_heads[term.name], self._head_states(term, hidden_states)
        return [head(states) if self._own_heads else self._logits(states)]

    def _targets(self, inputs: dict[str, Any], target_counts: Tensor | None) -> Targets:
        if inputs.get("shift_labels") is not None and not self._own_loss.follows_shift_labels:
            raise ValueError(f"the loss of {type(self).__name__} does not follow shift_labels; give labels alone")
        return targets_of(self, inputs, inputs.get("num_items_in_batch"), target_counts)

    def _head_reads(self, term: LossTerm, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """What a term's head reads at each position, `(B, S, n)`, from the model's inputs and its output."""
        return self._head_input(term, outputs)

    def logits_of_head(self, term: LossTerm, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """Logits `(B, S, V)` of a term's head, from the model's inputs and its output with its hidden states."""
        return self._over_all(term, self._logits_of(term, self._head_reads(term, outputs, inputs))[0])

    def _over_all(self, term: LossTerm, logits: Tensor) -> Tensor:
        """Logits `(..., V)` from those of a term's head, which may be of a smaller vocabulary."""
        if (vocabulary := self.draft_vocabulary) is None or term.offset == 1:
            return logits
        return logits.new_full((*logits.shape[:-1], self._vocab_size), NEVER).index_copy(-1, vocabulary, logits)

    def add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        targets = self._targets(inputs, target_counts)
        own_loss: Tensor | None = outputs.loss  # none from a Trainer that computes it itself
        num_items = inputs.get("num_items_in_batch")
        divided = num_items is not None and self._own_loss.follows_num_items
        if own_loss is not None and not divided and (num_items is not None or target_counts is not None):
            own_loss = own_loss * targets.share_of_step()  # the model took the mean over this batch alone

        def main_loss(term: LossTerm) -> Tensor:
            if term.name == self.main and own_loss is not None:
                return own_loss
            return loss_of_logits(outputs.logits, term, targets)

        if not step.runs_heads and own_loss is not None:
            step.add({self.main: own_loss})
            return targets.share_of_step
        if own_loss is not None:
            step.add_main(main_loss)
        self._add_auxiliary_losses(step, outputs, targets, inputs)
        if step.reads:
            add_distillation(step, targets, outputs.logits, self._logits_of)
        return targets.share_of_step

    def prepare(self, step: LossStep) -> None:
        made: dict[str, LinearClassifier] = {}
        for term in step.terms:
            matrix = self._matrix_name(term)
            if term.is_main or term.positions != "all":
                continue
            if matrix not in made and (classifier := self._classifier(term)) is not None:
                made[matrix] = classifier.with_entry()
            if matrix in made:
                step.classifiers[term.name] = made[matrix]

    def _matrix_name(self, term: LossTerm) -> str:
        """A name for the matrix by which a head predicts; heads with the same matrix have the same name."""
        return term.name if self._own_heads else ""

    def _add_auxiliary_losses(self, step: LossStep, outputs: Any, targets: Targets, inputs: dict[str, Any]) -> None:
        terms = [term for term in step.terms if not term.is_main]
        samples = step.samples(terms, targets) or {}
        together: dict[int, tuple[LinearClassifier, list[HeadInput]]] = {}
        for term in terms:
            states, sample = self._head_reads(term, outputs, inputs), samples.get(term)
            states = states if sample is None else sample.of(states)
            step.record(term, states, sample)
            if (classifier := step.classifiers.get(term.name)) is not None:  # one run for all terms that share it
                read = HeadInput(term, self._classifier_input(term, states), sample)
                together.setdefault(id(classifier.weight), (classifier, []))[1].append(read)
                continue
            logits_of = functools.partial(self._logits_of, term)
            if sample is not None:
                step.add({term.name: sampled_loss(states, logits_of, term, sample, targets, self._vocab_size)})
            else:
                # One term at a time: with a large vocabulary, several at once would run on smaller chunks.
                step.add(causal_lm_losses(states, logits_of, [term], targets, self._vocab_size))
        for classifier, reads in together.values():
            step.add(linear_losses(classifier, reads, targets, step.expected_weights(self.loss_uncertainty)))


class Seq2SeqLMWithLosses(LanguageModelWithLosses):
    """The layers are the decoder's. Its input is the labels, shifted by one, so that each position predicts the label there."""

    shifts_labels = False

    @classmethod
    def check(cls, model: PreTrainedModel, anatomy: Anatomy, trace: Trace, heads: str) -> dict[str, Any]:
        if not anatomy.reads_forward:
            raise ValueError(
                f"the decoder of {type(model).__name__} reads in both directions: its layers see the tokens that the heads would"
                " have to predict"
            )
        return cls._checked_loss(model, trace, "aligned", "for the labels") | cls._checked_path(model, trace, heads)


class MaskedLMWithLosses(LanguageModelWithLosses):
    """Each position predicts its label, where it has one. There are no further targets."""

    accepted_settings = [
        name
        for name in LanguageModelWithLosses.accepted_settings
        if name not in ("num_targets", "target_weights", "target_schedule", "position_loss")
    ]
    main = "masked_token"
    takes_target_counts = False
    shifts_labels = False

    @classmethod
    def settings_for(cls, num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        return AuxiliaryLossSettings(
            num_layers=num_layers, num_targets=1, has_last_position=False, main=cls.main, **settings
        )

    @classmethod
    def check(cls, model: PreTrainedModel, anatomy: Anatomy, trace: Trace, heads: str) -> dict[str, Any]:
        return cls._checked_loss(model, trace, "aligned", "for the labels") | cls._checked_path(model, trace, heads)
