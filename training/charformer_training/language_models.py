"""Auxiliary losses of masked language models and of encoder-decoders, whose labels are not shifted."""

from typing import Any

from transformers import PreTrainedModel

from modeling_charformer.loss_settings import AuxiliaryLossSettings

from .causal_lm import CausalLMWithLosses
from .probe import Anatomy, Trace


class Seq2SeqLMWithLosses(CausalLMWithLosses):
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


class MaskedLMWithLosses(CausalLMWithLosses):
    """Each position predicts its label, where it has one. There are no further targets."""

    accepted_settings = [
        name
        for name in CausalLMWithLosses.accepted_settings
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
