"""Cross-entropy over a large vocabulary, piece by piece.

Shapes: B batch, S sequence, V vocabulary, T number of heads.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


IGNORE_INDEX = -100


def cross_entropy_sum(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum in nats, a float32 scalar, over the targets `(...)` that are not -100, of logits `(..., V)`.

    `weights` `(...)` say how often each target counts; by default once.
    """
    logits, targets = logits.float().flatten(0, -2), targets.flatten()
    if weights is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    values = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    return (values * weights.flatten()).sum()  # no dot product, which autocast would run in half precision


# The most logits computed at once: 64 MB in float32. Smaller pieces would save little; larger ones would raise the peak memory
# of a model with a large vocabulary.
MAX_LOGITS = 2**24


def _cross_entropy_sums(
    hidden: Tensor, targets: Tensor, weights: Tensor | None, classify: Callable[[Tensor], Sequence[Tensor]]
) -> Tensor:
    of_heads = [None] * len(targets) if weights is None else weights
    return torch.stack([cross_entropy_sum(*one) for one in zip(classify(hidden), targets, of_heads, strict=True)])


def chunked_cross_entropy_sums(
    hidden: Tensor,
    targets: Tensor,
    classify: Callable[[Tensor], Sequence[Tensor]],
    vocab_size: int,
    weights: Tensor | None = None,
) -> Tensor:
    """`cross_entropy_sum` of each of `classify(hidden)`, `(T,)`, without ever holding all logits in memory.

    The heads run piece by piece. The backward pass runs them again, so that no logits are kept until then.

    Args:
        hidden: `(B, S, hidden_size)`.
        targets: `(T, B, S)`, those of each head.
        classify: Maps `(..., hidden_size)` to the logits `(..., V)` of T heads; deterministic.
        vocab_size: `V`.
        weights: `(T, B, S)`, how often each target counts; by default once.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten(1)
    rows = max(1, MAX_LOGITS // (vocab_size * len(targets)))
    pieces = zip(hidden.split(rows), targets.split(rows, dim=1), strict=True)
    of_pieces = None if weights is None else weights.flatten(1).split(rows, dim=1)
    sums = [
        checkpoint(
            _cross_entropy_sums,
            piece,
            piece_targets,
            None if of_pieces is None else of_pieces[number],
            classify,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for number, (piece, piece_targets) in enumerate(pieces)
    ]
    return torch.stack(sums).sum(0)
