"""How many drafts to write and to verify, from what passes cost and what drafts bring."""

import copy
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch


# Until it is known what drafts cost, drafting stops when the drafter's own probability that all its drafts so far are correct
# falls below `CONFIDENCE`. `LOWEST` and `HIGHEST` bound what takes its place.
CONFIDENCE, LOWEST, HIGHEST = 0.1, 0.02, 0.9
# At most so many tokens are drafted. Those that are looked up are drafted while the drafter gives each a probability of at
# least `AGREEMENT`. One below contradicts.
LOOK_UP, AGREEMENT = 16, 0.1
# So many passes with drafts are compared with plain ones. `TRIAL` passes are enough of a drafter that is mostly wrong, and one
# if it is mostly wrong again, when no draft was right or they were slower by `LOSS`. The first has `TRIAL` drafts at most.
PATIENCE, TRIAL, LOSS = 8, 3, 1.15
# Below these shares of right drafts a drafter is mostly wrong, and mostly wrong again.
MOSTLY_WRONG, WRONG_AGAIN = 0.5, 0.2
# If drafts did not pay, so many passes go without, and twice as many each time that they do not pay again: at first, at most.
SHORTEST_REST, LONGEST_REST = 32, 512
# How many ranges of a drafter's probabilities are told apart, and how many drafts are remembered when they have not paid.
BINS, REMEMBERED = 5, 4
# After this many passes one without drafts is timed.
PLAIN_EVERY = 64


class Pace:
    """Which drafts pay, from what passes cost and what drafts bring, both measured while they run.

    One draft more costs some seconds. With `rate` tokens a second, it is worth them if it and all drafts before it are right with
    a probability of at least seconds times `rate`. A batch is finished when its last row is: all counts of tokens are means
    over the rows that are behind.
    """

    def __init__(self, samples: bool = False, call: Hashable = None) -> None:
        self.samples, self.call = samples, call
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

    def begin_text(self) -> None:
        """Go on in another text, in which drafts that did not pay are tried again soon."""
        self.repeats = False
        self.resting = min(self.resting, SHORTEST_REST)

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

    def _needed(self) -> int:
        """How many passes with drafts are enough to tell that they do not pay."""
        accuracy, is_known = self.accuracy(), any(trials for _, trials in self.right)
        if is_known and accuracy >= MOSTLY_WRONG:
            return PATIENCE
        return 1 if self.losses and accuracy < WRONG_AGAIN else TRIAL

    def passed_without(self, seconds: float) -> None:
        """Take down one pass without drafts; after some of them it is judged again whether the last drafts did not pay."""
        self.plain.append(seconds)
        self.rested += 1
        if self.given_up is not None and self.rested == PATIENCE:
            tokens, used = self.given_up
            if tokens * statistics.fmean(_bounded_times(self.plain)) >= used:
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
        if passes < self._needed():
            return
        plain = statistics.fmean(_bounded_times(self.plain))
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


def clock_on(device: torch.device) -> Callable[[], float]:
    """The clock of passes: on a CPU the thread's own time, which other programs do not disturb, if it is fine enough."""
    is_fine = device.type == "cpu" and time.get_clock_info("thread_time").resolution <= 1e-6
    return time.thread_time if is_fine else time.perf_counter


def _bounded_times(seconds: Iterable[float]) -> list[float]:
    """The times, none above twice their median: other programs interrupt some passes."""
    times = [*seconds]
    usual = 2 * statistics.median(times)
    return [min(one, usual) for one in times]


def _bounded(probability: float) -> float:
    return min(max(probability, LOWEST), HIGHEST)


_last_paces: WeakKeyDictionary[Any, Pace] = WeakKeyDictionary()


def pace_of(model: Any, call: Hashable, samples: bool) -> Pace:
    """The pace of a call of `generate`: that of the model's last call, if `call` is equal for both, or a new one.

    What was measured says little of a model that was trained since. The version of a parameter rises with each change.
    """
    call = (call, sum(one._version for one in model.parameters() if not one.is_inference()))
    last = _last_paces.get(model)
    if last is None or last.call != call:
        return Pace(samples, call)
    pace = copy.deepcopy(last)  # another thread may generate with the model
    pace.begin_text()
    return pace


def keep_pace(model: Any, pace: Pace) -> None:
    """Remember the pace of a call of `generate` for the next one."""
    _last_paces[model] = pace
