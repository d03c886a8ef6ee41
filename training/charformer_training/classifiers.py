"""Auxiliary losses of classification models: auxiliary classifiers like Inception's."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_charformer.auxiliary_losses import IGNORE_INDEX, LossStep, classification_loss, sequence_problem_type
from modeling_charformer.loss_settings import AuxiliaryLossSettings, LossTerm, classifier_settings

from .added_losses import ModelWithLosses
from .probe import Trace, through
from .probe_layers import Anatomy
from .probe_loss import own_loss_of
from .probe_pooling import Pooling, counted, pooled, pooling_of


class ClassifierWithLosses(ModelWithLosses):
    accepted_settings = [
        "intermediate_layers",
        "intermediate_weight",
        "intermediate_schedule",
        "term_weights",
        "loss_weighting",
    ]
    accepted_heads = ("own",)
    main = "classification"
    shifts_labels = False

    @classmethod
    def settings_for(cls, num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        renamed = {name.removeprefix("intermediate_"): value for name, value in settings.items()}
        return classifier_settings(num_layers, **renamed)

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        return self.linear_head(int(self.config.num_labels or 0), index)


class SequenceClassifierWithLosses(ClassifierWithLosses):
    accepts_loss_kwargs = False  # Transformers' classifiers take means over the batch
    _pooling: Pooling

    @classmethod
    def check(cls, model: PreTrainedModel, anatomy: Anatomy, trace: Trace, heads: str) -> dict[str, Any]:
        pooling = pooling_of(model, trace)
        if pooling is None:
            raise ValueError(
                f"the classifier of {type(model).__name__} reads neither one position nor the mean of its last hidden state, so"
                " auxiliary classifiers cannot do the same with other layers"
            )
        return {"_pooling": pooling}

    def add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        labels = inputs["labels"]
        problem_type = sequence_problem_type(self.config.problem_type, int(self.config.num_labels or 0), labels)
        step.add({self.main: outputs.loss})
        for term in step.terms:
            if not term.is_main:
                logits = self._classified(term, self._head_input(term, outputs), inputs)
                step.add({term.name: classification_loss(logits, labels, problem_type)})
        return lambda: 1.0

    def _classified(self, term: LossTerm, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The logits `(B, num_labels)` of a term."""
        mask = counted(self._pooling.operation, inputs, self.config)
        vector = pooled(self._finished(term, hidden_states), self._pooling, mask)
        logits: Tensor = self.auxiliary_heads[term.name](vector)
        return logits


class ImageClassifierWithLosses(SequenceClassifierWithLosses):
    """Each head pools its layer's output as the model's head pools the last one.

    It reads this output after the model's final norm, if all layers have the width of the last one and the norm comes
    before the pooling. Otherwise a layer norm of the head's own comes after the pooling.
    """

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        width = self._anatomy.widths[term.layer]
        if self._pooling.operation == "first_and_mean":
            width *= 2
        head = self.linear_head(int(self.config.num_labels or 0), index, width)
        return head if self._has_final_norm else nn.Sequential(nn.LayerNorm(width), head)

    @property
    def _has_final_norm(self) -> bool:
        modules = (*(self._anatomy.tail or ()), *self._pooling.modules)
        return bool(modules) and {*self._anatomy.widths.values()} == {self._anatomy.width}

    def _finished(self, term: LossTerm, hidden_states: Tensor) -> Tensor:
        if not self._has_final_norm:
            return hidden_states
        return through(self, (*(self._anatomy.tail or ()), *self._pooling.modules), hidden_states)


class TokenClassifierWithLosses(ClassifierWithLosses):
    accepts_loss_kwargs = True

    @classmethod
    def check(cls, model: PreTrainedModel, anatomy: Anatomy, trace: Trace, heads: str) -> dict[str, Any]:
        own_loss = own_loss_of(model, trace)
        if own_loss.layout != "aligned":
            raise ValueError(
                f"the loss of {type(model).__name__} is not the mean cross-entropy of its logits for the label of each token, so"
                " the auxiliary losses would not be comparable"
            )
        return {"_own_loss": own_loss}

    def add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        labels, num_items, own_loss = inputs["labels"], inputs.get("num_items_in_batch"), outputs.loss
        share = 1.0 if num_items is None else labels.ne(IGNORE_INDEX).sum() / num_items
        step.add({self.main: own_loss if self._own_loss.follows_num_items else own_loss * share})
        for term in step.terms:
            if not term.is_main:
                logits = self.auxiliary_heads[term.name](self._finished(term, self._head_input(term, outputs)))
                value = classification_loss(logits, labels, "single_label_classification", num_items)
                step.add({term.name: value})
        return lambda: share
