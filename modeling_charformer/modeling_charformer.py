"""The character-level Transformer of Al-Rfou et al. (2018, arXiv 1808.04444) with its auxiliary losses.

Shapes: B batch, S sequence (of queries), H heads, D head size, V vocabulary, K number of targets.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .auxiliary_heads import ResidualBlock
from .auxiliary_losses import (
    IGNORE_INDEX,
    LossStep,
    Targets,
    classification_loss,
    last_of_text,
    loss_of_logits,
    sequence_problem_type,
)
from .compatibility import CACHE, check_arguments, check_ids, check_mask, check_range, one_cache
from .configuration_charformer import CharformerConfig
from .distillation import add_distillation
from .generation_charformer import CharformerGenerationMixin
from .heads_charformer import CharformerHeadsMixin
from .layers_charformer import CharformerLayer, rows_to_run
from .loss_settings import AuxiliaryLossSettings, LossTerm
from .pretrained_charformer import CharformerCausalLMOutput, CharformerClassifierOutput, CharformerPreTrainedModel
from .unused_losses import LossWatch


class CharformerModel(CharformerPreTrainedModel):
    """The embedding and the layers: from ids to the last hidden state."""

    def __init__(self, config: CharformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # The output of post-norm layers is normalised already. The norm is created before the layers, like the heads that
        # read its output; `_heads_of_terms` says why.
        pre_norm = config.norm_placement == "pre"
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if pre_norm else nn.Identity()
        self.layers = nn.ModuleList([CharformerLayer(config, index) for index in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        on_layer_output: Mapping[int, Callable[[Tensor], None]] | None = None,
        positions_to_keep: int = 0,
        num_layers: int | None = None,
        training_progress: float | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `(B, S)`, or `inputs_embeds` `(B, S, hidden_size)` instead.
            attention_mask: `(B, S_past + S)`, 1 for text and 0 for padding. Padding does not count in positions.
            position_ids: `(B, S)`, in the window; computed from the mask and the cache by default.
            cache: Keys and values of the preceding text. `past_key_values` is its name up to Transformers 5.23.
            on_layer_output: Callbacks by layer number (1..n). Each is called with that layer's output `(B, S, hidden_size)`,
                before the final norm, as soon as the layer has run. Losses computed there are back-propagated just before
                their layer, so only one layer's auxiliary gradient is in memory at a time.
            positions_to_keep: Number of last positions that the last layer computes; 0 means all.
            num_layers: Run only this many layers (1..n). `last_hidden_state` is then their output after the final norm.
            training_progress: Share of training done, 0 to 1, for the schedule of layer dropout; `None` means 0.

        Raises:
            TypeError: If an unknown argument could change the result.
            ValueError: If the sequence and the cached text together are longer than the window, or if an id is outside
                the vocabulary. Ids are checked on the CPU only: elsewhere the check would wait for the device.
        """
        cache = one_cache(cache, past_key_values)
        if cache is None or isinstance(cache, Cache):  # continuous batching has another cache and more arguments
            check_arguments(kwargs, self.config._attn_implementation, position_ids is not None)
        if input_ids is not None and inputs_embeds is None:
            check_ids("input_ids", input_ids)
            check_range("input_ids", input_ids, self.config.vocab_size, "vocab_size")
            inputs_embeds = self.embed_tokens(input_ids)
        elif inputs_embeds is None or input_ids is not None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        # Taken before an empty cache is created: only without a cache does the mask keep packed texts apart.
        cache_of_mask: dict[str, Any] = {CACHE: cache}
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_of_mask,
        )
        position_ids = self._positions_in_window(inputs_embeds, attention_mask, position_ids, cache)

        hidden_states, on_layer_output = inputs_embeds, on_layer_output or {}
        last_mask = self._mask_of_last_positions(causal_mask, hidden_states, positions_to_keep)
        if num_layers is not None and not 1 <= num_layers <= len(self.layers):
            raise ValueError(f"num_layers is {num_layers}; it must be 1 to {len(self.layers)}")
        layers = self.layers if num_layers is None else self.layers[:num_layers]
        runs = rows_to_run(self.config, hidden_states, training_progress, self.training)
        for number, layer in enumerate(layers, start=1):
            is_last = number == len(layers)
            hidden_states = layer(
                hidden_states,
                position_ids=position_ids,
                attention_mask=last_mask if is_last else causal_mask,
                cache=cache,
                positions_to_keep=positions_to_keep if is_last else 0,
                input_is_kept=number - 1 in on_layer_output,
                runs=runs[number - 1],
                **kwargs,
            )
            if number in on_layer_output:
                on_layer_output[number](hidden_states)
        outputs: dict[str, Any] = {"last_hidden_state": self.norm(hidden_states), CACHE: cache}
        return BaseModelOutputWithPast(**outputs)

    def _mask_of_last_positions(self, causal_mask: Any, inputs_embeds: Tensor, positions_to_keep: int) -> Any:
        length = inputs_embeds.shape[1]
        if positions_to_keep in (0, length):
            return causal_mask
        if not 0 < positions_to_keep < length:
            raise ValueError(
                f"positions_to_keep is {positions_to_keep}; it must be 0 to {length}, the sequence's length"
            )
        if isinstance(causal_mask, Tensor):
            return causal_mask[:, :, -positions_to_keep:]
        if causal_mask is not None:
            raise ValueError(
                f"positions_to_keep needs attn_implementation 'sdpa' or 'eager', not {self.config._attn_implementation!r}"
            )
        if positions_to_keep == 1:
            return None  # the last position attends to all
        # SDPA's built-in causal mask would let the first of these queries attend to the first key only.
        ones = torch.ones(positions_to_keep, length, dtype=torch.bool, device=inputs_embeds.device)
        return ones.tril(length - positions_to_keep)[None, None]

    def _positions_in_window(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        window, length = self.config.max_position_embeddings, inputs_embeds.shape[1]
        if position_ids is not None:
            check_range("position_ids", position_ids, window, "max_position_embeddings")
            return position_ids
        past = cache.get_seq_length() if cache is not None else 0
        # The length of a static cache is a tensor. Reading it would wait for the device, and export does not support it.
        if not isinstance(past, Tensor) and past + length > window:
            raise ValueError(
                f"the sequence is {past + length} characters long"
                + (f" ({past} of them cached)" if past else "")
                + f", longer than the window of max_position_embeddings={window}; shorten the text"
            )
        if attention_mask is not None and attention_mask.dim() == 2:
            check_mask(attention_mask)
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)


