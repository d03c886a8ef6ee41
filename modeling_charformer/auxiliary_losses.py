"""The auxiliary losses of Al-Rfou et al. (2018, arXiv 1808.04444): which terms there are, what each weighs when, its value.

With `n` layers, `h_l` the output of layer `l` and a linear classifier `W_{l,k}` for each layer and target offset `k`:

    CE_{l,k} = mean over positions t of  -log softmax(W_{l,k} h_l[t])[ x_{t+k} ]                (nats)
    loss     = sum over l, k of  weight_{l,k}(p) * CE_{l,k}            p = share of training done, in [0, 1]

Everything here is a pure function of its arguments: the weights of Python numbers, so that they need no device
synchronisation and are known before the forward pass runs (a head whose weight is 0 is not run), the values of tensors.
Shapes: B batch, S sequence, V vocabulary, K number of targets.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .auxiliary_heads import UncertaintyWeighting
from .loss_settings import LossTerm


IGNORE_INDEX = -100


def shifted_targets(labels: Tensor, offset: int) -> Tensor:
    """`labels` `(B, S)` moved so that position `t` holds the symbol `offset` steps ahead; -100 where there is none."""
    return F.pad(labels, (0, offset), value=IGNORE_INDEX)[..., offset:]


def last_target_positions(targets: Tensor) -> Tensor:
    """Index `(B, 1)` of the last position of each row of `targets` `(B, S)` that is not -100 (0 in a row of only -100)."""
    positions = torch.arange(targets.shape[-1], device=targets.device)
    return torch.where(targets != IGNORE_INDEX, positions, 0).amax(dim=-1, keepdim=True)


def count_targets(labels: Tensor, num_targets: int) -> Tensor:
    """Numbers `(2, K)` of positions, and of rows with one or more, that have a target 1..K steps ahead in `labels` `(B, S)`."""
    present = torch.stack([shifted_targets(labels, offset) != IGNORE_INDEX for offset in range(1, num_targets + 1)])
    return torch.stack([present.sum(dim=(1, 2)), present.any(dim=2).sum(dim=1)])


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum in nats, a float32 scalar, over the targets `(...)` that are not -100, of logits `(..., V)`."""
    return F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def mean_denominators(
    labels: Tensor, num_targets: int, num_items_in_batch: Tensor | int | None, target_counts: Tensor | None
) -> Tensor:
    """What each sum of a term is divided by to be a mean: `(2, K)` as in `count_targets`, at least 1.

    - Alone, a batch is divided by its own counts.
    - As part of an optimizer step over several batches and processes (`target_counts`: `count_targets` added up over
      all of them), by the counts of the whole step: the parts add up to the mean over the one big batch.
    - With `num_items_in_batch` alone, all that `transformers.Trainer` counts (next characters of the whole step), the
      other counts are this batch's, scaled up by its share of the next characters: exact where all rows are alike.
    """
    if target_counts is not None:
        counts = target_counts.to(labels.device)
    else:
        counts = count_targets(labels, num_targets)
        if num_items_in_batch is not None:
            return counts.clamp(min=1) * (num_items_in_batch / counts[0, 0].clamp(min=1))
    return counts.clamp(min=1)


def share_of_step(labels: Tensor, denominators: Tensor) -> Tensor:
    """How much of the optimizer step that `denominators` count is in this batch, `labels` `(B, S)`; 1 if it is all."""
    return count_targets(labels, 1)[0, 0] / denominators[0, 0]


# Logits of one piece of the classifiers' work: 64 MB in float32. Smaller pieces would not save anything that matters,
# larger ones would show in the peak of a model with a large vocabulary.
MAX_LOGITS = 2**24


