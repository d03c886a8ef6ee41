"""Drafts of the next tokens by parts of the model itself, for the model to verify."""

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compatibility import CACHE


# Until it is known what drafts cost, drafting stops when the drafter's own probability that all its drafts so far are correct
# falls below `CONFIDENCE`. `LOWEST` and `HIGHEST` bound what takes its place.
CONFIDENCE, LOWEST, HIGHEST = 0.1, 0.02, 0.9
# If the end of a text occurs earlier among the last `LOOK_BACK` tokens, the text that followed it there is looked up: at most
# `LOOK_UP` tokens. They are drafted while the drafter gives each a probability of at least `AGREEMENT`. One below contradicts.
LOOK_UP, LOOK_BACK, AGREEMENT = 16, 4096, 0.1
# The probability that a token is right that was looked up, if those before it were.
LOOK_UP_TRUST = 0.9
# The most drafts of an early exit. Each costs a pass through some layers.
MAX_EARLY_DRAFTS = 8
# So many passes with drafts are compared with plain ones. `TRIAL` passes are enough if no draft was right, or if they were
# slower by `LOSS`. The first of them has `TRIAL` drafts at most.
PATIENCE, TRIAL, LOSS = 8, 3, 1.15
# If drafts did not pay, so many passes go without, and twice as many each time that they do not pay again: at first, at most.
SHORTEST_REST, LONGEST_REST = 32, 512
# How many ranges of a drafter's probabilities are told apart, and how many drafts are remembered when they have not paid.
BINS, REMEMBERED = 5, 4
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
    """Which drafts pay, from what passes cost and what drafts bring, both measured while they run.

    One draft more costs some seconds. With `rate` tokens a second, it is worth them if it and all drafts before it are right with
    a probability of at least seconds times `rate`. A batch is finished when its last row is: all counts of tokens are means
    over the rows that are behind.
    """

    def __init__(self, samples: bool = False) -> None:
        self.samples = samples
        self.plain: deque[float] = deque(maxlen=9)
        # Of each recent pass with drafts: how many tokens it verified and wrote; seconds of drafting and in all.
        self.recent: deque[tuple[int, float, float, float]] = deque(maxlen=4 * PATIENCE)
        self.of_draft: deque[float] = deque(maxlen=9)
        # By the drafter's probability of a draft: how often it was right, of how many.
        self.right = [[0.0, 0.0] for _ in range(BINS)]
        self.passes = self.resting = self.rested = self.losses = 0
        # Tokens and seconds of the last drafts that did not pay, though some were right.
        self.given_up: tuple[float, float] | None = None
        # How often the text was right where the drafter contradicted what was looked up there, of how many times.
        self.contradicted = [0, 0]
        self.known_thresholds: tuple[float, float] | None = None
        self.repeats = False
        """Whether the last pass verified text that was looked up, and all of it was right."""

    def begin_again(self) -> None:
        """Forget the measured times, since passes hold fewer rows from now on."""
        for times in (self.plain, self.recent, self.of_draft):
            times.clear()

    def rests(self) -> bool:
        """Whether the next pass goes without drafts: the first, now and then one to be timed, and where drafts do not pay."""
        self.passes += 1
        self.resting -= 1
        return self.resting >= 0 or not self.plain or self.passes % PLAIN_EVERY == 1

    def chance(self, probability: float) -> float:
        """The probability that a draft is right, from the probability that the drafter gives it.

        At first it is the probability itself. In sampling, drafts and text are picked by the same random numbers: even
        an improbable draft is right where drafter and model agree.
        """
        hits, trials = self.right[min(int(probability * BINS), BINS - 1)]
        at_first = (1 + probability) / 2 if self.samples else probability
        return (hits + at_first) / (trials + 1)

    def verified(self, probabilities: list[float], matches: int) -> None:
        """Take down which drafts were right: the first `matches`, and not the one after them."""
        for number, probability in enumerate(probabilities[: matches + 1]):
            found = self.right[min(int(probability * BINS), BINS - 1)]
            found[0] += number < matches
            found[1] += 1

    def most_drafts(self) -> int:
        """The highest number of drafts to make: few until it is known what they cost."""
        return LOOK_UP if self.recent else TRIAL

    def trusts_text(self) -> bool:
        """Whether text that was looked up is drafted also where the drafter contradicts it: where it is right more often."""
        hits, trials = self.contradicted
        return (hits + 2 * AGREEMENT) / (trials + 2) > self.accuracy()

    def accuracy(self) -> float:
        """How often drafts were right, where those before them were."""
        return (sum(hits for hits, _ in self.right) + 1) / (sum(trials for _, trials in self.right) + 1)

    def thresholds(self) -> tuple[float, float]:
        """The probabilities below which it does not pay to write one more draft, and to verify a written one."""
        if not self.recent:
            return CONFIDENCE, LOWEST
        if self.known_thresholds and len(self.recent) > TRIAL and self.passes % PATIENCE:
            return self.known_thresholds
        counts, tokens, drafting, seconds = zip(*self.recent, strict=True)
        usual = 2 * statistics.median(seconds)
        verifying = [(n, all_ - some) for n, some, all_ in zip(counts, drafting, seconds, strict=True) if all_ < usual]
        verifying += [(0, one) for one in self.plain if one < usual]
        rate, slope = sum(tokens) / sum(seconds), 0.0
        if len({n for n, _ in verifying}) > 1:
            slope = max(0.0, statistics.linear_regression(*zip(*verifying, strict=True)).slope)
        of_draft = statistics.median(self.of_draft) if self.of_draft else 0.0
        self.known_thresholds = _bounded((slope + of_draft) * rate), _bounded(slope * rate)
        return self.known_thresholds

    def passed_without(self, seconds: float) -> None:
        """Take down one pass without drafts; after some of them it is judged again whether the last drafts did not pay."""
        self.plain.append(seconds)
        self.rested += 1
        if self.given_up is not None and self.rested == PATIENCE:
            tokens, used = self.given_up
            if tokens * statistics.mean(_bounded_times(self.plain)) >= used:
                self.resting, self.losses = 0, self.losses - 1

    def passed(self, verified: int, drafts: int, tokens: float, drafting: float, seconds: float) -> None:
        """Take down one pass with drafting.

        Args:
            verified: Number of tokens that followed the last one.
            drafts: Number of those that the drafter wrote.
            tokens: Number of tokens written.
            drafting: Seconds that the drafts took.
            seconds: Seconds in all.
        """
        self.recent.append((verified, tokens, drafting, seconds))
        if drafts:
            self.of_draft.append(drafting / drafts)
        passes = len(self.recent)
        if passes < TRIAL:
            return
        plain = statistics.mean(_bounded_times(self.plain))
        written, used = sum(one[1] for one in self.recent), sum(_bounded_times(one[3] for one in self.recent))
        if written > passes and written * plain * (LOSS if passes < PATIENCE else 1) >= used:
            if passes >= PATIENCE:
                self.losses = 0
            return
        self.resting, self.rested = min(SHORTEST_REST * 2**self.losses, LONGEST_REST), 0
        self.given_up = (written, used) if written > passes else None
        self.losses += 1
        self.recent.clear()
        # The next trial must not depend on how bad drafts were long ago.
        known = REMEMBERED / max(REMEMBERED, sum(trials for _, trials in self.right))
        self.right = [[known * hits, known * trials] for hits, trials in self.right]