class CharformerForCausalLM(  # type: ignore[misc]  # bases differ in `generate`
    CharformerHeadsMixin, CharformerPreTrainedModel, CharformerGenerationMixin, GenerationMixin
):
    """A Charformer that predicts the next character and, in training, the targets of the auxiliary losses.

    `auxiliary_heads` maps the name of each term of `config.language_model_losses().terms` to its head. The terms that
    `lm_head` predicts have none there.

    In a pre-norm model every head reads the output `h_l` of its layer after the model's final norm. The residual sums grow
    with depth; heads that read them without the norm train badly and impair the layers. The norm adds no parameters, and
    a model that stops at layer `l` computes the same. The outputs of post-norm layers are normalised already.

    Unless `config.target_heads` is `"linear"`, `target_blocks` holds a block before the head of each target 2..K of the
    final layer.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: CharformerConfig):
        super().__init__(config)
        self.loss_settings: AuxiliaryLossSettings = config.language_model_losses()
        self.auxiliary_heads = self._heads_of_terms(config.vocab_size)
        self.model = CharformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        blocks = [] if config.target_heads == "linear" else range(2, config.num_targets + 1)
        sequential = config.target_heads == "sequential"
        self.target_blocks = nn.ModuleDict(
            {f"target_{k}": ResidualBlock(config.hidden_size, config.hidden_size * sequential) for k in blocks}
        )
        self.loss_uncertainty = self._uncertainty_weighting()
        self.loss_watch = LossWatch(type(self).__name__, self.model, self.loss_settings)
        self.post_init()
        self.generation_config = self._own_generation_config()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        training_progress: float | None = None,
        training_step: int | None = None,
        training_seed: int | None = None,
        target_counts: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_final_hidden_state: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CharformerCausalLMOutput:
        """
        Args:
            input_ids: `(B, S)`, or `inputs_embeds` `(B, S, hidden_size)` instead.
            attention_mask: `(B, S_past + S)`, 1 for text and 0 for padding on either side.
            position_ids: `(B, S)`; computed from the mask and the cache by default.
            cache: Keys and values of the preceding text. `past_key_values` is its name up to Transformers 5.23.
            labels: `(B, S)`, usually `input_ids` itself, since targets are shifted here; -100 is ignored. In packed
                rows no target lies in another document, see `packed_documents`.
            logits_to_keep: Number of last positions to compute logits for (0 means all), or their indices.
            training_progress: Share of training done, 0 to 1, for the schedules; `None` means 0. In evaluation mode
                the loss is that of the language model alone. `loss_dict` then also holds the active auxiliary terms,
                unless this is `None`.
            training_step: Number of optimizer steps done, for the schedules that change at each step; `None` means 0.
            training_seed: With `training_step`, determines the positions of the terms if `position_share` is below 1.
            target_counts: `(2, K)` counts over the whole optimizer step, see `Targets`.
            num_items_in_batch: Number of next characters in the whole optimizer step, as `transformers.Trainer` passes it.
            return_final_hidden_state: Also return the input of `lm_head` at the positions of `logits`.
            kwargs: Arguments of the layers, and `shift_labels` `(B, S)`, labels that are shifted already and replace
                `labels`, as in Transformers' models. It is no named parameter because Transformers would then require
                it in every batch.

        Raises:
            ValueError: For the reasons given in `CharformerModel.forward`; if `labels` differ from the input in shape or
                contain ids outside the vocabulary; if `training_progress` is outside 0..1.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        self._check_labels(labels, shift_labels, input_ids if input_ids is not None else inputs_embeds)
        inputs |= kwargs | {"shift_labels": shift_labels}
        targets = Targets(inputs, self.config.num_targets, num_items_in_batch, target_counts)
        step = LossStep(
            self.loss_settings, targets.given, self.training, training_progress, training_step, training_seed
        )
        losses_of = partial(self.losses_of_layer, step, targets)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            on_layer_output=step.on_layer_output(losses_of),
            training_progress=training_progress,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, positions])
        self.add_final_losses(step, targets, hidden_states, input_ids, inputs_embeds)
        if targets.given:
            # The loss needs the logits of all positions, in order; those of an index tensor may be in another order.
            all_logits = (
                logits if isinstance(logits_to_keep, int) and logits_to_keep == 0 else self.lm_head(hidden_states)
            )
            step.add_main(lambda term: loss_of_logits(all_logits, term, targets))
            add_distillation(step, targets, all_logits, lambda term, states: self.classify([term], states))
        return CharformerCausalLMOutput(
            **self.loss_watch.watched(
                step.breakdown(self.loss_uncertainty if self.training else None, targets.share_of_step)
            ),
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            final_hidden_state=hidden_states[:, positions] if return_final_hidden_state else None,
        )

    def _check_labels(self, labels: Tensor | None, shift_labels: Tensor | None, inputs: Tensor | None) -> None:
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is None:
                continue
            if inputs is not None and given.shape != inputs.shape[:2]:
                raise ValueError(
                    f"{name} have the shape {tuple(given.shape)}, the input {tuple(inputs.shape[:2])}; they must be equal"
                    " (batch, sequence)" + (": targets are shifted in the model" if name == "labels" else "")
                )
            check_range(name, given, self.config.vocab_size, "vocab_size", ignore_index=IGNORE_INDEX)


