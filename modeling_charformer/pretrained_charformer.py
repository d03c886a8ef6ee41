"""The base class of all Charformers: initial weights, loading, pushing, a copy for inference; and their outputs."""

import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from .auxiliary_heads import TRAINING_ONLY, AuxiliaryHead, UncertaintyWeighting, ZeroLinear
from .configuration_charformer import CharformerConfig
from .hub import CharformerPushToHubMixin
from .layers_charformer import CharformerAttention, CharformerLayer
from .loss_settings import AuxiliaryLossSettings
from .tokenization_charformer import CharformerTokenizer


# Prefixes of the names of weights that only some kinds of models have: the heads for inference.
HEADS = ("lm_head.", "score.")

Model = TypeVar("Model", bound="CharformerPreTrainedModel")


@dataclass
class CharformerCausalLMOutput(CausalLMOutputWithPast):
    """Output of `CharformerForCausalLM`: that of any causal language model, and the breakdown of its loss.

    `loss_dict` maps the name of each term to its raw, unweighted value (float32 scalars, nats). `loss_weights` maps the same
    names to their current weights, so that `loss == sum(loss_weights[name] * loss_dict[name])`; learned weights are tensors.
    `final_hidden_state` `(B, S, hidden_size)` is the input of the next-character head, returned on request.
    """

    loss_dict: dict[str, Tensor] | None = None
    loss_weights: dict[str, float | Tensor] | None = None
    final_hidden_state: Tensor | None = None


@dataclass
class CharformerClassifierOutput(SequenceClassifierOutput):
    """Output of the classification models: that of Transformers, and the breakdown of the loss as above."""

    loss_dict: dict[str, Tensor] | None = None
    loss_weights: dict[str, float | Tensor] | None = None


class CharformerPreTrainedModel(CharformerPushToHubMixin, PreTrainedModel):
    """The base class of all Charformers.

    `loss_settings` says which losses the model is trained with. `CharformerModel`, which has no losses, does not set it.
    """

    config: CharformerConfig
    loss_settings: AuxiliaryLossSettings
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CharformerLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CharformerLayer, "attentions": CharformerAttention}
    # The list does not name the inference heads of other kinds of models. Engines like vLLM put a head on a
    # `CharformerModel`, and could not load its weights if they were named.
    _keys_to_ignore_on_load_unexpected: list[str] | set[str] | None = [
        f"^{name}".replace(".", r"\.") for name in TRAINING_ONLY
    ]

    def __init__(self, config: CharformerConfig):
        # `from_pretrained(..., hidden_size=...)` assigns values to a config that is built already. Each value is checked
        # when it is assigned; whether they fit together is checked here.
        config.validate()
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AuxiliaryHead):
            module.draw(self.config.initializer_range)
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, UncertaintyWeighting):
            for log_variance in module.log_variances.values():
                init.zeros_(log_variance)
        else:
            super()._init_weights(module)

    def post_init(self) -> None:
        """Initialise the weights, and remove from the names ignored on loading those that this model has."""
        super().post_init()
        names, listed = self.state_dict().keys(), self._keys_to_ignore_on_load_unexpected or ()
        has = {pattern for pattern in listed if any(re.search(pattern, name) for name in names)}
        self._keys_to_ignore_on_load_unexpected = set(listed) - has

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Do not report the heads of other kinds of models: any kind loads from any other's checkpoint."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        others = (*HEADS, *TRAINING_ONLY)
        loading_info.unexpected_keys = {name for name in loading_info.unexpected_keys if not name.startswith(others)}

    def _uncertainty_weighting(self) -> UncertaintyWeighting | None:
        """The learned weights of the terms of `loss_settings`, or `None` if the weighting is fixed."""
        if self.loss_settings.loss_weighting == "fixed":
            return None
        return UncertaintyWeighting([term.name for term in self.loss_settings.terms])

    def _heads_of_terms(self, num_outputs: int) -> nn.ModuleDict:
        """A linear head for each auxiliary term of `loss_settings`, by the term's name.

        Create them before the layers. DistributedDataParallel reduces gradients from the last parameter to the first,
        and those of the heads on the first layers are ready last.
        """
        names = [term.name for term in self.loss_settings.terms if not term.is_main]
        return nn.ModuleDict(
            {
                name: AuxiliaryHead(self.config.hidden_size, num_outputs, index)
                for index, name in enumerate(names, start=1)
            }
        )

    def without_auxiliary_heads(self: Model) -> Model:
        """A copy of the model without the weights that exist for training only.

        Its logits are the same, and a quantized model stays quantized. PEFT adapters are merged into its weights. It can
        be trained further only without auxiliary losses.
        """
        left_out: dict[int, nn.ModuleDict | None] = {
            id(module): nn.ModuleDict() if isinstance(module, nn.ModuleDict) else None
            for name, module in self.named_children()
            if f"{name}." in TRAINING_ONLY
        }
        model = copy.deepcopy(self, left_out)
        for name, module in [*model.named_modules()]:
            if hasattr(module, "merge") and hasattr(module, "get_base_layer"):  # a layer with a PEFT adapter
                module.merge()
                model.set_submodule(name, module.get_base_layer())
        config = model.config
        config.num_targets, config.target_weights, config.intermediate_layers = 1, None, None
        config.target_heads = "linear"
        config.classifier_layers, config.term_weights, config.loss_weighting = None, None, "fixed"
        config.distillation = 0.0
        model.loss_settings = config.language_model_losses() if self.can_generate() else config.classifier_losses()
        return model

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> CommitInfo:
        """Add a tokenizer to a repository that has none. It needs no training, because ids are bytes."""
        name, options = "tokenizer_config.json", {key: kwargs.get(key) for key in ("token", "revision")}
        if not (Path(working_dir, name).exists() or HfApi().file_exists(repo_id, name, **options)):
            CharformerTokenizer.for_model(self.config).save_pretrained(working_dir)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _card_facts(self) -> str:
        config, parameters = self.config, self.num_parameters()
        heads = sum(weight.numel() for name, weight in self.named_parameters() if name.startswith(TRAINING_ONLY))
        facts = {
            "Layers, width, attention heads": f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}",
            "Window, bytes": f"{config.max_position_embeddings:,}",
            "Parameters for inference": f"{parameters - heads:,}",
            "Parameters of the auxiliary classifiers, for training only": f"{heads:,}",
        }
        rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
        return f"| | |\n| --- | --- |\n{rows}"

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize like any model of Transformers, and the auxiliary heads of a language model with it.

        Ids from 256 on are added tokens. New rows of the heads are drawn from the distribution of their initial weights.
        """
        embeddings: nn.Embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        heads: Any = getattr(self, "auxiliary_heads", {})
        for name, head in list(heads.items()):
            heads[name] = head.resized(self.config.vocab_size, self.config.initializer_range)
        return embeddings
