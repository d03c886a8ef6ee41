"""Drafts of the next tokens by parts of the model itself, for the model to verify."""

import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .compatibility import CACHE


# Until it is known what drafts cost, drafting stops when the drafter's own probability that all its drafts so far are correct
# falls below `CONFIDENCE`. `LOWEST` and `HIGHEST` bound what takes its place.
CONFIDENCE, LOWEST, HIGHEST = 0.1, 0.02, 0.9
# If the last `LOOK_UP_MATCH` tokens occur earlier among the last `LOOK_BACK`, the text that followed them there is looked up:
# at most `LOOK_UP` tokens. They are drafted while the drafter gives each a probability of at least `AGREEMENT`.
LOOK_UP, LOOK_UP_MATCH, LOOK_BACK, AGREEMENT = 16, 8, 4096, 0.1
# The probability that a token is right that was looked up, if those before it were.
LOOK_UP_TRUST = 0.9
# The most drafts of an early exit. Each costs a pass through some layers.
MAX_EARLY_DRAFTS = 8
# So many passes with drafts are compared with plain ones. If they did not pay, so many passes go without: at first, and at most.
PATIENCE, SHORTEST_REST, LONGEST_REST = 4, 8, 64
# After this many passes one without drafts is timed.
PLAIN_EVERY = 64

Draft = Callable[[int, Tensor], Tensor]
"""Maps the number (0, 1, ...) of a draft and the tokens `(B,)` before it to logits `(B, V)`."""


class HeadDrafter:
    """Drafts by the heads of targets 2..K of the final layer (Gloeckle et al. 2024, arXiv 2404.19737, section 2).

    At the position whose next token was just accepted, the head of target `k` predicts the token `k - 1`
    steps after that one. Each verifying pass also yields the next drafts, without a second model or cache.
    """

    def __init__(self, model: Any):
        self.model = model
        self.max_drafts = int(model.loss_settings.num_targets) - 1

    @contextmanager
    def drafts(self, model_kwargs: dict[str, Any], mask: Tensor | None, state: Tensor) -> Iterator[Draft]:
        """`state` `(B, hidden_size)` is the final hidden state from which each row's last token was predicted."""

        def draft(number: int, previous: Tensor) -> Tensor:
            nonlocal state
            logits: Tensor
            logits, state = self.model.draft(number + 2, state, previous)
            return logits

        yield draft


class EarlyExitDrafter:
    """Drafts by the first layers and the head of the last of them (LayerSkip, Elhoushi et al. 2024, section 4.3).

    Drafting appends to the model's cache, and removes what it appended before the model verifies.
    """

    max_drafts = MAX_EARLY_DRAFTS

    def __init__(self, model: Any, layer: int):
        self.model, self.layer = model, layer
        self.term = next(term for term in model.loss_settings.terms if (term.layer, term.offset) == (layer, 1))

    @contextmanager
    def drafts(self, model_kwargs: dict[str, Any], mask: Tensor | None, state: Tensor) -> Iterator[Draft]:
        """`mask` `(B, S)` is that of the text up to and including the last token; `None` if there is no padding."""
        cache = model_kwargs[CACHE]
        past = int(cache.get_seq_length())
        seen = mask[:, -past - 1 :] if mask is not None and not bool(mask[:, -past - 1 :].all()) else None

        def draft(number: int, previous: Tensor) -> Tensor:
            outputs = self.model.model(
                previous[:, None],
                attention_mask=None if seen is None else torch.nn.functional.pad(seen, (0, number), value=1),
                cache=cache,
                use_cache=True,
                num_layers=self.layer,
            )
            logits: Tensor = self.model.auxiliary_heads[self.term.name](outputs.last_hidden_state[:, -1])
            return logits

        try:
            yield draft
        finally:
            for cached in cache.layers[: self.layer]:  # after a draft that failed, layers differ in length
                cached.crop(past - int(cached.get_seq_length()))