def _bounded_times(seconds: Iterable[float]) -> list[float]:
    """The times, none above twice their median: other programs interrupt some passes."""
    times = [*seconds]
    usual = 2 * statistics.median(times)
    return [min(one, usual) for one in times]


def _bounded(probability: float) -> float:
    return min(max(probability, LOWEST), HIGHEST)


def as_string(ids: list[int]) -> str:
    """A text with one character for each id, in which Python searches fast."""
    return "".join(map(chr, ids))


def matched_tokens(vocab_size: int) -> int:
    """How many tokens at the end of a text must occur earlier: 8 bytes, or 2 tokens of about as much text."""
    return 8 if vocab_size < 1024 else 2


def continuation(text: str, length: int, match: int) -> list[int]:
    """`length` ids that followed the last earlier occurrence of the last `match` ids of `text`; none if there is none.

    Where they reach the end of `text`, the text repeats itself, and so do they.
    """
    first = max(0, len(text) - LOOK_BACK)
    start = text.rfind(text[-match:], first, -1) + match
    if start < match or len(text) < match:
        return []
    known = [ord(one) for one in text[start : start + length]]
    return (known * length)[:length]


Choose = Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]]
"""Maps the drafts so far, each `(B,)`, and logits `(B, V)` to probabilities `(B, V)` and the choice `(B,)` among them."""