def _cross_entropy_sums(hidden: Tensor, targets: Tensor, classify: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
    return torch.stack([cross_entropy_sum(*pair) for pair in zip(classify(hidden), targets, strict=True)])


def chunked_cross_entropy_sums(
    hidden: Tensor, targets: Tensor, classify: Callable[[Tensor], Sequence[Tensor]], vocab_size: int
) -> Tensor:
    """`cross_entropy_sum` of each of `classify(hidden)`, `(T,)`, without all logits in memory at once, in either pass.

    The classifiers run piece by piece, and once more in the backward pass instead of keeping their logits until then.

    Args:
        hidden: `(B, S, hidden_size)`.
        targets: `(T, B, S)`, those of each classifier.
        classify: `(..., hidden_size)` to the logits `(..., V)` of T classifiers; deterministic.
        vocab_size: `V`.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten(1)
    rows = max(1, MAX_LOGITS // (vocab_size * len(targets)))
    sums = [
        checkpoint(_cross_entropy_sums, piece, piece_targets, classify, use_reentrant=False, preserve_rng_state=False)
        for piece, piece_targets in zip(hidden.split(rows), targets.split(rows, dim=1), strict=True)
    ]
    return torch.stack(sums).sum(0)


def causal_lm_losses(
    hidden: Tensor,
    classify: Callable[[Tensor], Sequence[Tensor]],
    terms: Sequence[LossTerm],
    labels: Tensor,
    denominators: Tensor,
    vocab_size: int,
    last_position_only: bool = False,
) -> dict[str, Tensor]:
    """The raw, unweighted value in nats of each of `terms`, whose classifiers read the same, as float32 scalars by name.

    Args:
        hidden: What the classifiers read, `(B, S, hidden_size)`.
        classify: `(..., hidden_size)` to the logits `(..., V)` of the classifier of each of `terms`; deterministic.
        terms: The terms to compute, at least one, each with another offset.
        labels: `(B, S)`; the symbol at position `t` is the target of position `t - offset`.
        denominators: `(2, K)`, see `mean_denominators`.
        vocab_size: `V`.
        last_position_only: Count only the last position of each row that has a target, and run the classifiers on the
            few positions that are such for one of them.
    """
    targets = torch.stack([shifted_targets(labels, term.offset) for term in terms])
    if last_position_only:
        last = last_target_positions(targets)  # (T, B, 1)
        hidden = hidden.take_along_dim(last.permute(1, 0, 2), dim=1)
        # Each classifier's own of the T positions; the others' are not counted.
        others = ~torch.eye(len(terms), dtype=torch.bool, device=labels.device)[:, None]
        targets = targets.take_along_dim(last, dim=2).masked_fill(others, IGNORE_INDEX)
    sums = chunked_cross_entropy_sums(hidden, targets, classify, vocab_size)
    row = int(last_position_only)
    return {term.name: total / denominators[row, term.offset - 1] for term, total in zip(terms, sums, strict=True)}


def last_position_loss(logits: Tensor, labels: Tensor, denominators: Tensor) -> Tensor:
    """Mean cross-entropy of the last position of each row that has a next symbol, of logits `(B, S, V)`."""
    targets = shifted_targets(labels, 1)
    last = last_target_positions(targets)
    total = cross_entropy_sum(logits.take_along_dim(last[..., None], dim=1), targets.take_along_dim(last, dim=1))
    return total / denominators[1, 0]


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """The loss of a classifier of sequences or of tokens, as Transformers defines it, a float32 scalar.

    The sum over the labels is divided by `num_items_in_batch`, those of the whole optimizer step, or by their number
    here.

    Args:
        logits: `(..., num_labels)`.
        labels: `(...)` class numbers, -100 for none; or `(..., num_labels)` numbers.
        problem_type: `"single_label_classification"` (cross-entropy), `"multi_label_classification"` (binary
            cross-entropy of each label) or `"regression"` (squared error).
    """
    logits = logits.float()
    count = labels.ne(IGNORE_INDEX).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if problem_type == "regression":
        return F.mse_loss(logits.reshape(labels.shape), labels.float(), reduction="sum") / count
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum") / count
    return cross_entropy_sum(logits, labels) / count


def sequence_problem_type(given: str | None, num_labels: int, labels: Tensor) -> str:
    """What kind of labels those of whole sequences are, by Transformers' rules, where the configuration does not say."""
    if given is not None:
        return given
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def weighted_loss(
    loss_dict: dict[str, Tensor],
    weights: Mapping[str, float],
    weighting: UncertaintyWeighting | None,
    share: Tensor | float = 1.0,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """The sum of the terms by their weights; with it the terms and the weights that it is the sum of.

    Learned weighting adds the term `uncertainty`, without which all weights would go to 0. Where the terms are a part of
    those of an optimizer step, `share` is how much of it: the parts of `uncertainty` add up too.
    """
    present: dict[str, Any] = {name: weights[name] for name in loss_dict}
    if weighting is not None:
        present, loss_dict = dict(present), dict(loss_dict)
        present, uncertainty = weighting(present, list(loss_dict))
        loss_dict["uncertainty"] = uncertainty * share
        present["uncertainty"] = 1.0
    loss = torch.stack(
        [weight * loss_dict[name] for name, weight in present.items() if isinstance(weight, Tensor) or weight]
    ).sum()
    detached = {name: weight.detach() if isinstance(weight, Tensor) else weight for name, weight in present.items()}
    return loss, loss_dict, detached
