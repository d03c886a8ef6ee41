"""The character-level Transformer of Al-Rfou et al. (2018, arXiv 1808.04444), with its auxiliary losses.

Shapes: B batch, S sequence (of queries), H heads, D head size, V vocabulary, K number of targets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .auxiliary_heads import ResidualBlock
from .auxiliary_losses import (
    IGNORE_INDEX,
    LossStep,
    Targets,
    causal_lm_losses,
    classification_loss,
    last_of_text,
    loss_of_logits,
    sequence_problem_type,
)
from .compatibility import CACHE, one_cache
from .configuration_charformer import CharformerConfig
from .generation_charformer import CharformerGenerationMixin
from .layers_charformer import CharformerLayer, to_autocast_dtype
from .loss_settings import AuxiliaryLossSettings, LossTerm
from .pretrained_charformer import CharformerPreTrainedModel


@dataclass
class CharformerCausalLMOutput(CausalLMOutputWithPast):
    """Output of `CharformerForCausalLM`: that of any causal language model, and the breakdown of its loss.

    `loss_dict` maps the name of each term to its raw, unweighted value (float32 scalars, nats) and `loss_weights` the
    same names to the weights in force, so that `loss == sum(loss_weights[name] * loss_dict[name])`. Learned weights are
    tensors. `final_hidden_state` `(B, S, hidden_size)`, if asked for, is what the next-character classifier reads.
    """

    loss_dict: dict[str, Tensor] | None = None
    loss_weights: dict[str, Any] | None = None
    final_hidden_state: Tensor | None = None


@dataclass
class CharformerClassifierOutput(SequenceClassifierOutput):
    """Output of the classifiers: that of any of Transformers', and the breakdown of the loss as above."""

    loss_dict: dict[str, Tensor] | None = None
    loss_weights: dict[str, Any] | None = None