@dataclass
class Drafts:
    """What was drafted after each row of a batch."""

    tokens: Tensor
    """`(B, n)`: first those of the drafter, then what was looked up."""
    probabilities: list[list[float]]
    """Of each row, the drafter's probabilities of its own drafts, up to one that was looked up."""
    written: int = 0
    """How many the drafter wrote."""
    contradicted: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By row, the number and the token of the first draft that was looked up and that the drafter contradicts."""


def write_drafts(
    draft: Draft,
    max_drafts: int,
    choose: Choose,
    looked_up: list[list[int]],
    last: Tensor,
    limit: int,
    pace: Pace,
    deciding: list[int],
) -> Drafts:
    """At most `limit` drafts for each of B texts; only the rows `deciding` decide how many.

    Where a text repeats itself, its earlier continuation, which is `looked_up`, is drafted (prompt look-up, Saxena 2023)
    until the drafter contradicts it. It also continues after the drafter's last draft. `last` `(B,)` holds the last
    token of each text.
    """
    agrees, confidence = [bool(known) for known in looked_up], [1.0] * len(looked_up)
    worth_drafting, worth_verifying = pace.thresholds()
    accuracy = pace.accuracy()
    drafts: list[Tensor] = []
    found = Drafts(last[:, None][:, :0], [[] for _ in looked_up])
    # Text that repeats itself is looked up for as long as that goes well; the drafter is not asked. Nor is a bad one.
    asks = accuracy >= worth_drafting and not (pace.repeats and all(agrees[row] for row in deciding))
    for number in range(min(max_drafts, limit, pace.most_drafts()) if asks else 0):
        probabilities, choice = choose(drafts, draft(number, drafts[-1] if drafts else last))
        found.written += 1
        if any(agrees):
            choice = _agreed(looked_up, agrees, number, probabilities, choice, found, pace)
        if not all(agrees):
            chosen = probabilities.gather(1, choice[:, None])[:, 0].tolist()
            for row, probability in enumerate(chosen):
                # A looked-up draft does not lower the confidence: the text, not the drafter, proposed it.
                if not agrees[row]:
                    found.probabilities[row].append(probability)
                    confidence[row] *= pace.chance(probability)
        mean = sum(confidence[row] for row in deciding) / len(deciding)
        if mean < worth_verifying:
            break
        drafts.append(choice)
        if not any(agrees) and mean * accuracy < worth_drafting:
            break
    width = max((len(known) for known, agreed in zip(looked_up, agrees, strict=True) if agreed), default=0)
    width = min(width, pace.most_drafts())
    trust = sum(confidence[row] for row in deciding if agrees[row]) / len(deciding)
    while len(drafts) < width and trust >= worth_verifying:
        now = [known[len(drafts)] if len(drafts) < len(known) else 0 for known in looked_up]
        drafts.append(torch.tensor(now, device=last.device))
        trust *= LOOK_UP_TRUST
    if drafts:
        found.tokens = torch.stack(drafts, dim=1)
    return found


def _agreed(
    looked_up: list[list[int]],
    agrees: list[bool],
    number: int,
    probabilities: Tensor,
    choice: Tensor,
    found: Drafts,
    pace: Pace,
) -> Tensor:
    """`choice` `(B,)` with the `number`-th looked-up token in the rows that have one, if the drafter does not contradict it.

    `agrees` is set to false in the other rows.
    """
    known = torch.tensor([ids[number] if number < len(ids) else 0 for ids in looked_up], device=choice.device)
    given = probabilities.gather(1, known[:, None])[:, 0].tolist()
    for row, ids in enumerate(looked_up):
        agrees[row] = agrees[row] and number < len(ids)
        if agrees[row] and given[row] < AGREEMENT:
            found.contradicted.setdefault(row, (number, ids[number]))
            agrees[row] = pace.trusts_text()
    return torch.where(torch.tensor(agrees, device=choice.device), known, choice)
