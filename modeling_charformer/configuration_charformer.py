"""Configuration of the Charformer model: its architecture and its auxiliary losses."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .hub import CharformerPushToHubMixin
from .loss_settings import AuxiliaryLossSettings, LossFields, classifier_settings


AUTO_MAP = {
    "AutoConfig": "configuration_charformer.CharformerConfig",
    "AutoModel": "modeling_charformer.CharformerModel",
    "AutoModelForCausalLM": "modeling_charformer.CharformerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_charformer.CharformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_charformer.CharformerForTokenClassification",
}
TARGET_HEADS = ("linear", "residual", "sequential")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Limits far above what a character-level model needs, so that a wrong configuration raises before it fills the memory.
MAX_LAYERS, MAX_HEADS, MAX_LABELS, MAX_PARAMETERS = 10_000, 100_000, 1_000_000, 10**11

logger = logging.get_logger(__name__)


# The names that the configurations of other models give to fields.
OTHER_NAMES = {
    "vocab_size": ("n_vocab",),
    "hidden_size": ("n_embd", "n_embed", "d_model", "dim", "embed_dim", "hidden_dim", "model_dim"),
    "intermediate_size": ("n_inner", "d_inner", "d_ff", "ffn_dim", "ffn_hidden_size"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "max_position_embeddings": (
        *("n_positions", "n_ctx", "block_size", "max_seq_len", "max_seq_length", "max_sequence_length"),
        *("seq_len", "seq_length", "context_length", "context_size"),
    ),
    "hidden_act": ("activation_function", "hidden_activation"),
    "attention_dropout": ("attn_pdrop", "attention_probs_dropout_prob"),
    "attention_dropout and activation_dropout": (
        *("dropout", "dropout_rate", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "embd_pdrop"),
    ),
    "initializer_range": ("init_std", "initializer_std"),
}


def _close_field(name: str) -> str | None:
    """The field that the unknown `name` probably means: a misspelling, or another model's name for it."""
    for field, others in OTHER_NAMES.items():
        if name in others:
            return field
    close = difflib.get_close_matches(name, OWN_FIELDS, n=1, cutoff=0.8)
    return close[0] if close else None


def _check_names(given: Mapping[str, Any]) -> None:
    """Refuse names that are no fields, also of the base class, but look like one."""
    for name, value in given.items():
        close = None if hasattr(CharformerConfig, name) else _close_field(name)
        if close:
            raise ValueError(f"CharformerConfig has no field {name!r} (given {value!r}); meant {close}?")


def parameter_counts(fields: Mapping[str, Any]) -> dict[str, int]:
    """About how many parameters each size accounts for, in training, by the name of the field that is its factor.

    Args:
        fields: Fields of a `CharformerConfig`. Those that are missing have its defaults.
    """
    names = (*SIZES, "num_targets", "intermediate_layers")
    given = {name: fields.get(name, getattr(CharformerConfig, name)) for name in names}
    layers, width, vocab_size = given["num_hidden_layers"], given["hidden_size"], given["vocab_size"]
    chosen = given["intermediate_layers"]
    layers_with_heads = layers if isinstance(chosen, str) else 1 + len(chosen or ())
    return {
        "num_targets": given["num_targets"] * layers_with_heads * vocab_size * width,
        "vocab_size": vocab_size * width,
        "max_position_embeddings": layers * given["max_position_embeddings"] * width,
        "hidden_size": 4 * layers * width**2,
        "intermediate_size": 2 * layers * width * given["intermediate_size"],
    }


