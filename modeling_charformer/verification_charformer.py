"""Generation in which a model verifies several drafted tokens in one pass, for any number of prompts at once.

The tokens that are written are those that the model picks itself: the most probable ones or, when sampling, the maxima of its
log-probabilities plus Gumbel noise. The noise belongs to the token's place in the text, and drafts are picked with the same
noise. So the text depends neither on the drafts nor on their number, and has exactly the model's distribution (Daliri, Musco
and Suresh 2024, arXiv 2408.07978, section 4).
"""

import copy
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as stock
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .compatibility import CACHE
from .drafting_charformer import (
    Drafts,
    EarlyExitDrafter,
    HeadDrafter,
    as_string,
    continuation,
    matched_tokens,
    write_drafts,
)
from .gumbel_noise import GumbelNoise
from .pace_charformer import LOOK_UP, clock_on, keep_pace, pace_of


# Processors that look at the scores of one place alone.
POINTWISE = (
    stock.TemperatureLogitsWarper,
    stock.TopKLogitsWarper,
    stock.TopPLogitsWarper,
    stock.MinPLogitsWarper,
    stock.TypicalLogitsWarper,
    stock.EpsilonLogitsWarper,
    stock.EtaLogitsWarper,
    stock.InfNanRemoveLogitsProcessor,
    stock.LogitNormalization,
    stock.SuppressTokensLogitsProcessor,
)


class Stops:
    """Where the criteria of one call of `generate` end a text."""

    def __init__(self, criteria: StoppingCriteriaList, max_length: int):
        self.max_length = max_length
        self.eos = {
            int(one) for c in criteria if type(c) is EosTokenCriteria for one in c.eos_token_id.flatten().tolist()
        }
        # What Transformers goes by to fill finished rows with padding.
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self.clocks = [c for c in criteria if type(c) is MaxTimeCriteria]
        own = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria)
        self.others = StoppingCriteriaList([c for c in criteria if type(c) not in own])

    def first(self, text: Tensor, row: int, before: int, new: list[int], scores: Any) -> int:
        """The length at which a row of `text` `(B, S)` ends, whose tokens from `before` on are `new`; 0 if it goes on."""
        for number, token in enumerate(new, start=1):
            length = before + number
            if token in self.eos or length >= self.max_length:
                return length
            if self.others and bool(self.others(text[row : row + 1, :length], scores).all()):
                return length
        return 0

    def time_is_up(self, text: Tensor) -> bool:
        return any(bool(clock(text, None).all()) for clock in self.clocks)


