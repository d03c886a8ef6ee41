"""Auxiliary losses of classification models: auxiliary classifiers like Inception's."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_charformer.auxiliary_losses import LossStep, classification_loss, last_of_text, sequence_problem_type
from modeling_charformer.loss_settings import AuxiliaryLossSettings, LossTerm, classifier_settings

from .added_losses import ModelWithLosses
from .probe import Anatomy


class SequenceClassifierWithLosses(ModelWithLosses):
    accepted_settings = [
        "intermediate_layers",
        "intermediate_weight",
        "intermediate_schedule",
        "term_weights",
        "loss_weighting",
    ]
    accepted_heads = ("own",)
    main = "classification"
    accepts_loss_kwargs = False  # Transformers' classifiers take means over the batch

    @staticmethod
    def settings_for(num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        renamed = {name.removeprefix("intermediate_"): value for name, value in settings.items()}
        return classifier_settings(num_layers, **renamed)

    @staticmethod
    def check(model: PreTrainedModel, anatomy: Anatomy, heads: str) -> dict[str, Any]:
        return {}

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        return self.linear_head(int(self.config.num_labels or 0), index)

    def add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        labels = inputs["labels"]
        problem_type = sequence_problem_type(self.config.problem_type, int(self.config.num_labels or 0), labels)
        step.add({self.main: outputs.loss})
        for term in step.terms:
            if not term.is_main:
                pooled = self._pooled(self._finished(term, self._head_input(term, outputs)), inputs)
                logits = self.auxiliary_heads[term.name](pooled)
                step.add({term.name: classification_loss(logits, labels, problem_type)})
        return lambda: 1.0

    def _pooled(self, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The state at the first position if the model reads in both directions, else at the last position of text."""
        if not self._anatomy.reads_forward:
            return hidden_states[:, 0]
        mask, pad = inputs.get("attention_mask"), self.config.get_text_config().pad_token_id
        if mask is None and pad is not None and inputs.get("input_ids") is not None:
            mask = inputs["input_ids"] != pad
        return last_of_text(hidden_states, mask)
