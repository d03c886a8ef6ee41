"""Generation: past the window by re-encoding its end, and faster by letting the extra-target heads draft.

Both are exact, up to rounding: what is generated is what the model's next-character classifier says.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import ModelOutput

from .compatibility import CACHE, check_ids, one_cache
from .configuration_charformer import CharformerConfig
from .drafting_charformer import EarlyExitDrafter
from .loss_settings import AuxiliaryLossSettings
from .self_drafting_charformer import SelfDraftingMixin, check_processors, quantized_over_tokens
from .verification_charformer import VerifiedDecoding, mask_up_to


# Arguments of `generate` that are counts of characters.
LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
# Arguments of assisted decoding that are none of the model's.
OF_ASSISTED_DECODING = ("synced_gpus", "inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer")


class CharformerGenerationMixin(SelfDraftingMixin):
    """The arguments that `generate` of a Charformer takes in addition to those of every model of Transformers.

    - `use_extra_targets=True`: the heads of targets 2..K draft, and the model verifies. The characters (greedy) or their
      distribution (sampled) are the same as without it.
    - `assistant_early_exit=l`: layer `l` and its head draft instead. One prompt at a time.
    - `rolling_context=m` (or `True` for half the window): when the window is full, the last `m` characters are encoded
      again and generation goes on without limit. Positions are learned, so cached keys and values cannot be shifted.

    Without `max_new_tokens` and `max_length` the text ends when the window is full. With `rolling_context`, a window of new
    characters is generated.
    """

    config: CharformerConfig
    generation_config: GenerationConfig
    loss_settings: AuxiliaryLossSettings

    def _own_generation_config(self) -> GenerationConfig:
        """The defaults of `generate`: those of Transformers, and the window as the length.

        Not marked as derived from the model's config, for then values with names of our own would be lost on loading.
        """
        settings = self.generation_config.to_diff_dict()
        own = {name: value for name, value in settings.items() if name != "_from_model_config"}
        return GenerationConfig(**(own | {"max_length": self.config.max_position_embeddings}))

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in Transformers, with the arguments that the class names.

        Raises:
            ValueError: If the ids are not a `(batch, sequence)` tensor of integers or a length is not an integer. Also if
                prompt and new characters do not fit into a window that does not roll, or not into that of an
                `assistant_model`, or it has another vocabulary.
        """
        for name, ids in (("inputs", inputs), ("input_ids", kwargs.get("input_ids"))):
            if ids is not None:
                check_ids(name, ids)
        # Transformers makes an empty cache beside one that comes by the name of another release.
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE] = cache
        if kwargs.get("assistant_model") is not None:
            self._check_assistant(kwargs["assistant_model"], kwargs.get("assistant_tokenizer") is not None)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]  # GenerationMixin's, a later base

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        for name in LENGTHS:
            value = kwargs.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} is {value!r}; it must be a whole number")
        rolling_context = kwargs.pop("rolling_context", None)
        prepared: Any
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        # It may also stand in a GenerationConfig, or in the model's.
        rolling_context = getattr(prepared, "rolling_context", None) if rolling_context is None else rolling_context
        self._settle_length(prepared, generation_config, kwargs, rolls=rolling_context not in (None, False))
        prepared.rolling_context = None
        if rolling_context is not None and rolling_context is not False:
            prepared.rolling_context = self._checked_rolling_context(rolling_context, prepared)
            model_kwargs["rolling_context"] = prepared.rolling_context
        if prepared.assistant_early_exit is not None:
            self._check_early_exit(prepared.assistant_early_exit)
        return prepared, model_kwargs

    def _settle_length(
        self, prepared: GenerationConfig, given: GenerationConfig | None, arguments: dict[str, Any], rolls: bool
    ) -> None:
        """Keep the one of the two lengths in `prepared` that the caller gave. A default length may be shortened later."""
        requested = {name for name in LENGTHS[:2] if arguments.get(name) is not None}
        requested = requested or {name for name in LENGTHS[:2] if getattr(given, name, None) is not None}
        prepared.length_is_default = not requested  # type: ignore[attr-defined]  # an attribute of this mixin
        if prepared.max_new_tokens is not None and "max_length" not in requested:
            prepared.max_length = None
        elif rolls and not requested:
            prepared.max_length, prepared.max_new_tokens = None, self.config.max_position_embeddings

    def _checked_rolling_context(self, rolling_context: int | bool, generation_config: GenerationConfig) -> int:
        window: int = self.config.max_position_embeddings
        if rolling_context is True:
            rolling_context = max(1, window // 2)
        if not isinstance(rolling_context, int) or not 1 <= rolling_context < window:
            raise ValueError(
                f"rolling_context is {rolling_context!r}; it must be 1 to {window - 1}, below max_position_embeddings, or"
                " True for half of it"
            )
        if generation_config.use_cache is False:
            raise ValueError("rolling_context needs use_cache=True: the cache tells how full the window is")
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                "rolling_context does not go with guidance_scale, which keeps a cache of its own that does not roll;"
                " leave one out"
            )
        return int(rolling_context)

    def _room_for_drafts(self, cache: Any) -> int | None:
        # The character before the drafts goes through the model too.
        return int(self.config.max_position_embeddings) - int(cache.get_seq_length()) - 1

    def _check_early_exit(self, layer: int) -> None:
        heads = [term.layer for term in self.loss_settings.terms if term.offset == 1 and not term.is_main]
        if layer not in heads:
            raise ValueError(
                f"assistant_early_exit is {layer}; the layers of this model that have a classifier of their own are {heads}"
            )

    def _check_assistant(self, assistant: Any, translates: bool) -> None:
        if not hasattr(assistant, "generation_config"):
            raise ValueError(
                f"assistant_model is a {type(assistant).__name__}; it must be a language model that generates"
            )
        vocab_size = assistant.config.get_text_config(decoder=True).vocab_size
        if vocab_size != self.config.vocab_size and not translates:
            raise ValueError(
                f"assistant_model has vocab_size={vocab_size} and this model vocab_size={self.config.vocab_size}: its drafts"
                " are ids of this model, so give one with the same vocabulary"
            )

    def _check_assistants_window(self, assistant: Any, prepared: GenerationConfig) -> None:
        window = getattr(assistant.config.get_text_config(decoder=True), "max_position_embeddings", None)
        rolling_context = prepared.rolling_context  # type: ignore[attr-defined]  # an attribute of this mixin
        if rolling_context is not None and isinstance(assistant, CharformerGenerationMixin):
            needed, why = rolling_context + 1, f"rolling_context={rolling_context}"
        else:
            needed, why = prepared.max_length, "prompt and new characters"
        if window is not None and window < needed:
            raise ValueError(
                f"assistant_model has a window of max_position_embeddings={window}; for {why} it must be {needed} or more."
                " Give another assistant_model, or a shorter text"
            )

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, inputs_tensor: Tensor, input_ids_length: int, **kwargs: Any
    ) -> GenerationConfig:
        """Raise before any character is generated if the text would not fit into a window that does not roll."""
        prompt_length = inputs_tensor.shape[1]
        if prompt_length < 1:
            raise ValueError("the prompt is empty; give one character or more")
        prepared: GenerationConfig = super()._prepare_generated_length(  # type: ignore[misc]  # GenerationMixin's, a later base
            generation_config, inputs_tensor=inputs_tensor, input_ids_length=input_ids_length, **kwargs
        )
        rolls: bool = prepared.rolling_context is not None  # type: ignore[attr-defined]  # an attribute of this mixin
        if rolls and inputs_tensor.is_floating_point():
            raise ValueError(
                "rolling_context does not go with inputs_embeds: what is encoded anew are ids; give input_ids"
            )
        if not rolls:
            window: int = self.config.max_position_embeddings
            # Embeddings may stand for ids, or before them.
            room = window - prompt_length + input_ids_length
            if prepared.length_is_default and prompt_length < window:  # type: ignore[attr-defined]  # an attribute of this mixin
                prepared.max_length = min(prepared.max_length, room)
            self._check_fit(prompt_length, prepared.max_length - input_ids_length, window)
        return prepared

    @staticmethod
    def _check_fit(prompt_length: int, new: int, window: int) -> None:
        rolling = ", or give rolling_context to go on past the window"
        if prompt_length >= window:
            raise ValueError(
                f"the prompt is {prompt_length} characters long; the window of max_position_embeddings={window} leaves no"
                f" room for a new one. Give the last {window - 1} characters or fewer{rolling}"
            )
        if prompt_length + new > window:
            raise ValueError(
                f"prompt ({prompt_length}) and new characters ({new}) come to {prompt_length + new}, more"
                f" than the window of max_position_embeddings={window}. Set max_new_tokens to {window - prompt_length} or"
                f" less, or shorten the prompt{rolling}"
            )

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, stopping_criteria: Any, tokenizer: Any = None, **kwargs: Any
    ) -> StoppingCriteriaList:
        """Match stop strings byte by byte, since a character outside ASCII is several tokens.

        Where the window rolls, Transformers' warning that text goes past it is left out.
        """
        if generation_config.stop_strings and hasattr(
            tokenizer, "errors"
        ):  # CharformerTokenizer's, from whatever module
            stops, tokenizer = generation_config.stop_strings, copy.copy(tokenizer)
            tokenizer.errors = "surrogateescape"  # each byte that is not ASCII is a code point
            generation_config = copy.copy(generation_config)
            generation_config.stop_strings = [
                stop.encode().decode("ascii", "surrogateescape")
                for stop in ([stops] if isinstance(stops, str) else stops)
            ]
        criteria: StoppingCriteriaList = super()._get_stopping_criteria(  # type: ignore[misc]  # GenerationMixin's, a later base
            generation_config, stopping_criteria, tokenizer=tokenizer, **kwargs
        )
        if getattr(generation_config, "rolling_context", None) is not None:
            for one in criteria:
                if isinstance(one, MaxLengthCriteria):
                    one.max_position_embeddings = None
        return criteria

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generation_config, model_kwargs = kwargs["generation_config"], kwargs["model_kwargs"]
        window: int = self.config.max_position_embeddings
        if kwargs.get("assistant_model") is not None:
            self._check_assistants_window(kwargs["assistant_model"], generation_config)
        generator: Any = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]  # GenerationMixin's, a later base
        draft = generator.get_candidates

        def draft_inside_window(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            """Prompt look-up would pass the end of the window."""
            candidates, logits = draft(input_ids, *args, **kwargs)
            past = int(model_kwargs[CACHE].get_seq_length())
            seen = past + 1 if generation_config.rolling_context else max(past + 1, input_ids.shape[1])
            # The first pass over embeddings has no place for drafts.
            first = past == 0 and model_kwargs.get("inputs_embeds") is not None
            room = 0 if first else max(0, window - seen)
            if logits is not None:
                logits = logits[:, :room]
            return candidates[:, : input_ids.shape[1] + room], logits

        generator.get_candidates = draft_inside_window
        return generator

    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """As everywhere in Transformers, which looks at the criteria once a pass; here after each of its characters."""
        if input_ids.shape[0] > 1:
            raise ValueError(
                f"drafts are verified for one prompt at a time, and there are {input_ids.shape[0]}; generate them one by"
                " one, or without use_extra_targets, assistant_early_exit, prompt_lookup_num_tokens and assistant_model"
            )
        check_processors(logits_processor)
        if generation_config.assistant_early_exit is not None:
            if obstacle := quantized_over_tokens(self):
                raise ValueError(f"assistant_early_exit cannot be used with this model: {obstacle}; leave it out")
            drafter = EarlyExitDrafter(self, generation_config.assistant_early_exit)
            call = (input_ids, logits_processor, stopping_criteria, generation_config, kwargs.pop("streamer", None))
            model_kwargs = {name: value for name, value in kwargs.items() if name not in OF_ASSISTED_DECODING}
            return VerifiedDecoding(self, drafter, *call, model_kwargs).run()
        if kwargs.get("inputs_embeds") is not None:
            # Transformers would cut the mask to the ids, which are fewer. The cache tells how far it goes.
            kwargs["prompt_mask"] = kwargs.pop("attention_mask", None)
        own = [c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria)]
        decode: Any = super()._assisted_decoding
        if not own:
            return decode(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        first = FirstStop(StoppingCriteriaList(own), input_ids)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = StreamToStop(kwargs["streamer"], first, input_ids)
        others = [c for c in stopping_criteria if c not in own]
        result = decode(
            input_ids, logits_processor, StoppingCriteriaList([*others, first]), generation_config, **kwargs
        )
        if not isinstance(result, ModelOutput):
            return result[:, : first.length]
        sequences: Any = result["sequences"]
        excess = sequences.shape[1] - first.length if first.length is not None else 0
        if excess:
            result["sequences"] = sequences[:, :-excess]
            for name in ("scores", "logits", "attentions", "hidden_states"):
                if result.get(name) is not None:
                    result[name] = result[name][:-excess]
            if result.get(CACHE) is not None:
                result[CACHE].crop(-excess)
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        rolling_context: int | None = None,
        past_key_values: Any = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As everywhere in Transformers; when the window is full and may roll, its end is all that is encoded."""
        cache = one_cache(cache, past_key_values)
        for name in (
            "tokenizer",
            "assistant_tokenizer",
        ):  # `generate` hands them on to models, which have no use for them
            kwargs.pop(name, None)
        past = 0
        if cache is not None and (rolling_context is not None or is_first_iteration):
            past = int(cache.get_seq_length())
        if past and is_first_iteration and next_sequence_length is None and inputs_embeds is None:
            # Drafting goes on from an earlier call's cache: Transformers would encode all of the text once more.
            seen = attention_mask if attention_mask is not None else kwargs.get("position_ids")
            if seen is None or seen.shape[1] == input_ids.shape[1]:
                next_sequence_length = input_ids.shape[1] - past
        if rolling_context is not None:
            window: int = self.config.max_position_embeddings
            new = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
            if past + new > window:
                _empty(cache, past)
                past, new = 0, rolling_context
            visible = past + new
            input_ids, next_sequence_length = input_ids[:, -new:], None
            if attention_mask is None:
                positions = torch.arange(past, visible, device=input_ids.device).expand(input_ids.shape[0], -1)
            else:
                attention_mask = attention_mask[:, -visible:]
                positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
            kwargs["position_ids"] = positions
        if prompt_mask is not None and inputs_embeds is not None:
            new = inputs_embeds.shape[1] if is_first_iteration else next_sequence_length or 1
            attention_mask = mask_up_to(prompt_mask, int(cache.get_seq_length()) + new)
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]  # GenerationMixin's, a later base
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        # PEFT, in prompt and prefix tuning, looks here for whether the text has begun, by the old name alone.
        return prepared | {"past_key_values": prepared.get(CACHE)}


def _empty(cache: Any, length: int) -> None:
    """Take all of its `length` characters out of `cache`."""
    if cache.is_compileable:
        cache.reset()  # a static one
    else:
        cache.crop(-length)


class FirstStop(StoppingCriteria):
    """Whether a text `(1, S)` or a beginning of it meets `criteria`. `length` is that of the shortest one that does."""

    def __init__(self, criteria: StoppingCriteriaList, prompt: Tensor):
        self.criteria, self.text = criteria, prompt
        self.length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        # Transformers 5.17 asks about drafts before they are verified, so what was seen may have changed.
        shorter = min(self.text.shape[1], input_ids.shape[1])
        same = int((self.text[0, :shorter] == input_ids[0, :shorter]).cumprod(0).sum())
        if self.length is not None and self.length > same:
            self.length = None
        self.text = input_ids
        for length in range(same + 1, input_ids.shape[1] + 1):
            if self.length is None and bool(self.criteria(cast(Any, input_ids[:, :length]), scores, **kwargs).all()):
                self.length = length
        return torch.full((1,), self.length is not None, device=input_ids.device)


class StreamToStop(BaseStreamer):
    """Streams the text up to the first stop."""

    def __init__(self, streamer: BaseStreamer, first: FirstStop, prompt: Tensor):
        self.streamer, self.first, self.text = streamer, first, prompt

    def put(self, value: Tensor) -> None:
        before = self.text.shape[1]
        self.text = torch.cat([self.text, value.reshape(1, -1).to(self.text.device)], dim=-1)
        self.first(self.text, None)
        new = self.text[:, before : self.first.length]
        if new.shape[1]:
            self.streamer.put(new.cpu())

    def end(self) -> None:
        self.streamer.end()