class CharformerModel(CharformerPreTrainedModel):
    """The layers, from ids to the last hidden state."""

    def __init__(self, config: CharformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # After post-norm layers there is nothing left to normalise. Made before the layers, as the classifiers that read
        # it are (see `_heads_of_terms`).
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
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `(B, S)`, or `inputs_embeds` `(B, S, hidden_size)` instead.
            attention_mask: `(B, S_past + S)`, 1 for text and 0 for padding; positions count text only.
            position_ids: `(B, S)`, in the window; by default they follow from the mask and the cache.
            cache: Keys and values of what comes before, or `past_key_values`, its name up to Transformers 5.23.
            on_layer_output: By the number of a layer (1..n), what is called with its output `(B, S, hidden_size)`, before the
                final norm, right after it and before the next layer. The backward pass then comes to what a reader
                computed when it comes to the layer: no two layers' gradients by readers are held at once.
            positions_to_keep: Compute only so many last positions in the last layer, where no other needs the rest; 0 is
                all.
            num_layers: Stop after so many layers (1..n); `last_hidden_state` is then their output after the final norm.

        Raises:
            ValueError: If the sequence, with what is cached, is longer than the window, or an id is outside the
                vocabulary (found on the CPU only: elsewhere looking would stall the device).
        """
        if input_ids is not None and inputs_embeds is None:
            self._check_range("input_ids", input_ids, self.config.vocab_size, "vocab_size")
            inputs_embeds = self.embed_tokens(input_ids)
        elif inputs_embeds is None or input_ids is not None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        named_cache: dict[str, Any] = {CACHE: cache}

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache,
        )
        position_ids = self._positions_in_window(inputs_embeds, attention_mask, position_ids, cache)

        hidden_states = inputs_embeds
        on_layer_output = on_layer_output or {}
        last_mask = self._mask_of_last_positions(causal_mask, hidden_states, positions_to_keep)
        if num_layers is not None and not 1 <= num_layers <= len(self.layers):
            raise ValueError(f"num_layers is {num_layers}; it must be 1 to {len(self.layers)}")
        layers = self.layers[:num_layers]
        for number, layer in enumerate(layers, start=1):
            is_last = number == len(layers)
            hidden_states = layer(
                hidden_states,
                position_ids=position_ids,
                attention_mask=last_mask if is_last else causal_mask,
                cache=cache,
                positions_to_keep=positions_to_keep if is_last else 0,
                input_is_kept=number - 1 in on_layer_output,
                **kwargs,
            )
            if number in on_layer_output:
                on_layer_output[number](hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named_cache)

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
            return None  # the last position sees all
        # Left to itself, SDPA would let the first of the queries see the first key alone.
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
            self._check_range("position_ids", position_ids, window, "max_position_embeddings")
            return position_ids
        past = cache.get_seq_length() if cache is not None else 0
        if past + length > window:
            raise ValueError(
                f"the sequence is {past + length} characters long"
                + (f" ({past} of them cached)" if past else "")
                + f", longer than the window of max_position_embeddings={window}; shorten the text"
            )
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)

    @staticmethod
    def _check_range(name: str, ids: Tensor, end: int, field: str, ignore_index: int | None = None) -> None:
        if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
            return
        if ignore_index is not None:
            ids = ids.masked_fill(ids == ignore_index, 0)
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= end:
            raise ValueError(
                f"{name} contains {high if high >= end else low}; it must be in 0..{end - 1} ({field}={end})"
            )


class CharformerForCausalLM(CharformerPreTrainedModel, CharformerGenerationMixin, GenerationMixin):  # type: ignore[misc]
    """A Charformer that predicts the next character and, in training, everything the auxiliary losses ask for.

    `auxiliary_heads` holds one head for each term of `config.language_model_losses().terms` but those of `lm_head`, under the
    term's name. All classifiers of a pre-norm model, the intermediate ones too, read the output `h_l` of their layer
    after the model's final norm: the sums that its layers pass on grow with depth, and classifiers that read them as
    they are train badly and hold the layers back. It costs no parameters, and is what a model that stops at layer `l`
    computes. Post-norm layers have normed outputs.

    With `config.target_heads` other than `"linear"`, `target_blocks` holds what stands before the classifiers of targets
    2..K of the final layer.
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
            {f"target_{k}": ResidualBlock(config.hidden_size, reads_previous=sequential) for k in blocks}
        )
        self.loss_uncertainty = self._uncertainty_weighting()
        self.post_init()

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
        target_counts: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_final_hidden_state: bool = False,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CharformerCausalLMOutput:
        """
        Args:
            input_ids: `(B, S)`, or `inputs_embeds` `(B, S, hidden_size)` instead.
            attention_mask: `(B, S_past + S)`, 1 for text and 0 for padding on either side.
            position_ids: `(B, S)`; by default they follow from the mask and the cache.
            cache: Keys and values of what comes before, or `past_key_values`, its name up to Transformers 5.23.
            labels: `(B, S)`, usually `input_ids` itself, since targets are shifted here; -100 is not counted. In packed
                rows no target lies in another document, see `packed_documents`.
            logits_to_keep: Compute logits for so many last positions only (0 is all), or for these indices.
            training_progress: Share of training done, 0 to 1, which the schedules follow; `None` is 0 in training mode.
                In evaluation mode the loss is that of the language model alone.
            training_step: Optimizer steps done, which schedules that change from step to step follow; `None` is 0.
            target_counts: `(2, K)`, see `Targets`; counts over the whole optimizer step.
            num_items_in_batch: What `transformers.Trainer` passes: next characters in the whole optimizer step.
            return_final_hidden_state: Also return what the next-character classifier reads, where `logits` are.
            kwargs: For the layers; and `shift_labels` `(B, S)`, which hold at each position the character after it already
                and take the place of `labels`, as in Transformers' own models. (Transformers would take a parameter of
                that name for a label that every batch must have.)

        Raises:
            ValueError: As `CharformerModel.forward`, and if `labels` are of another shape than the input, have ids
                outside the vocabulary, or `training_progress` is outside 0..1.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        self._check_labels(labels, shift_labels, input_ids if input_ids is not None else inputs_embeds)
        inputs |= kwargs | {"shift_labels": shift_labels}
        targets = Targets(inputs, self.config.num_targets, num_items_in_batch, target_counts)
        step = LossStep(self.loss_settings, targets.given, self.training, training_progress, training_step)
        losses_of = partial(self._losses, targets)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            on_layer_output=step.on_layer_output(losses_of),
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        for terms, head_input in self._final_head_inputs(step.final_terms, hidden_states, input_ids, inputs_embeds):
            step.add(losses_of(terms, head_input))
        if targets.given:
            # An index tensor may reorder the positions, so only "all of them" can be reused.
            every = logits if isinstance(logits_to_keep, int) and logits_to_keep == 0 else self.lm_head(hidden_states)
            step.add_main(lambda term: loss_of_logits(every, term, targets))
        return CharformerCausalLMOutput(
            **step.breakdown(self.loss_uncertainty if self.training else None, targets.share_of_step),
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            final_hidden_state=hidden_states[:, kept] if return_final_hidden_state else None,
        )

    def _losses(self, targets: Targets, terms: list[LossTerm], head_input: Tensor) -> dict[str, Tensor]:
        """The values of auxiliary `terms` of one layer, whose heads read the same, by name."""
        return causal_lm_losses(head_input, partial(self.classify, terms), terms, targets, self.config.vocab_size)

    def _final_head_inputs(
        self,
        terms: list[LossTerm],
        final_hidden_state: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Iterator[tuple[list[LossTerm], Tensor]]:
        """The final layer's `terms`, in groups of those whose heads read the same, and what these read, `(B, S, hidden_size)`."""
        if not terms:
            return
        if not self.target_blocks:
            yield terms, final_hidden_state
            return
        if self._is_sequential and inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        by_offset = {term.offset: term for term in terms}
        state = final_hidden_state
        for offset in range(2, max(by_offset) + 1):
            previous = None
            if self._is_sequential and inputs_embeds is not None:
                # What is shifted in at the end has no target.
                previous = nn.functional.pad(inputs_embeds, (0, 0, 0, offset - 1))[:, offset - 1 :]
            head_input = self._head_input(offset, state, previous)
            if self._is_sequential:
                state = head_input
            if offset in by_offset:
                yield [by_offset[offset]], head_input

    @property
    def _is_sequential(self) -> bool:
        return self.config.target_heads == "sequential"

    def _head_input(self, offset: int, state: Tensor, previous: Tensor | None) -> Tensor:
        """What the head of target `offset` reads: from `state` and, if sequential, the embedding of what is before it."""
        return self.target_blocks[f"target_{offset}"](state, previous) if self.target_blocks else state

    def draft(self, offset: int, state: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, V)` of the character `offset` (2..K) steps ahead, and the state for the one after it.

        Args:
            state: `(B, hidden_size)`; for target 2 a position's `final_hidden_state`, then what the last call returned.
            previous: `(B,)` ids of the characters `offset - 1` steps ahead, known or drafted.
        """
        head_input = self._head_input(
            offset, state, self.model.embed_tokens(previous) if self._is_sequential else None
        )
        return self.auxiliary_heads[f"target_{offset}"](head_input), head_input if self._is_sequential else state

    def classify(self, terms: Sequence[LossTerm], hidden_states: Tensor) -> list[Tensor]:
        """Logits `(..., V)` of the classifier of each of auxiliary `terms`, which are all of one layer.

        Args:
            terms: At least one.
            hidden_states: `(..., hidden_size)`, the layer's output; the last one's after the final norm.
        """
        if terms[0].layer < len(self.model.layers):
            hidden_states = self.model.norm(hidden_states)
        hidden_states = to_autocast_dtype(hidden_states)
        return [self.auxiliary_heads[term.name](hidden_states) for term in terms]

    def _check_labels(self, labels: Tensor | None, shift_labels: Tensor | None, inputs: Tensor | None) -> None:
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is None:
                continue
            if inputs is not None and given.shape != inputs.shape[:2]:
                raise ValueError(
                    f"{name} have the shape {tuple(given.shape)}, the input {tuple(inputs.shape[:2])}; they must be alike"
                    " (batch, sequence)" + (": targets are shifted in the model" if name == "labels" else "")
                )
            self.model._check_range(name, given, self.config.vocab_size, "vocab_size", ignore_index=IGNORE_INDEX)


class CharformerClassifier(CharformerPreTrainedModel):
    """What classifiers of sequences and of characters share: the layers, a classifier, and in training auxiliary ones.

    As in Inception (Szegedy et al. 2015, section 5), `auxiliary_classifiers` holds a classifier of the same kind for
    each of `config.classifier_layers`, whose weighted loss is added in training; they are not run otherwise. Those of a
    pre-norm model read the output of their layer after the final norm, as `CharformerForCausalLM` does.
    """

    def __init__(self, config: CharformerConfig):
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.loss_settings = config.classifier_losses()
        self.auxiliary_classifiers = self._heads_of_terms(self.num_labels)
        self.model = CharformerModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.loss_uncertainty = self._uncertainty_weighting()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        training_progress: float | None = None,
        training_step: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> CharformerClassifierOutput:
        """
        Args:
            input_ids: `(B, S)`, or `inputs_embeds` `(B, S, hidden_size)` instead.
            attention_mask: `(B, S)`, 1 for text and 0 for padding on either side.
            position_ids: `(B, S)`; by default they follow from the mask.
            labels: One for each sequence, `(B,)`, or for each character, `(B, S)`, -100 for none.
            training_progress: Share of training done, 0 to 1, which schedules follow; `None` is 0 in training mode.
            training_step: Optimizer steps done, which schedules that change from step to step follow; `None` is 0.
            num_items_in_batch: What `transformers.Trainer` passes: labels in the whole optimizer step.
        """
        step = LossStep(self.loss_settings, labels is not None, self.training, training_progress, training_step)

        def losses_of(terms: list[LossTerm], hidden_states: Tensor) -> dict[str, Tensor]:
            selected = self._select(self.model.norm(hidden_states), attention_mask)
            return {
                term.name: self._loss(self.auxiliary_classifiers[term.name](selected), labels, num_items_in_batch)
                for term in terms
            }

        def share_of_step() -> Tensor | float:
            counted = labels.ne(IGNORE_INDEX).sum()  # type: ignore[union-attr]  # there are no terms without labels
            return 1.0 if num_items_in_batch is None else counted / num_items_in_batch

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            on_layer_output=step.on_layer_output(losses_of),
            **kwargs,
        )
        logits = self.score(self._select(outputs.last_hidden_state, attention_mask))
        step.add_main(lambda term: self._loss(logits, labels, num_items_in_batch))
        return CharformerClassifierOutput(
            **step.breakdown(self.loss_uncertainty if self.training else None, share_of_step),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _select(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What of `(B, S, hidden_size)` is classified."""
        raise NotImplementedError

    def _loss(self, logits: Tensor, labels: Any, num_items_in_batch: Tensor | int | None) -> Tensor:
        raise NotImplementedError


class CharformerForSequenceClassification(CharformerClassifier):
    """A Charformer that classifies texts, or rates them, by their last character, which has seen all of the text."""

    def _select(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return last_of_text(hidden_states, attention_mask)

    def _loss(self, logits: Tensor, labels: Any, num_items_in_batch: Tensor | int | None) -> Tensor:
        problem_type = sequence_problem_type(self.config.problem_type, self.num_labels, labels)
        return classification_loss(logits, labels, problem_type, num_items_in_batch)


class CharformerForTokenClassification(CharformerClassifier):
    """A Charformer that classifies each character, by what comes up to it: its attention is causal."""

    def _select(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return hidden_states

    def _loss(self, logits: Tensor, labels: Any, num_items_in_batch: Tensor | int | None) -> Tensor:
        return classification_loss(logits, labels, "single_label_classification", num_items_in_batch)


# Saved models take their code along.
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