class VerifiedDecoding:
    """One call of `generate` that drafts and verifies.

    The rows of a batch are kept padded on the left. A row with fewer accepted tokens than others is moved to the
    right, in the cache too.
    """

    def __init__(
        self,
        model: Any,
        drafter: HeadDrafter | EarlyExitDrafter,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict[str, Any],
    ):
        self.model, self.drafter, self.config, self.streamer = model, drafter, config, streamer
        self.processors = [*processors]
        self.pointwise = all(type(processor) in POINTWISE for processor in processors)
        self.kwargs, self.text, self.stops = model_kwargs, input_ids, Stops(criteria, int(config.max_length or 0))
        self.rows, self.prompt = input_ids.shape
        self.processors_of = [[_of_row(one, row) for one in processors] for row in range(self.rows)]
        self.is_batch, self.numbers, self.live = self.rows > 1, [*range(self.rows)], [*range(self.rows)]
        # Of a batch, what was written is mostly needed as strings alone; to write it into a tensor takes time in each pass.
        self.writes_text = not self.is_batch or not self.pointwise or bool(self.stops.others)
        self.finished: dict[int, tuple[str, int]] = {}
        """Text and end, by index, of the rows that no longer pass through the model."""
        self.strings = [as_string(row) for row in input_ids.tolist()]
        self.lengths, self.ends = [self.prompt] * self.rows, [0] * self.rows
        self.furthest = self.prompt
        """The length that a row would have that had kept as many tokens in each pass as any other."""
        self.padding_id = int(getattr(config, "_pad_token_tensor", None) or 0)
        self.noise = GumbelNoise() if config.do_sample else None
        # In such calls passes take as long as in this one, and drafts are as often right.
        alike = (drafter.layer, self.rows, config.do_sample, config.temperature, input_ids.device)
        self.pace, self.clock = pace_of(model, alike, config.do_sample), clock_on(input_ids.device)
        self.states, self.thread = torch.empty(0), threading.get_ident()
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def run(self) -> Any:
        """The text `(B, S)`, or the output of `generate` with it."""
        handle = self.model.get_decoder().register_forward_hook(self._keep_states)
        try:
            self.kwargs[CACHE].activate_past_recording()
            outputs = self.model._prefill(self.text, self.config, self.kwargs)
            self.vocab_size = outputs.logits.shape[-1]
            self._start(outputs)
            drafts = self.text[:, :0]
            self._accept(outputs.logits[:, -1:], drafts)
            del outputs
            with self.model._optimize_model_for_decode():
                while not self._is_done():
                    self._pass()
        finally:
            handle.remove()
        if self.finished:
            self.pace.begin_again()
        keep_pace(self.model, self.pace)
        if self.streamer is not None:
            self.streamer.end()
        return self._result()

    def _pass(self) -> None:
        """Draft, verify and write once, and take down what it cost."""
        if self.is_batch and 4 * len(self.live) <= 3 * self.rows:
            self._leave_out_finished()
        begin, before = self.clock(), [*self.lengths]
        if self.pace.rests():
            none = self.text[:, :0]
            self._accept(self._forward(none), none)
            self.pace.passed_without(self.clock() - begin)
            return
        live, behind = self.live, self._behind()
        drafts = self._draft(behind)
        drafting = self.clock() - begin
        matches = self._accept(self._forward(drafts.tokens), drafts.tokens)
        for row in live if drafts.written else []:
            probabilities = drafts.probabilities[row]
            # Those that were looked up come first; what the drafter wrote after them may not have been verified.
            first = drafts.written - len(probabilities)
            if matches[row] >= first:
                self.pace.verified(probabilities[: drafts.tokens.shape[1] - first], matches[row] - first)
        for row, (number, token) in drafts.contradicted.items():
            if matches[row] >= number and (after := self.strings[row][before[row] + number :]):
                self.pace.contradicted[0] += after[0] == chr(token)
                self.pace.contradicted[1] += 1
        looked_up = drafts.tokens.shape[1] - drafts.written
        self.pace.repeats = looked_up > 0 and all(matches[row] == drafts.tokens.shape[1] for row in behind)
        tokens = sum(self.lengths[row] - before[row] for row in behind) / len(behind)
        seconds = self.clock() - begin
        self.pace.passed(drafts.tokens.shape[1], drafts.written, tokens, drafting, seconds)

    def _keep_states(self, module: Any, args: Any, outputs: Any) -> None:
        if threading.get_ident() == self.thread:  # another one may generate with the same model
            self.states = outputs[0]

    def _start(self, outputs: Any) -> None:
        """Take over from the prompt's pass the cache, the mask and the positions of what comes next."""
        self.cache = self.kwargs[CACHE] = outputs[CACHE]
        self.cache.crop(0)  # layers with a sliding window forget what is outside it
        self.mask = self.kwargs.pop("attention_mask", None)
        # The prompt's last token is taken down with what follows it, as in every later pass.
        self.seen = (self.prompt if self.mask is None else self.mask.shape[1]) - 1
        self.padding = [0] * self.rows
        if self.mask is not None and self.rows > 1:
            self.padding = (self.mask == 0).sum(-1).tolist()
        elif self.mask is not None and bool(self.mask.all()):
            self.mask = None  # models make no mask of nothing but text faster than they look through it
        self.position = self.kwargs.pop("position_ids", None)
        if self.position is not None:
            self.position = self.position[..., -1:] - 1
            self.last_position = self.position + self.stops.max_length - self.prompt
        self.token_type = self.kwargs.pop("token_type_ids", None)

    def _still_written(self) -> list[int]:
        """The numbers of the rows that have not ended."""
        if self.stops.pads or not self.is_batch:
            return [row for row in range(self.rows) if not self.ends[row]]
        # Without an end-of-sequence token all rows are written until the last one may end.
        ends = [*self.ends, *(end for _, end in self.finished.values())]
        end = max(ends) if all(ends) else self.stops.max_length
        return [row for row in range(self.rows) if self.lengths[row] < end]

    def _behind(self) -> list[int]:
        """Of the live rows those with the most left to write, half of them or more: they decide when all are finished."""
        half = sorted(self.lengths[row] for row in self.live)[(len(self.live) - 1) // 2]
        return [row for row in self.live if self.lengths[row] <= half]

    def _is_done(self) -> bool:
        if self.stops.clocks and self.stops.time_is_up(self.text):
            self.ends = [end or length for end, length in zip(self.ends, self.lengths, strict=True)]
            return True
        return not self.live

    def _draft(self, behind: list[int]) -> Drafts:
        limit = max(self.stops.max_length - self.lengths[row] for row in self.live) - 1
        # In a batch the padding is no part of the window, and `last_position` keeps the positions inside it.
        inside = self.is_batch and self.position is not None
        room = None if inside else self.model._room_for_drafts(self.cache)
        limit = limit if room is None else min(limit, room)
        if limit < 1:
            return Drafts(self.text[:, :0], [])
        self._reserve(limit)
        mask = None if self.mask is None else mask_up_to(self.mask, self.seen + 1)
        match = matched_tokens(self.vocab_size)
        looked_up = [continuation(text, min(LOOK_UP, limit), match) for text in self.strings]
        with self.drafter.drafts(self.kwargs, mask, self.state) as draft:
            return write_drafts(
                draft, self.drafter.max_drafts, self._choose, looked_up, self.last, limit, self.pace, behind
            )

    def _choose(self, drafts: list[Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        if drafts and not self.pointwise:
            for row, length in enumerate(self.lengths):
                self.text[row, length + len(drafts) - 1] = drafts[-1][row]
        if logits.shape[-1] != self.vocab_size:  # that of the model was resized after its heads were made
            logits = torch.nn.functional.pad(logits, (0, self.vocab_size - logits.shape[-1]), value=-torch.inf)
        scores = self._processed(logits[:, None].to(self.text.device, torch.float32), len(drafts))
        return scores[:, 0].softmax(-1), self._picked(scores, len(drafts))[:, 0]

    def _reserve(self, more: int) -> None:
        """Make room in `text` for `more` tokens after the longest row."""
        if not self.writes_text:
            return
        short = max(self.lengths) + more - self.text.shape[1]
        if short > 0:
            self.text = torch.nn.functional.pad(self.text, (0, max(short, self.text.shape[1], 256)))

    def _forward(self, drafts: Tensor) -> Tensor:
        """Logits `(B, n + 1, V)` of what follows the last token and each of the drafts `(B, n)`."""
        fed = drafts.shape[1] + 1
        self._reserve(fed)
        if fed > 1:
            self._put(drafts)
        if not self.is_batch:
            ids = self.text[:, : self.lengths[0] + fed - 1]
        else:
            ids = torch.cat([self.last[:, None], drafts], dim=-1)
        more: dict[str, Any] = {}
        if self.position is not None:
            more["position_ids"] = self.position + torch.arange(1, fed + 1, device=self.position.device)
            if self.furthest + fed > self.stops.max_length:  # no text reaches places that may lie outside the window
                more["position_ids"] = torch.minimum(more["position_ids"], self.last_position)
        if self.token_type is not None:
            more["token_type_ids"] = self.token_type[:, -1:].expand(-1, fed)
        if self.is_batch and any(self.padding):
            slots = torch.arange(int(self.cache.get_seq_length()) + fed, device=self.text.device)
            more["attention_mask"] = (slots >= torch.tensor(self.padding, device=slots.device)[:, None]).long()
        elif not self.is_batch and self.mask is not None:
            more["attention_mask"] = mask_up_to(self.mask, self.seen + fed)
        if "logits_to_keep" in self.kwargs:
            more["logits_to_keep"] = fed
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=fed, **(self.kwargs | more))
        logits: Tensor = self.model(**inputs, return_dict=True).logits
        return logits[:, -fed:]

    def _processed(self, scores: Tensor, offset: int) -> Tensor:
        """Scores `(B, n, V)` of the places from `offset` after each row on, as the processors leave them."""
        if not self.processors:
            return scores
        if self.pointwise:
            flat = scores.flatten(0, 1)
            for processor in self.processors:
                flat = processor(self.text, flat)
            return flat.view_as(scores)
        scores = scores.clone()
        for row, length in enumerate(self.lengths):
            for number in range(scores.shape[1]):
                written, one = self.text[row : row + 1, : length + offset + number], scores[row : row + 1, number]
                for processor in self.processors_of[self.numbers[row]]:
                    one = processor(written, one)
                scores[row, number] = one[0]
        return scores

    def _picked(self, scores: Tensor, offset: int) -> Tensor:
        """The tokens `(B, n)` that are picked by scores `(B, n, V)` of the places from `offset` after each row on."""
        if self.noise is not None:
            # Finished rows go along with the others: noise is kept from the first place on that a row may still ask for.
            first = min((self.lengths[row] for row in self.live), default=0)
            places = [max(length, first) - self.prompt for length in self.lengths]
            scores = scores + self.noise.at(places, self.numbers, offset, scores.shape[1], scores)
        return scores.argmax(-1)

    def _accept(self, logits: Tensor, drafts: Tensor) -> list[int]:
        """Write what the model picks as long as it is what was drafted, and one token more; returns how many matched."""
        fed = drafts.shape[1] + 1
        logits = logits.to(self.text.device, torch.float32)
        scores = self._processed(logits, 0)
        picked = self._picked(scores, 0)
        tokens = torch.cat([picked, drafts], dim=-1).tolist()
        matches = [_length_of_match(row[: fed - 1], row[fed:]) for row in tokens]
        kept = [0] * self.rows
        self._reserve(fed)
        if self.config.return_dict_in_generate and self.config.output_scores:
            self.scores.extend(scores[:, number] for number in range(matches[0] + 1))
        if self.config.return_dict_in_generate and self.config.output_logits:
            self.logits.extend(logits[:, number] for number in range(matches[0] + 1))
        self._put(picked)
        for row in self.live:
            kept[row] = self._extend(row, tokens[row][: matches[row] + 1])
        if self.streamer is not None:
            self.streamer.put(picked[:, : kept[0]].cpu())
        # Finished rows run ahead of the others no further than need be: the longest row decides how long the cache is.
        kept = [one or min(filter(None, kept), default=fed) for one in kept]
        self.live, self.furthest = self._still_written(), self.furthest + max(kept)
        alike = len(set(kept)) == 1
        self.state, self.last = (
            of_all[:, kept[0] - 1] if alike else self._of_each(of_all, kept)
            for of_all in (self.states[:, -fed:], picked)
        )
        self.seen += kept[0]
        if self.position is not None:
            more = kept[0] if alike else torch.tensor(kept, device=self.position.device)[:, None]
            self.position = self.position + more
        self._align(kept, fed)
        return matches

    def _of_each(self, of_all: Tensor, kept: list[int]) -> Tensor:
        numbers = torch.tensor(kept, device=of_all.device) - 1
        return of_all[torch.arange(self.rows, device=of_all.device), numbers]

    def _put(self, tokens: Tensor) -> None:
        """Write `tokens` `(B, n)` after the end of each row of `text`. They do not belong to it yet."""
        if not self.writes_text:
            return
        count = tokens.shape[1]
        if self.rows == 1:
            self.text[:, self.lengths[0] : self.lengths[0] + count] = tokens
        else:
            places = [[*range(length, length + count)] for length in self.lengths]
            self.text.scatter_(1, torch.tensor(places, device=self.text.device), tokens)

    def _extend(self, row: int, new: list[int]) -> int:
        """Make `new` tokens, which were put after the row's end, part of it, up to where it ends; returns how many."""
        length = self.lengths[row]
        new = new[: self.stops.max_length - length]
        if not self.ends[row]:
            end = self.stops.first(self.text, row, length, new, tuple(self.scores) or None)
            if end and (self.stops.pads or not self.is_batch):
                new = new[: end - length]
            self.ends[row] = end
        self.strings[row] += as_string(new)
        self.lengths[row] = length + len(new)
        return len(new)

    def _align(self, kept: list[int], fed: int) -> None:
        """Take out of the cache the drafts that no row kept, and move each row's tokens to the right end."""
        shifts = [max(kept) - one for one in kept]
        if not any(shifts):
            self.cache.crop(max(kept) - fed)
            return
        padding = [before + shift for before, shift in zip(self.padding, shifts, strict=True)]
        spare = min(padding)
        self.padding = [one - spare for one in padding]
        indices: dict[tuple[int, int], Tensor] = {}
        for layer in self.cache.layers:
            if not layer.is_initialized:  # it reads another layer's
                continue
            for name in ("keys", "values"):
                cached = getattr(layer, name)
                rows, heads, length, size = cached.shape
                if (heads, length) not in indices:
                    places = torch.arange(spare, length - fed + max(kept), device=cached.device)
                    places = (places - torch.tensor(shifts, device=cached.device)[:, None]).clamp(min=0)
                    begins = length * torch.arange(rows * heads, device=cached.device).view(rows, heads, 1)
                    indices[heads, length] = (begins + places[:, None]).flatten()
                # As a matrix, since this is several times as fast as to gather in four dimensions.
                kept_states = cached.reshape(-1, size).index_select(0, indices[heads, length])
                setattr(layer, name, kept_states.view(rows, heads, -1, size))

    def _leave_out_finished(self) -> None:
        """Once a quarter of a batch's rows are finished, pass the others alone through the model."""
        of_rows = [one for one in (self.position, self.token_type) if one is not None]
        unknown = any(isinstance(one, Tensor) for one in self.kwargs.values())
        if unknown or any(one.shape[0] != self.rows for one in of_rows):
            return  # there are inputs of which it is not known what belongs to a row
        for row in range(self.rows):
            if row not in self.live:
                self.finished[self.numbers[row]] = (self.strings[row], self.ends[row])
        live, index = self.live, torch.tensor(self.live)  # on the CPU, for layers lie on several devices
        spare = min(self.padding[row] for row in live)
        self.numbers, self.lengths, self.ends, self.padding = (
            [column[row] for row in live]
            for column in (self.numbers, self.lengths, self.ends, [one - spare for one in self.padding])
        )
        self.strings = [self.strings[row] for row in live]
        self.rows, self.live = len(live), [*range(len(live))]
        self.text, self.state, self.last = self.text[index], self.state[index], self.last[index]
        if self.position is not None:
            self.position, self.last_position = self.position[index], self.last_position[index]
        if self.token_type is not None:
            self.token_type = self.token_type[index]
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[index][:, :, spare:], layer.values[index][:, :, spare:]
        self.pace.begin_again()

    def _bring_back_finished(self) -> None:
        rows = self.finished | dict(zip(self.numbers, zip(self.strings, self.ends, strict=True), strict=True))
        strings, ends = zip(*(rows[row] for row in sorted(rows)), strict=True)
        self.lengths, self.ends = [len(one) for one in strings], [*ends]
        self.text = self.text.new_zeros(len(rows), max(self.lengths))
        for row, string in enumerate(strings):
            self.text[row, : len(string)] = torch.tensor([*map(ord, string)])

    def _result(self) -> Any:
        if self.is_batch:
            self._bring_back_finished()
        end = max(self.ends)
        if self.stops.pads:
            for row, length in enumerate(self.ends):
                if length < end:
                    self.text[row, length:end] = self.padding_id
        else:
            end = min(end, *self.lengths)  # when the time is up, rows differ in length
        text = self.text[:, :end]
        if not self.config.return_dict_in_generate:
            return text
        count = end - self.prompt
        output: Any = GenerateDecoderOnlyOutput
        return output(
            sequences=text,
            scores=tuple(self.scores[:count]) if self.config.output_scores else None,
            logits=tuple(self.logits[:count]) if self.config.output_logits else None,
            **{CACHE: None if self.is_batch else self.cache},
        )


def _length_of_match(ids: list[int], others: list[int]) -> int:
    return next(
        (number for number, (one, other) in enumerate(zip(ids, others, strict=True)) if one != other), len(ids)
    )


def _of_row(processor: Any, row: int) -> Any:
    """The processor for one row of a batch: the repetition penalty knows how many tokens of each row are padding."""
    padding = getattr(processor, "prompt_ignore_length", None)
    if isinstance(padding, Tensor):
        processor = copy.copy(processor)
        processor.prompt_ignore_length = padding[row : row + 1]
    return processor


def mask_up_to(prompt_mask: Tensor, length: int) -> Tensor:
    """The mask `(B, length)` of a prompt and of what was written after it."""
    return torch.nn.functional.pad(prompt_mask, (0, length - prompt_mask.shape[1]), value=1)
