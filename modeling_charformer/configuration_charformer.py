"""Configuration of the Charformer model: its architecture and its auxiliary losses."""

import difflib
import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .auxiliary_losses import LossTerm, loss_terms, schedule_names
from .hub import CharformerPushToHubMixin


AUTO_MAP = {
    "AutoConfig": "configuration_charformer.CharformerConfig",
    "AutoModel": "modeling_charformer.CharformerModel",
    "AutoModelForCausalLM": "modeling_charformer.CharformerForCausalLM",
}


@strict
class CharformerConfig(CharformerPushToHubMixin, PreTrainedConfig):
    r"""Settings of a Charformer; the defaults are the 12-layer model (T12) of Al-Rfou et al. (2018, arXiv 1808.04444).

    A field that is close to a known one but misspelt raises; a field with an unrelated name is kept as an attribute,
    as everywhere in Transformers. A wrong value raises when the configuration is built, and again when a model is
    built from it (then also for values that were assigned later), as
    `huggingface_hub.errors.StrictDataclassFieldValidationError` (a type) or `StrictDataclassClassValidationError`.

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
        initializer_range: Standard deviation of the initial weights (not stated in the paper).
        layer_norm_eps: Epsilon of the layer norms.
        norm_placement: `"pre"` (norms before attention and feed-forward, and one after the last layer) or `"post"`
            (norms after each residual sum). The paper does not say which it used.
        tie_word_embeddings: Whether the next-character classifier of the final layer is the embedding's matrix.
        use_cache: Whether the forward pass returns the key-value cache by default.
        pad_token_id, bos_token_id, eos_token_id: Special symbols; none by default, since all 256 bytes are text.
        num_targets: Number of characters predicted at each position, `K`; 1 is only the next.
        target_weights: Weights of targets 2..K; `None` is the paper's 0.5 each.
        intermediate_layers: Layers with losses of their own: `"all"`, a list of numbers in 1..n-1, or `None`.
        intermediate_weight: Factor on the losses of all intermediate layers; the paper's is 1.
        intermediate_schedule: How that factor changes with the share of training done: `"paper"` (layer `l` of `n`
            drops out when `l / (2n)` is done), `"constant"`, `"linear"`, `"cosine"`, or a name given to
            `register_schedule`.
        position_loss: `"all"`: each position of the window counts alike; `"last"`: only the last one.
    """

    model_type = "charformer"
    keys_to_ignore_at_inference = ["past_key_values", "loss_dict", "loss_weights"]
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
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-5
    norm_placement: str = "pre"
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    num_targets: int = 2
    target_weights: list[float | int] | tuple[float | int, ...] | None = None
    intermediate_layers: str | list[int] | tuple[int, ...] | None = "all"
    intermediate_weight: float | int = 1.0
    intermediate_schedule: str = "paper"
    position_loss: str = "all"

    def __post_init__(self, **kwargs):
        own_fields = CharformerConfig.__annotations__
        for name in kwargs:
            # Names the base class knows arrive here too.
            close = [] if hasattr(self, name) else difflib.get_close_matches(name, own_fields, n=1, cutoff=0.8)
            if close:
                raise ValueError(
                    f"CharformerConfig has no field {name!r} (given {kwargs[name]!r}); meant {close[0]!r}?"
                )
        # Saving one class writes its own entry only; a repository is to load with every Auto class.
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) does not divide hidden_size ({self.hidden_size})"
            )
        for name in ("attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in the range from 0 to below 1")
        for name in ("initializer_range", "layer_norm_eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number above 0")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; Transformers knows {sorted(ACT2FN)}")
        if self.norm_placement not in ("pre", "post"):
            raise ValueError(f"norm_placement is {self.norm_placement!r}; it must be 'pre' or 'post'")

    def validate_auxiliary_losses(self):
        if self.num_targets < 1 or self.num_targets >= self.max_position_embeddings:
            raise ValueError(
                f"num_targets is {self.num_targets}; it must be 1 or more and below max_position_embeddings"
                f" ({self.max_position_embeddings})"
            )
        if self.target_weights is not None:
            if len(self.target_weights) != self.num_targets - 1:
                raise ValueError(
                    f"target_weights has {len(self.target_weights)} entries ({list(self.target_weights)}); with"
                    f" num_targets={self.num_targets} it needs {self.num_targets - 1}: one for each target from 2 on"
                )
            for weight in self.target_weights:
                self._check_weight("target_weights", weight)
        self._check_weight("intermediate_weight", self.intermediate_weight)
        self._check_intermediate_layers()
        if self.intermediate_schedule not in schedule_names():
            raise ValueError(
                f"intermediate_schedule is {self.intermediate_schedule!r}; known schedules: {schedule_names()}."
                " A schedule of your own is made known with modeling_charformer.register_schedule(name, function)"
            )
        if self.position_loss not in ("all", "last"):
            raise ValueError(f"position_loss is {self.position_loss!r}; it must be 'all' or 'last'")

    @staticmethod
    def _check_weight(name: str, weight: float) -> None:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name} contains {weight}; a weight is a finite number that is 0 or more")

    def _check_intermediate_layers(self) -> None:
        layers, last = self.intermediate_layers, self.num_hidden_layers - 1
        if layers is None or layers == "all":
            return
        if isinstance(layers, str):
            raise ValueError(f"intermediate_layers is {layers!r}; it must be 'all', a list of layer numbers, or None")
        wrong = [layer for layer in layers if not 1 <= layer <= last]
        if wrong:
            raise ValueError(
                f"intermediate_layers contains {wrong}; with num_hidden_layers={self.num_hidden_layers} the intermediate"
                f" layers are 1 to {last}" + (" (there are none)" if last == 0 else "")
            )
        if len(set(layers)) != len(layers):
            raise ValueError(f"intermediate_layers names a layer twice: {list(layers)}")

    def loss_terms(self) -> tuple[LossTerm, ...]:
        """All terms of the training loss that these settings ask for, the main one (`next_char`) first."""
        return loss_terms(
            self.num_hidden_layers,
            self.num_targets,
            self.target_weights,
            self.intermediate_layers,
            self.intermediate_weight,
        )


# What is saved takes its code along, and so does what is loaded with that code and saved again.
CharformerConfig.register_for_auto_class()

__all__ = ["CharformerConfig"]
