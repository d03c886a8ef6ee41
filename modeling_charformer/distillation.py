"""Auxiliary heads that learn from the model's own final distribution, in addition to the text.

A head on layer `l` predicts `k` steps ahead at position `t`. The model's own head predicts the same symbol at position
`t + k - 1`, where it has read the text up to there. With `p` its distribution, without gradient, and `q` the head's:

    KL_{l,k} = mean over positions t of  sum over symbols v of  p_{t+k-1}(v) * log(p_{t+k-1}(v) / q_t(v))          (nats)

The positions and the divisor are those of the term's cross-entropy. For `k = 1` this is self-distillation (Zhang et al.
2019, arXiv 1905.08094). For `k > 1` the heads learn from the model's own predictions like those of Hydra++ (Ankner et
al. 2024, arXiv 2402.05109, teacher loss).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .auxiliary_losses import HeadInput, LossStep, Targets, last_targets
from .cross_entropy import IGNORE_INDEX, MAX_LOGITS
from .loss_settings import LossTerm


def add_distillation(
    step: LossStep, targets: Targets, logits: Tensor, classify: Callable[[LossTerm, Tensor], Sequence[Tensor]]
) -> None:
    """Add to `step` the term `<name>_distillation` of each head that it has recorded.

    Args:
        logits: `(B, S, V)`, those of the model's own head at all positions. Heads of further targets that have a
            smaller vocabulary learn from the distribution over its symbols.
        classify: Maps a term and the input of its head, `(..., hidden_size)`, to a list of its logits `(..., V)`. It
            must be deterministic.
    """
    for read in step.reads:
        step.add_distilled(read.term, divergence(read, targets, logits.detach(), partial(classify, read.term)))


def divergence(
    read: HeadInput, targets: Targets, logits: Tensor, classify: Callable[[Tensor], Sequence[Tensor]]
) -> Tensor:
    """The Kullback-Leibler divergence of a term, a float32 scalar in nats.

    The head runs piece by piece, and once more in the backward pass.
    """
    term, states, sample = read
    wanted = targets.ahead(term.offset)
    batch, length = wanted.shape
    positions = torch.arange(length, device=wanted.device).expand(batch, length)
    if sample is not None:
        positions, counts = sample.positions, sample.weights
    else:
        if term.positions == "last":
            documents = targets.documents if targets.documents is not None else torch.zeros_like(wanted)
            wanted = last_targets(wanted, documents.expand_as(wanted))
        counts = (wanted != IGNORE_INDEX).float()
    rows = torch.arange(batch, device=wanted.device)[:, None] * length
    # Where a position has no target, any teacher will do.
    teachers = (rows + (positions + term.offset - 1).clamp(max=length - 1)).flatten()
    vocabulary = targets.draft_vocabulary if term.offset > 1 else None
    size = max(1, MAX_LOGITS // (2 * (logits.shape[-1] if vocabulary is None else len(vocabulary))))
    pieces = (one.split(size) for one in (states.flatten(0, 1), teachers, counts.flatten()))
    of_piece = partial(_divergence_of_piece, logits.flatten(0, 1), vocabulary, classify)
    sums = [
        checkpoint(of_piece, *piece, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(*pieces, strict=True)
    ]
    return torch.stack(sums).sum() / targets.denominator(term)


def _divergence_of_piece(
    logits: Tensor,
    vocabulary: Tensor | None,
    classify: Callable[[Tensor], Sequence[Tensor]],
    states: Tensor,
    teachers: Tensor,
    counts: Tensor,
) -> Tensor:
    """The sum over the positions of a piece, each as often as it counts; `teachers` are rows of `logits`."""
    found = classify(states)[0].float().log_softmax(-1)
    taught = logits[teachers] if vocabulary is None else logits[teachers[:, None], vocabulary]
    wanted = taught.float().log_softmax(-1)
    values = torch.nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    return (values * counts).sum()
