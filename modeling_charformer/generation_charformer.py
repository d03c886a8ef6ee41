"""Generation: past the window by re-encoding its end, and faster by letting the extra-target heads draft.

Both are exact, up to rounding: what is generated is what the model's next-character classifier says.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .compatibility import CACHE, one_cache


# Drafting goes on while the probability that all drafts which the text did not give are right, by the drafter's own
# account, is above this.
CONFIDENCE = 0.1
# Where the last `LOOK_UP_MATCH` characters came before, among the last `LOOK_BACK`, what followed then is drafted, `LOOK_UP`
# characters of it or fewer, while the drafter gives it this probability or more.
LOOK_UP, LOOK_UP_MATCH, LOOK_BACK, AGREEMENT = 16, 8, 4096, 0.1
# Drafts of an early exit, each of which costs a pass through some layers.
MAX_EARLY_DRAFTS = 8


class SelfDraftingCandidateGenerator(CandidateGenerator):
    """Drafts by a part of the model itself, which the model verifies in its next pass.

    Where characters are sampled, so are drafts, and the verification accepts or resamples them such that the result has
    exactly the model's distribution (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).

    Where the text repeats itself, what followed last time is drafted (prompt look-up, Saxena 2023), as far as the drafter
    does not contradict it, and on beyond its last draft.
    """

    requires_model_outputs = True
    model_kwargs_overrides: dict[str, Any] = {"return_final_hidden_state": True}

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList | None,
    ):
        self.model = model
        self.generation_config = generation_config
        self.logits_processor = logits_processor or LogitsProcessorList()

    max_drafts: int

    def drafter(
        self, model_kwargs: dict[str, Any], state: Tensor
    ) -> AbstractContextManager[Callable[[int, Tensor], Tensor]]:
        """A function to logits `(1, V)` from the number (0, 1, ...) of a draft and the character `(1,)` before it.

        `state` `(1, hidden_size)` is what the next-character classifier read when it predicted the last known character.
        """
        raise NotImplementedError

    def get_candidates(  # type: ignore[override]  # the base class takes any keywords
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        model_outputs: Any,
        is_first_iteration: bool,
        n_last_matches: int,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`input_ids` `(1, S)` and drafts after them, and the drafts' processed logits `(1, drafts, V)` where sampled."""
        if is_first_iteration:
            return input_ids, None
        sample = self.generation_config.do_sample
        room = min(
            self.generation_config.max_length - input_ids.shape[1] - 1,
            # One more character goes through the model: the one before the drafts.
            self.model.config.max_position_embeddings - model_kwargs[CACHE].get_seq_length() - 1,
        )
        if room < 1:
            return input_ids, None
        looked_up = _continuation(input_ids[:, -LOOK_BACK:], min(LOOK_UP, room))
        # Row -1 would do after a pass without drafts; after one with drafts it is that of the last accepted one.
        states = model_outputs.final_hidden_state
        state = states[:, min(int(n_last_matches), states.shape[1] - 1)]
        drafts, processed, confidence = [input_ids[:, -1:]], [], 1.0
        with self.drafter(model_kwargs, state) as draft:
            for number in range(min(self.max_drafts, room)):
                logits = draft(number, drafts[-1][:, 0]).float().to(input_ids.device)
                if self.logits_processor:
                    written = torch.cat([input_ids, *drafts[1:]], dim=-1)
                    logits = self.logits_processor(cast(Any, written), cast(Any, logits))
                probabilities = logits.softmax(-1)
                known = looked_up[:, number : number + 1]
                if known.shape[1] and probabilities[0, known[0, 0]] >= AGREEMENT:
                    drafts.append(known)
                    if sample:
                        processed.append(_certain(logits, known))
                    continue
                looked_up = looked_up[:, :0]
                drafts.append(
                    torch.multinomial(probabilities, 1) if sample else probabilities.argmax(-1, keepdim=True)
                )
                if sample:
                    processed.append(logits)
                confidence *= float(probabilities[0, drafts[-1][0, 0]])
                if confidence < CONFIDENCE:
                    break
        rest = looked_up[:, len(drafts) - 1 :]
        candidates = torch.cat([input_ids, *drafts[1:], rest], dim=-1)
        if not sample:
            return candidates, None
        processed += [_certain(logits, rest[:, i : i + 1]) for i in range(rest.shape[1])]
        return candidates, torch.stack(processed, dim=1)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Nothing to adapt: how many are drafted follows from how sure the drafter is."""


class ExtraTargetCandidateGenerator(SelfDraftingCandidateGenerator):
    """Drafts by the classifiers of targets 2..K of the final layer (Gloeckle et al. 2024, arXiv 2404.19737, section 2).

    At the position whose next character was just accepted, the classifier of target `k` predicts the character `k - 1`
    after that one. The pass that verifies also brings the next drafts: no second model, no second cache.
    """

    @property
    def max_drafts(self) -> int:  # type: ignore[override]
        return self.model.loss_settings.num_targets - 1

    @contextmanager
    def drafter(self, model_kwargs, state):
        def draft(number: int, previous: Tensor) -> Tensor:
            nonlocal state
            logits, state = self.model.draft(number + 2, state, previous)
            return logits

        yield draft


class EarlyExitCandidateGenerator(SelfDraftingCandidateGenerator):
    """Drafts by the first layers and the classifier of the last of them (LayerSkip, Elhoushi et al. 2024, section 4.3).

    They use the model's own cache, and take out of it what they put in.
    """

    max_drafts = MAX_EARLY_DRAFTS

    @contextmanager
    def drafter(self, model_kwargs, state):
        layer, cache = self.generation_config.assistant_early_exit, model_kwargs[CACHE]
        past, mask = cache.get_seq_length(), model_kwargs.get("attention_mask")
        term = next(term for term in self.model.loss_settings.terms if (term.layer, term.offset) == (layer, 1))
        if mask is not None:
            mask = None if bool(mask[:, -past - 1 :].all()) else mask[:, -past - 1 :]
        drafted = 0

        def draft(number: int, previous: Tensor) -> Tensor:
            nonlocal drafted
            seen = None if mask is None else torch.nn.functional.pad(mask, (0, number), value=1)
            outputs = self.model.model(
                previous[:, None], attention_mask=seen, cache=cache, use_cache=True, num_layers=layer
            )
            drafted += 1
            return self.model.auxiliary_heads[term.name](outputs.last_hidden_state[:, -1])

        try:
            yield draft
        finally:
            for cached in cache.layers[:layer]:
                cached.crop(-drafted)


def _certain(logits: Tensor, choice: Tensor) -> Tensor:
    """Logits like these `(1, V)` of which `choice` `(1, 1)` is drawn for certain."""
    return torch.full_like(logits, -torch.inf).scatter_(1, choice, 0.0)


def _continuation(ids: Tensor, length: int) -> Tensor:
    """Up to `length` of the ids that followed in `ids` `(1, S)` where the end of it came last before; `(1, 0)` if nowhere."""
    text = ids[0].to(torch.uint8).cpu().numpy().tobytes()
    start = text.rfind(text[-LOOK_UP_MATCH:], 0, -1) + LOOK_UP_MATCH
    return ids[:, start : start + length] if start >= LOOK_UP_MATCH else ids[:, :0]


class _FirstStop(StoppingCriteria):
    """Whether `criteria` are met by a text `(1, S)` or by what was written before its end; `length` is the first."""

    def __init__(self, criteria: StoppingCriteriaList, prompt: Tensor):
        self.criteria, self.seen = criteria, prompt.shape[1]
        self.length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        while self.length is None and self.seen < input_ids.shape[1]:
            self.seen += 1
            if bool(self.criteria(cast(Any, input_ids[:, : self.seen]), scores, **kwargs).all()):
                self.length = self.seen
        return torch.full((1,), self.length is not None, device=input_ids.device)


class _StreamToStop(BaseStreamer):
    """Passes on what comes before the first stop."""

    def __init__(self, streamer: BaseStreamer, first: _FirstStop, prompt: Tensor):
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


class CharformerGenerationMixin:
    """What `generate` of a Charformer takes beside the arguments of every model of Transformers.

    - `use_extra_targets=True`: the classifiers of targets 2..K draft, the model verifies. Same characters as without
      (greedy), or the same distribution (sampled); one prompt at a time.
    - `assistant_early_exit=l`: layer `l` and its classifier draft instead.
    - `rolling_context=m` (or `True` for half the window): when the window is full, the last `m` characters are encoded
      anew and generation goes on, as long as you like. Positions are learned, so what is cached cannot be shifted.
    """

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, *args, **kwargs):
        rolling_context, use_extra_targets = kwargs.pop("rolling_context", None), kwargs.pop("use_extra_targets", None)
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)  # type: ignore[misc]
        # They may also stand in a GenerationConfig, or in the model's.
        rolling_context = getattr(prepared, "rolling_context", None) if rolling_context is None else rolling_context
        if use_extra_targets is None:
            use_extra_targets = getattr(prepared, "use_extra_targets", None)
        prepared.rolling_context = None
        if rolling_context is not None and rolling_context is not False:
            prepared.rolling_context = self._checked_rolling_context(rolling_context, prepared)
            model_kwargs["rolling_context"] = prepared.rolling_context
        if use_extra_targets:
            # What sends `generate` to verify drafts.
            prepared.prompt_lookup_num_tokens = self._checked_num_drafts(prepared)
            model_kwargs["use_extra_targets"] = True
        if prepared.assistant_early_exit is not None:
            self._check_early_exit(prepared.assistant_early_exit)
        return prepared, model_kwargs

    def _checked_rolling_context(self, rolling_context: int | bool, generation_config: GenerationConfig) -> int:
        window: int = self.config.max_position_embeddings  # type: ignore[attr-defined]
        if rolling_context is True:
            rolling_context = max(1, window // 2)
        if not 1 <= rolling_context < window:
            raise ValueError(
                f"rolling_context is {rolling_context}; it must be 1 to {window - 1}, below max_position_embeddings"
            )
        if generation_config.use_cache is False:
            raise ValueError("rolling_context needs use_cache=True: the cache tells how full the window is")
        return int(rolling_context)

    def _checked_num_drafts(self, generation_config: GenerationConfig) -> int:
        settings = self.loss_settings  # type: ignore[attr-defined]
        if settings.num_targets < 2:
            raise ValueError(
                "use_extra_targets needs a model with num_targets of 2 or more, whose further targets draft; this one has"
                f" num_targets={settings.num_targets}"
            )
        if (generation_config.num_beams or 1) > 1:
            raise ValueError(
                f"use_extra_targets does not go with beam search (num_beams={generation_config.num_beams}); leave one out"
            )
        for name in ("assistant_early_exit", "prompt_lookup_num_tokens"):
            if getattr(generation_config, name) is not None:
                raise ValueError(f"use_extra_targets and {name} are two ways to draft; give one of them")
        return int(settings.num_targets) - 1

    def _check_early_exit(self, layer: int) -> None:
        heads = [term.layer for term in self.loss_settings.terms if term.offset == 1 and not term.is_main]  # type: ignore[attr-defined]
        if layer not in heads:
            raise ValueError(
                f"assistant_early_exit is {layer}; the layers of this model that have a classifier of their own are {heads}"
            )

    def _get_candidate_generator(self, *args, **kwargs):
        generation_config, model_kwargs = kwargs["generation_config"], kwargs["model_kwargs"]
        window: int = self.config.max_position_embeddings  # type: ignore[attr-defined]
        if model_kwargs.get("use_extra_targets"):
            return ExtraTargetCandidateGenerator(self, generation_config, kwargs["logits_processor"])
        if generation_config.assistant_early_exit is not None:
            return EarlyExitCandidateGenerator(self, generation_config, kwargs["logits_processor"])
        generator: Any = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        draft = generator.get_candidates

        def draft_inside_window(input_ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
            """Prompt look-up would pass the end of the window."""
            candidates, logits = draft(input_ids, *args, **kwargs)
            past = model_kwargs[CACHE].get_seq_length() if generation_config.rolling_context else None
            room = max(0, window - (input_ids.shape[1] if past is None else past + 1))
            if logits is not None:
                logits = logits[:, :room]
            return candidates[:, : input_ids.shape[1] + room], logits

        generator.get_candidates = draft_inside_window
        return generator

    def _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        """As everywhere in Transformers, which looks at the criteria once a pass; here after each of its characters."""
        if input_ids.shape[0] > 1:
            raise ValueError(
                f"drafts are verified for one prompt at a time, and there are {input_ids.shape[0]}; generate them one by"
                " one, or without use_extra_targets, assistant_early_exit, prompt_lookup_num_tokens and assistant_model"
            )
        own = [c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria)]
        decode: Any = super()._assisted_decoding  # type: ignore[misc]
        if not own:
            return decode(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        first = _FirstStop(StoppingCriteriaList(own), input_ids)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _StreamToStop(kwargs["streamer"], first, input_ids)
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
        rolling_context: int | None = None,
        use_extra_targets: bool | None = None,
        past_key_values: Any = None,
        **kwargs,
    ) -> dict[str, Any]:
        """As everywhere in Transformers; when the window is full and may roll, its end is all that is encoded."""
        cache = one_cache(cache, past_key_values)
        if rolling_context is not None:
            window: int = self.config.max_position_embeddings  # type: ignore[attr-defined]
            past = cache.get_seq_length()
            new = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
            if past + new > window:
                cache.crop(-past)
                past, new = 0, rolling_context
            visible = past + new
            input_ids, next_sequence_length = input_ids[:, -new:], None
            if attention_mask is None:
                positions = torch.arange(past, visible, device=input_ids.device).expand(input_ids.shape[0], -1)
            else:
                attention_mask = attention_mask[:, -visible:]
                positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
            kwargs["position_ids"] = positions
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        # PEFT, in prompt and prefix tuning, looks here for whether the text has begun, by the old name alone.
        return inputs | {"past_key_values": inputs.get(CACHE)}

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        """Refuse, before any character is generated, what would not fit into a window that does not roll."""
        window: int = self.config.max_position_embeddings  # type: ignore[attr-defined]
        if input_ids_length < 1:
            raise ValueError("the prompt is empty; give one character or more")
        if generation_config.rolling_context is None:  # type: ignore[attr-defined]
            self._check_fit(generation_config.max_length, input_ids_length, window)
        super()._validate_generated_length(  # type: ignore[misc]
            generation_config, input_ids_length, has_default_max_length
        )

    @staticmethod
    def _check_fit(max_length: int, prompt_length: int, window: int) -> None:
        rolling = ", or give rolling_context to go on past the window"
        if prompt_length >= window:
            raise ValueError(
                f"the prompt is {prompt_length} characters long; the window of max_position_embeddings={window} leaves no"
                f" room for a new one. Give the last {window - 1} characters or fewer{rolling}"
            )
        if max_length > window:
            raise ValueError(
                f"prompt ({prompt_length}) and new characters ({max_length - prompt_length}) come to {max_length}, more"
                f" than the window of max_position_embeddings={window}. Set max_new_tokens to {window - prompt_length} or"
                f" less, or shorten the prompt{rolling}"
            )
