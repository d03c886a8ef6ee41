"""Drafts of the next tokens by parts of the model itself, for the model to verify."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compatibility import CACHE
from .pace_charformer import AGREEMENT, Pace


# If the end of a text occurs earlier among the last `LOOK_BACK` tokens, the text that followed it there is looked up.
LOOK_BACK = 4096
# The probability that a token is right that was looked up, if those before it were.
LOOK_UP_TRUST = 0.9
# The most drafts of an early exit. Each costs a pass through some layers.
MAX_EARLY_DRAFTS = 8

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
        self.layer = None

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