class CharformerClassifier(CharformerPreTrainedModel):
    """The base of the sequence and the token classification model: layers, a head, and auxiliary heads for training.

    Like Inception (Szegedy et al. 2015, section 5), the model has an auxiliary head of the same kind on each of
    `config.classifier_layers`. The heads are in `auxiliary_classifiers`. In training their weighted losses are part of
    the loss. In evaluation `loss_dict` holds them if `training_progress` is given. In a pre-norm model each head reads
    its layer's output after the final norm.
    """

    def __init__(self, config: CharformerConfig):
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.loss_settings = config.classifier_losses()
        self.auxiliary_classifiers = self._heads_of_terms(self.num_labels)
        self.model = CharformerModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.loss_uncertainty = self._uncertainty_weighting()
        self.loss_watch = LossWatch(type(self).__name__, self.model, self.loss_settings)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        training_progress: float | None = None,
        training_step: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CharformerClassifierOutput:
        """
        Args:
            input_ids: `(B, S)`, or `inputs_embeds` `(B, S, hidden_size)` instead.
            attention_mask: `(B, S)`, 1 for text and 0 for padding on either side.
            position_ids: `(B, S)`; computed from the mask by default.
            labels: `(B,)`, one for each sequence, or `(B, S)`, one for each character; -100 means no label.
            use_cache: Ignored, since a classifier has no use for a cache. Trainers pass it to every model.
            training_progress: Share of training done, 0 to 1, for the schedules; `None` means 0. In evaluation mode
                `loss_dict` also holds the active auxiliary terms, unless this is `None`.
            training_step: Number of optimizer steps done, for the schedules that change at each step; `None` means 0.
            num_items_in_batch: Number of labels in the whole optimizer step, as `transformers.Trainer` passes it.
        """
        step = LossStep(self.loss_settings, labels is not None, self.training, training_progress, training_step)

        def losses_of(terms: list[LossTerm], hidden_states: Tensor) -> dict[str, Tensor]:
            selected = self._select(self.model.norm(hidden_states), attention_mask)
            return {
                term.name: self._loss(self.auxiliary_classifiers[term.name](selected), labels, num_items_in_batch)
                for term in terms
            }

        def share_of_step() -> Tensor | float:
            if num_items_in_batch is None or labels is None:
                return 1.0
            return labels.ne(IGNORE_INDEX).sum() / num_items_in_batch

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            on_layer_output=step.on_layer_output(losses_of),
            training_progress=training_progress,
            **kwargs,
        )
        logits = self.score(self._select(outputs.last_hidden_state, attention_mask))
        step.add_main(lambda term: self._loss(logits, labels, num_items_in_batch))
        return CharformerClassifierOutput(
            **self.loss_watch.watched(step.breakdown(self.loss_uncertainty if self.training else None, share_of_step)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _select(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The part of `hidden_states` `(B, S, hidden_size)` that the heads read."""
        raise NotImplementedError

    def _loss(self, logits: Tensor, labels: Any, num_items_in_batch: Tensor | int | None) -> Tensor:
        raise NotImplementedError


class CharformerForSequenceClassification(CharformerClassifier):
    """A Charformer that classifies texts, or predicts a number for each, from the hidden state of the last character."""

    def _select(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return last_of_text(hidden_states, attention_mask)

    def _loss(self, logits: Tensor, labels: Any, num_items_in_batch: Tensor | int | None) -> Tensor:
        problem_type = sequence_problem_type(self.config.problem_type, self.num_labels, labels)
        return classification_loss(logits, labels, problem_type, num_items_in_batch)


class CharformerForTokenClassification(CharformerClassifier):
    """A Charformer that classifies each character from the text up to and including it: attention is causal."""

    def _select(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return hidden_states

    def _loss(self, logits: Tensor, labels: Any, num_items_in_batch: Tensor | int | None) -> Tensor:
        return classification_loss(logits, labels, "single_label_classification", num_items_in_batch)


# `generate` asks for it before each character; to work it out takes longer than a layer of a small model.
CharformerForCausalLM.forward.__signature__ = inspect.signature(CharformerForCausalLM.forward)

# A saved model includes its code.
CharformerModel.register_for_auto_class("AutoModel")
CharformerForCausalLM.register_for_auto_class("AutoModelForCausalLM")
CharformerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
CharformerForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "CharformerForCausalLM",
    "CharformerForSequenceClassification",
    "CharformerForTokenClassification",
    "CharformerModel",
    "CharformerPreTrainedModel",
]