class Pace:
    """How likely a draft must be to pay, from what passes cost and what drafts bring, both measured while they run.

    One draft more costs `extra` seconds. With `rate` tokens a second, that is worth it if the draft, and all drafts before it,
    are right with a probability of at least `extra * rate`. All counts of tokens are means over the rows of a batch.
    """

    def __init__(self) -> None:
        self.plain: deque[float] = deque(maxlen=9)
        self.extra: deque[float] = deque(maxlen=9)
        self.recent: deque[tuple[int, float, float]] = deque(maxlen=8 * PATIENCE)
        self.passes = self.resting = self.losses = 0

    def rests(self) -> bool:
        """Whether the next pass goes without drafts: the first, now and then one to be timed, and where drafts do not pay."""
        self.passes += 1
        self.resting -= 1
        return self.resting >= 0 or self.passes % PLAIN_EVERY == 1

    def threshold(self) -> float:
        """The probability below which a draft, together with those before it, does not pay."""
        if len(self.extra) < PATIENCE or not self.recent:
            return CONFIDENCE
        rate = sum(tokens for _, tokens, _ in self.recent) / sum(seconds for *_, seconds in self.recent)
        return min(max(statistics.median(self.extra) * rate, LOWEST), HIGHEST)

    def looked_up(self, confidence: float, threshold: float) -> int:
        """How many tokens that were looked up, one after the other, are worth their cost."""
        count = 0
        while count < LOOK_UP and confidence >= threshold:
            count, confidence = count + 1, confidence * LOOK_UP_TRUST
        return count

    def passed(self, drafts: int, tokens: float, seconds: float, rested: bool) -> None:
        """Take down one pass: the number of its drafts, the tokens that it wrote, its time with that of drafting."""
        if rested:
            self.plain.append(seconds)
            return
        plain = statistics.median(self.plain)
        self.recent.append((drafts, tokens, seconds))
        if drafts:
            self.extra.append(max(0.0, seconds - plain) / drafts)
        if len(self.recent) < PATIENCE:
            return
        drafted, written, taken = (sum(values) for values in zip(*self.recent, strict=True))
        if drafted and written * plain >= taken:
            self.losses = 0
            return
        self.losses += 1
        self.resting = min(SHORTEST_REST * 2 ** (self.losses - 1), LONGEST_REST)
        self.recent.clear()


def continuation(ids: Tensor, length: int) -> list[int]:
    """Up to `length` ids that followed the last earlier occurrence of the end of `ids` `(S,)`; none if there is none."""
    # Searched as a string with one character for each id.
    text = ids.to(torch.int32).cpu().numpy().tobytes().decode("utf-32-le", "surrogatepass")
    start = text.rfind(text[-LOOK_UP_MATCH:], 0, -1) + LOOK_UP_MATCH
    return [ord(one) for one in text[start : start + length]] if start >= LOOK_UP_MATCH else []


Choose = Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]]
"""Maps the drafts so far, each `(B,)`, and logits `(B, V)` to probabilities `(B, V)` and the choice `(B,)` among them."""


def write_drafts(
    draft: Draft, max_drafts: int, choose: Choose, texts: list[Tensor], limit: int, pace: Pace, live: list[int]
) -> Tensor:
    """Drafts `(B, n)`, at most `limit`, of what follows the `texts`, of which those with the numbers `live` count.

    Where a text repeats itself, its earlier continuation is drafted (prompt look-up, Saxena 2023) until the drafter
    contradicts it. It also extends beyond the drafter's last draft.
    """
    looked_up = [continuation(text[-LOOK_BACK:], min(LOOK_UP, limit)) for text in texts]
    agrees = [bool(known) for known in looked_up]
    confidence = [1.0] * len(texts)
    threshold = pace.threshold()
    previous = torch.stack([text[-1] for text in texts])
    drafts: list[Tensor] = []
    for number in range(min(max_drafts, limit)):
        probabilities, choice = choose(drafts, draft(number, previous))
        for row, known in enumerate(looked_up):
            # A looked-up draft does not lower the confidence: the text, not the drafter, proposed it.
            agrees[row] = agrees[row] and number < len(known) and float(probabilities[row, known[number]]) >= AGREEMENT
            if agrees[row]:
                choice[row] = known[number]
            else:
                confidence[row] *= float(probabilities[row, choice[row]])
        if sum(confidence[row] for row in live) < threshold * len(live):
            break
        drafts.append(choice)
        previous = choice
    else:
        rest = pace.looked_up(sum(confidence[row] for row in live if agrees[row]) / len(live), threshold)
        width = max((len(known) for known, agreed in zip(looked_up, agrees, strict=True) if agreed), default=0)
        for number in range(len(drafts), min(width, len(drafts) + rest)):
            known_now = [
                known[number] if agreed and number < len(known) else -1
                for known, agreed in zip(looked_up, agrees, strict=True)
            ]
            found = torch.tensor(known_now, device=previous.device)
            drafts.append(torch.where(found < 0, previous, found))
    return torch.stack(drafts, dim=1) if drafts else previous[:, None][:, :0]
