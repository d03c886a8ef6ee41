"""`generate(use_extra_targets=True)`, for every causal language model with heads of further targets."""

import warnings
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import logits_process as stock
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from .compatibility import CACHE
from .drafting_charformer import HeadDrafter
from .verification_charformer import VerifiedDecoding


# Processors that remember what they were called with, and so must see each token once and in order.
WITH_MEMORY = (stock.UnbatchedClassifierFreeGuidanceLogitsProcessor, stock.SynthIDTextWatermarkLogitsProcessor)
# Processors that look at the number of a row.
BY_ROW = (
    stock.PrefixConstrainedLogitsProcessor,
    stock.EncoderRepetitionPenaltyLogitsProcessor,
    stock.EncoderNoRepeatNGramLogitsProcessor,
)
# Criteria that treat each row by itself.
OF_ONE_ROW = MaxLengthCriteria | MaxTimeCriteria | EosTokenCriteria | StopStringCriteria


class SelfDraftingMixin:
    """`generate(use_extra_targets=True)`: the heads of targets 2..K draft, and the model verifies.

    Greedy text is the same as without it, and sampled text has the same distribution. Rows of a batch are accepted each at its
    own pace. Where drafts cannot be verified, the text is generated without them, with one warning.
    """

    loss_settings: Any

    def draft(self, offset: int, state: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, V)` of the token `offset` (2..K) steps ahead, and the `state` to pass for the next offset.

        Args:
            state: `(B, hidden_size)`. For target 2 a position's final hidden state, then the state that the last call returned.
            previous: Ids `(B,)` of the tokens `offset - 1` steps ahead, known or drafted.
        """
        raise NotImplementedError

    def _room_for_drafts(self, cache: Any) -> int | None:
        """How many drafts fit into the model's window; `None` if it has no end."""
        return None

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        asked = kwargs.pop("use_extra_targets", None)
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)  # type: ignore[misc]  # GenerationMixin's, a later base
        if asked is None:  # it may also stand in a GenerationConfig, or in the model's
            asked = getattr(prepared, "use_extra_targets", None)
        if asked not in (None, False, True):
            raise ValueError(f"use_extra_targets is {asked!r}; it must be True or False")
        prepared.use_extra_targets = bool(asked)
        if asked:
            self._check_drafting(prepared)
        return prepared, model_kwargs

    def _check_drafting(self, config: GenerationConfig) -> None:
        if self.loss_settings.num_targets < 2:
            raise ValueError(
                "use_extra_targets needs a model with num_targets of 2 or more, whose further targets draft; this one has"
                f" num_targets={self.loss_settings.num_targets}"
            )
        if (config.num_beams or 1) > 1:
            raise ValueError(
                f"use_extra_targets does not go with beam search (num_beams={config.num_beams}); leave one out"
            )
        for name in ("assistant_early_exit", "prompt_lookup_num_tokens"):
            if getattr(config, name) is not None:
                raise ValueError(f"use_extra_targets and {name} are two ways to draft; give one of them")
        mode = config.get_generation_mode()
        if mode not in ("greedy_search", "sample"):
            raise ValueError(f"use_extra_targets goes with greedy text and sampling, not with {mode}; leave one out")

    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        if getattr(generation_config, "use_extra_targets", False):
            raise ValueError("use_extra_targets and assistant_model are two ways to draft; give one of them")
        decode: Any = super()._assisted_decoding  # type: ignore[misc]  # GenerationMixin's, a later base
        return decode(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        call = (input_ids, logits_processor, stopping_criteria, generation_config)
        if getattr(generation_config, "use_extra_targets", False):
            check_processors(logits_processor)
            obstacle = quantized_over_tokens(self) or obstacle_to_drafts(*call, synced_gpus, streamer, model_kwargs)
            if obstacle is None:
                return VerifiedDecoding(self, HeadDrafter(self), *call, streamer, model_kwargs).run()
            warnings.warn(f"the text is generated without drafts: {obstacle}", stacklevel=2)
        sample: Any = super()._sample  # type: ignore[misc]  # GenerationMixin's, a later base
        return sample(*call, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)


def check_processors(processors: LogitsProcessorList) -> None:
    """Raise ValueError if processors cannot be called on drafts."""
    if any(isinstance(processor, WITH_MEMORY) for processor in processors):
        raise ValueError(
            "guidance_scale and SynthID watermarks must see each character once and in order, and drafts are processed"
            " twice; leave them out, or use_extra_targets, assistant_early_exit, prompt_lookup_num_tokens and"
            " assistant_model"
        )


def quantized_over_tokens(model: Any) -> str | None:
    """The modules of a quantized model whose output for a token depends on the others of a pass; `None` without any.

    Drafts of such a model cannot be verified, because its text depends on how many tokens a pass holds.
    """
    for module in model.modules():
        kind = type(module)
        # One scale for all tokens, and columns that are chosen by the largest value of any token.
        one_scale = kind.__module__.startswith("torch.ao.nn.quantized.dynamic")
        if one_scale or (kind.__name__ == "Linear8bitLt" and getattr(module.state, "threshold", 0) > 0):
            return (
                f"its {kind.__name__} modules quantize all tokens of a pass together, so drafts would change the text"
            )
    return None


def obstacle_to_drafts(
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    synced_gpus: bool,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Why drafts cannot be verified in this call of `generate`; `None` if they can."""
    cache = model_kwargs.get(CACHE)
    if cache is None or model_kwargs.get("use_cache") is False:
        return "use_cache is False, or the model has no cache of keys and values"
    kinds = {type(layer) for layer in cache.layers} if type(cache) is DynamicCache else {type(None)}
    if kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        return f"what was drafted cannot be taken out of a {type(cache).__name__} like this one"
    if config.output_attentions or config.output_hidden_states:
        return "output_attentions and output_hidden_states are asked for, one entry for each token"
    if synced_gpus:
        return "synced_gpus is set"
    if input_ids.shape[0] == 1:
        return None
    if DynamicSlidingWindowLayer in kinds:
        return "a batch of a model with sliding windows"
    if getattr(config, "rolling_context", None):
        return "a batch with rolling_context, whose rows are encoded again together"
    if streamer is not None or config.output_scores or config.output_logits:
        return "a batch with a streamer, output_scores or output_logits, which follow all rows at once"
    if cache.get_seq_length():
        return "a batch that goes on from a cache"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
        return "a batch that is not padded on the left"
    for one in [*processors, *criteria]:
        own = not type(one).__module__.startswith("transformers.")
        if own or isinstance(one, BY_ROW) or not isinstance(one, LogitsProcessor | OF_ONE_ROW):
            return f"a batch with a {type(one).__name__}, which may treat its rows differently"
    return None