@strict
class CharformerConfig(LossFields, CharformerPushToHubMixin, PreTrainedConfig):
    r"""Settings of a Charformer; the defaults are the 12-layer model (T12) of Al-Rfou et al. (2018, arXiv 1808.04444).

    A misspelt field raises, and so does another model's name for one, such as `n_layer`. A field with an
    unrelated name is kept as an attribute, like everywhere in Transformers.

    Wrong values raise when the configuration is built. Values assigned later are checked when a model is built from it. The
    errors are `StrictDataclassFieldValidationError` for a wrong type and `StrictDataclassClassValidationError`
    otherwise, both in `huggingface_hub.errors`.

    The fields of the losses, from `num_targets` to `loss_weighting`, are those of `LossFields`.

    Args:
        vocab_size: Number of symbols: the 256 byte values.
        hidden_size: Width of the layers.
        intermediate_size: Width of the feed-forward layers.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of attention heads; divides `hidden_size`.
        max_position_embeddings: Length of the window in characters. Positions are learned, one table per layer, so
            this is a hard limit.
        hidden_act: Activation of the feed-forward layers, by its name in Transformers.
        attention_dropout: Dropout of the attention weights.
        activation_dropout: Dropout after the activation of the feed-forward layers.
        layer_dropout: Probability that the last layer is skipped for a row of the batch in training. It falls to 0 at the
            first layer (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710, section 4.1.1).
        layer_dropout_schedule: `"constant"`, for fine-tuning, or `"exponential"`, for training from scratch: layer
            dropout then rises from 0 to its value in the course of training.
        initializer_range: Standard deviation of the initial weights (not stated in the paper).
        layer_norm_eps: Epsilon of the layer norms.
        norm_placement: `"pre"` (norms before attention and feed-forward, and one after the last layer) or `"post"`
            (norms after each residual sum). The paper does not say which it used.
        tie_word_embeddings: Whether the next-character classifier of the final layer is the embedding's matrix.
        use_cache: Whether the forward pass returns the key-value cache by default.
        pad_token_id, bos_token_id, eos_token_id: Special symbols, by default those of `CharformerTokenizer`: bytes that UTF-8 never
            uses. `None` means that there is none, for example for binary data, since `generate` stops at eos. The
            default is `None` if the vocabulary is too small for the byte.
        target_heads: The heads of targets 2..K of the final layer. `"linear"`: the paper's linear classifiers. `"residual"`:
            a residual block before each (like Medusa, Cai et al. 2024, arXiv 2401.10774). `"sequential"`: blocks that
            also read the characters in between, one after the other (like Hydra, Ankner et al. 2024, arXiv
            2402.05109); they draft best for `generate(use_extra_targets=True)`.
        classifier_layers: Layers of a sequence or token classifier that have an auxiliary classifier in training:
            `"thirds"` (after one and two thirds of the layers, as in Inception), `"all"`, a list of numbers, or `None`.
        classifier_weight: Weight of the losses of the auxiliary classifiers.
        classifier_schedule: How it changes in training; see `intermediate_schedule`.
    """

    model_type = "charformer"
    attribute_map = {"loss_weights": "term_weights"}  # what earlier versions saved
    keys_to_ignore_at_inference = ["cache", "past_key_values", "loss_dict", "loss_weights", "final_hidden_state"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }

    vocab_size: int = 256
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 2
    max_position_embeddings: int = 512
    hidden_act: str = "relu"
    attention_dropout: float | int = 0.55
    activation_dropout: float | int = 0.55
    layer_dropout: float | int = 0.0
    layer_dropout_schedule: str = "constant"
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-5
    norm_placement: str = "pre"
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 255
    bos_token_id: int | None = 253
    eos_token_id: int | list[int] | None = 254

    target_heads: str = "linear"
    classifier_layers: str | list[int] | tuple[int, ...] | None = "thirds"
    classifier_weight: float | int = 0.3
    classifier_schedule: str = "constant"

    def __post_init__(self, **kwargs: Any) -> None:
        _check_names(kwargs)
        quantization = kwargs.get("quantization_config")
        if not (quantization is None or isinstance(quantization, Mapping) or hasattr(quantization, "to_dict")):
            raise ValueError(
                f"quantization_config is {quantization!r}; it must be a mapping, a configuration of Transformers, or None"
            )
        num_labels = kwargs.get("num_labels")
        # Checked first, because the base class creates a name for each label.
        if isinstance(num_labels, int) and num_labels > MAX_LABELS:
            raise ValueError(f"num_labels is {num_labels}; it must be {MAX_LABELS} or less")
        for name, default in (("pad_token_id", 255), ("bos_token_id", 253), ("eos_token_id", 254)):
            if getattr(self, name) == default >= self.vocab_size:
                setattr(self, name, None)
        # By default saving a model writes the entry of its class only. A repository should load with every Auto class.
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Load like any configuration. A saved attribute with a name that the constructor refuses loads with a warning.

        Raises:
            ValueError: If a field is given in `kwargs` that does not exist.
        """
        _check_names(kwargs)
        odd = {name: close for name in config_dict if not hasattr(cls, name) and (close := _close_field(name))}
        for name, close in odd.items():
            logger.warning_once(
                f"the configuration holds {name!r}, which is no field of a Charformer and changes nothing; it has {close}"
            )
        loaded = super().from_dict({name: value for name, value in config_dict.items() if name not in odd}, **kwargs)
        for name in odd:
            setattr(loaded[0] if isinstance(loaded, tuple) else loaded, name, config_dict[name])
        return loaded

    def validate_architecture(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        self._check_size()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) does not divide hidden_size ({self.hidden_size})"
            )
        for name in ("attention_dropout", "activation_dropout", "layer_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in the range from 0 to below 1")
        if self.layer_dropout and self.num_hidden_layers == 1:
            raise ValueError(
                f"layer_dropout is {self.layer_dropout}; a model of 1 layer has none to drop, so it must be 0"
            )
        if self.layer_dropout_schedule not in ("constant", "exponential"):
            raise ValueError(
                f"layer_dropout_schedule is {self.layer_dropout_schedule!r}; it must be 'constant' or 'exponential'"
            )
        for name in ("initializer_range", "layer_norm_eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number above 0")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; Transformers knows {sorted(ACT2FN)}")
        if self.norm_placement not in ("pre", "post"):
            raise ValueError(f"norm_placement is {self.norm_placement!r}; it must be 'pre' or 'post'")

    def _check_size(self) -> None:
        """Raise if the model would be too large for any memory: the configuration may come from an unknown source."""
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}; it must be {MAX_LAYERS} or less")
        if self.num_targets * self.num_hidden_layers > MAX_HEADS:
            raise ValueError(
                f"num_targets ({self.num_targets}) times num_hidden_layers ({self.num_hidden_layers}) must be"
                f" {MAX_HEADS} or less: each layer may have a classifier for each target"
            )
        sizes = parameter_counts(vars(self))
        if sum(sizes.values()) > MAX_PARAMETERS:
            largest = max(sizes, key=lambda name: sizes[name])
            raise ValueError(
                f"{largest} is {getattr(self, largest)}: with hidden_size {self.hidden_size} and num_hidden_layers"
                f" {self.num_hidden_layers} the model would have {sum(sizes.values()):.1e} parameters; {MAX_PARAMETERS:.0e}"
                " is the most that is taken"
            )

    def validate_auxiliary_losses(self) -> None:
        if self.num_targets >= self.max_position_embeddings:
            raise ValueError(
                f"num_targets is {self.num_targets}; it must be 1 or more and below max_position_embeddings"
                f" ({self.max_position_embeddings})"
            )
        if self.target_heads not in TARGET_HEADS:
            raise ValueError(f"target_heads is {self.target_heads!r}; it must be one of {TARGET_HEADS}")
        names = [
            *dict.fromkeys(
                term.name for term in (*self.language_model_losses().terms, *self.classifier_losses().terms)
            )
        ]
        wrong = [name for name in self.term_weights or {} if name not in names]
        if wrong:
            raise ValueError(f"term_weights names {wrong}; the terms of these settings are {names}")

    def language_model_losses(self) -> AuxiliaryLossSettings:
        """The losses that a language model with this configuration is trained with."""
        values = {item.name: getattr(self, item.name) for item in fields(LossFields) if item.name != "term_weights"}
        return self._with_term_weights(AuxiliaryLossSettings(num_layers=self.num_hidden_layers, **values))

    def classifier_losses(self) -> AuxiliaryLossSettings:
        """The losses that a sequence or token classifier with this configuration is trained with."""
        return self._with_term_weights(
            classifier_settings(
                self.num_hidden_layers,
                self.classifier_layers,
                self.classifier_weight,
                self.classifier_schedule,
                loss_weighting=self.loss_weighting,
                prefix="classifier",
            )
        )

    def _with_term_weights(self, settings: AuxiliaryLossSettings) -> AuxiliaryLossSettings:
        """`settings` with those of `term_weights` that name its terms. The others belong to another kind of model."""
        names = {term.name for term in settings.terms}
        weights = {name: weight for name, weight in (self.term_weights or {}).items() if name in names}
        return replace(settings, term_weights=weights or None)

    @classmethod
    def recommended(cls, purpose: str = "much_text", **fields: Any) -> "CharformerConfig":
        """Losses and dropout for practical use. Their gains and costs are measured in the project's docs/evidence.md.

        Args:
            purpose: What the model is trained for:

                - `"much_text"`: text that training sees once or a few times. No auxiliary losses, no dropout.
                - `"little_text"`: text that training sees so often that a model overfits. The paper's losses, and dropout. In
                  a deep model also give `intermediate_layers=None`: losses on all layers outweigh the main one.
                - `"drafting"`: fast generation, by `generate(use_extra_targets=True)`. Eight targets with sequential heads.
            fields: The model's other fields, and values in place of these.

        Raises:
            ValueError: If `purpose` is none of these; for fields that are wrong, as `CharformerConfig`.
        """
        no_dropout = {"attention_dropout": 0.0, "activation_dropout": 0.0}
        losses: dict[str, dict[str, Any]] = {
            "much_text": {"num_targets": 1, "intermediate_layers": None, **no_dropout},
            "little_text": {"attention_dropout": 0.2, "activation_dropout": 0.2},
            "drafting": {
                "intermediate_layers": None,
                "num_targets": 8,
                "target_weights": [0.2] * 7,
                "target_schedule": "forward",
                "target_heads": "sequential",
                **no_dropout,
            },
        }
        if purpose not in losses:
            raise ValueError(f"purpose is {purpose!r}; it must be one of {sorted(losses)}")
        return cls(**(losses[purpose] | fields))


OWN_FIELDS = (*LossFields.__annotations__, *CharformerConfig.__annotations__)

# A saved configuration includes its code, also when it was loaded with that code.
CharformerConfig.register_for_auto_class()

__all__ = ["CharformerConfig"]
