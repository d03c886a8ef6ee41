"""Drafts of the next characters by parts of the model itself, for the model to verify."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .compatibility import CACHE


# Drafting stops when the drafter's own probability that all its drafts so far are correct falls below this value. Drafts that
# were looked up in the text do not count.
CONFIDENCE = 0.1
# If the last `LOOK_UP_MATCH` characters occur earlier among the last `LOOK_BACK`, the text that followed them there is looked up:
# at most `LOOK_UP` characters. They are drafted while the drafter gives each a probability of at least `AGREEMENT`.
LOOK_UP, LOOK_UP_MATCH, LOOK_BACK, AGREEMENT = 16, 8, 4096, 0.1
# The most drafts of an early exit. Each costs a pass through some layers.
MAX_EARLY_DRAFTS = 8


class SelfDraftingCandidateGenerator(CandidateGenerator):
    """Drafts by a part of the model itself, which the model verifies in its next pass.

    If characters are sampled, drafts are sampled too. Verification accepts or resamples them so that the result has
    exactly the model's distribution (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).

    Where the text repeats itself, its earlier continuation is drafted (prompt look-up, Saxena 2023) until the drafter
    contradicts it. It also extends beyond the drafter's last draft.
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
        """A function that maps the number (0, 1, ...) of a draft and the character `(1,)` before it to logits `(1, V)`.

        `state` `(1, hidden_size)` is the final hidden state from which the last known character was predicted.
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
        """`input_ids` `(1, S)` followed by the drafts, and, if sampling, the drafts' processed logits `(1, drafts, V)`."""
        if is_first_iteration:
            return input_ids, None
        sample = self.generation_config.do_sample
        room = min(
            self.generation_config.max_length - input_ids.shape[1] - 1,
            # The character before the drafts goes through the model too.
            self.model.config.max_position_embeddings - int(model_kwargs[CACHE].get_seq_length()) - 1,
        )
        if room < 1:
            return input_ids, None
        looked_up = _continuation(input_ids[:, -LOOK_BACK:], min(LOOK_UP, room))
        # After a pass that verified drafts, the state of the last accepted one; otherwise the last.
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
                # A looked-up draft does not lower the confidence: the text, not the drafter, proposed it.
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
        """Do nothing: the number of drafts follows from the drafter's confidence."""


class ExtraTargetCandidateGenerator(SelfDraftingCandidateGenerator):
    """Drafts by the heads of targets 2..K of the final layer (Gloeckle et al. 2024, arXiv 2404.19737, section 2).

    At the position whose next character was just accepted, the head of target `k` predicts the character `k - 1`
    steps after that one. Each verifying pass also yields the next drafts, without a second model or cache.
    """

    @property
    def max_drafts(self) -> int:  # type: ignore[override]  # read-only here
        return int(self.model.loss_settings.num_targets) - 1

    @contextmanager
    def drafter(self, model_kwargs: dict[str, Any], state: Tensor) -> Iterator[Callable[[int, Tensor], Tensor]]:
        def draft(number: int, previous: Tensor) -> Tensor:
            nonlocal state
            logits: Tensor
            logits, state = self.model.draft(number + 2, state, previous)
            return logits

        yield draft


class EarlyExitCandidateGenerator(SelfDraftingCandidateGenerator):
    """Drafts by the first layers and the head of the last of them (LayerSkip, Elhoushi et al. 2024, section 4.3).

    Drafting appends to the model's cache, and removes what it appended before the model verifies.
    """

    max_drafts = MAX_EARLY_DRAFTS

    @contextmanager
    def drafter(self, model_kwargs: dict[str, Any], state: Tensor) -> Iterator[Callable[[int, Tensor], Tensor]]:
        layer, cache = self.generation_config.assistant_early_exit, model_kwargs[CACHE]
        past, mask = int(cache.get_seq_length()), model_kwargs.get("attention_mask")
        if mask is None and model_kwargs.get("prompt_mask") is not None:
            mask = mask_up_to(model_kwargs["prompt_mask"], past + 1)
        term = next(term for term in self.model.loss_settings.terms if (term.layer, term.offset) == (layer, 1))
        if mask is not None:
            mask = None if bool(mask[:, -past - 1 :].all()) else mask[:, -past - 1 :]

        def draft(number: int, previous: Tensor) -> Tensor:
            seen = None if mask is None else torch.nn.functional.pad(mask, (0, number), value=1)
            outputs = self.model.model(
                previous[:, None], attention_mask=seen, cache=cache, use_cache=True, num_layers=layer
            )
            logits: Tensor = self.model.auxiliary_heads[term.name](outputs.last_hidden_state[:, -1])
            return logits

        try:
            yield draft
        finally:
            for cached in cache.layers[:layer]:  # after a draft that failed, layers differ in length
                cached.crop(past - int(cached.get_seq_length()))


def mask_up_to(prompt_mask: Tensor, length: int) -> Tensor:
    """The mask `(B, length)` of a prompt and of what was written after it."""
    return torch.nn.functional.pad(prompt_mask, (0, length - prompt_mask.shape[1]), value=1)


def _certain(logits: Tensor, choice: Tensor) -> Tensor:
    """Logits `(1, V)`, in shape and type like `logits`, that give `choice` `(1, 1)` the probability 1."""
    return torch.full_like(logits, -torch.inf).scatter_(1, choice, 0.0)


def _continuation(ids: Tensor, length: int) -> Tensor:
    """Up to `length` ids that followed the last earlier occurrence of the end of `ids` `(1, S)`; `(1, 0)` if none."""
    # Searched as a string with one character for each id; added tokens have ids beyond the bytes.
    text = ids[0].to(torch.int32).cpu().numpy().tobytes().decode("utf-32-le", "surrogatepass")
    start = text.rfind(text[-LOOK_UP_MATCH:], 0, -1) + LOOK_UP_MATCH
    return ids[:, start : start + length] if start >= LOOK_UP_MATCH else ids[:, :0]


class FirstStop(StoppingCriteria):
    """Whether a text `(1, S)` or a beginning of it meets `criteria`. `length` is that of the shortest one that does."""

    def __init__(self, criteria: StoppingCriteriaList, prompt: Tensor):
        self.criteria, self.seen = criteria, prompt.shape[1]
        self.length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        while self.length is None and self.seen < input_ids.shape[1]:
            self.seen += 1
            if bool(self.criteria(cast(Any, input_ids[:, : self.seen]), scores, **kwargs).all()):
                self.length = self.seen
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
