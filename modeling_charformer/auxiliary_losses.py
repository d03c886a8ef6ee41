"""The auxiliary losses of Al-Rfou et al. (2018, arXiv 1808.04444): which terms there are, what each weighs when, its value.

With `n` layers, `h_l` the output of layer `l` and a linear classifier `W_{l,k}` for each layer and target offset `k`:

    CE_{l,k} = mean over positions t of  -log softmax(W_{l,k} h_l[t])[ x_{t+k} ]                (nats)
    loss     = sum over l, k of  weight_{l,k}(p) * CE_{l,k}            p = share of training done, in [0, 1]

Everything here is a pure function of its arguments: the weights of Python numbers, so that they need no device
synchronisation and are known before the forward pass runs (a head whose weight is 0 is not run), the values of tensors.
Shapes: B batch, S sequence, V vocabulary, K number of targets.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


IGNORE_INDEX = -100

Schedule = Callable[[int, int, float], float]
"""`(layer, num_layers, progress)` to the factor, 0 or more, on the weight of that intermediate layer's losses."""


def paper_schedule(layer: int, num_layers: int, progress: float) -> float:
    """1 until `layer / (2 * num_layers)` of training is done, then 0: the first layer drops out first (paper, section 3)."""
    return 1.0 if progress * 2 * num_layers < layer else 0.0


def constant_schedule(layer: int, num_layers: int, progress: float) -> float:
    """1 throughout."""
    return 1.0


def linear_schedule(layer: int, num_layers: int, progress: float) -> float:
    """From 1 down a straight line to 0 at the point where the paper's schedule drops the layer."""
    return max(0.0, 1.0 - progress * 2 * num_layers / layer)


def cosine_schedule(layer: int, num_layers: int, progress: float) -> float:
    """From 1 down half a cosine to 0 at the point where the paper's schedule drops the layer."""
    return (1.0 + math.cos(math.pi * min(1.0, progress * 2 * num_layers / layer))) / 2


_SCHEDULES: dict[str, Schedule] = {
    "paper": paper_schedule,
    "constant": constant_schedule,
    "linear": linear_schedule,
    "cosine": cosine_schedule,
}


def register_schedule(name: str, schedule: Schedule) -> None:
    """Make `schedule` available as `intermediate_schedule=name`.

    A process that loads a model saved with such a name registers it first.

    Raises:
        ValueError: If `name` is taken already by another function.
    """
    if _SCHEDULES.get(name, schedule) is not schedule:
        raise ValueError(
            f"a schedule named {name!r} is registered already; choose a name other than {schedule_names()}"
        )
    _SCHEDULES[name] = schedule


def schedule_names() -> list[str]:
    """The accepted values of `intermediate_schedule`."""
    return sorted(_SCHEDULES)


class LossTerm(NamedTuple):
    """One auxiliary or main loss: the classifier of `layer` (1..n) predicting `offset` (1..K) characters ahead."""

    name: str
    layer: int
    offset: int
    weight: float
    """At full strength, before the schedule."""


def term_name(layer: int, offset: int, num_layers: int) -> str:
    """`next_char`, `target_2`, ... for the final layer; `layer_3`, `layer_3_target_2`, ... for the others."""
    if layer == num_layers:
        return "next_char" if offset == 1 else f"target_{offset}"
    return f"layer_{layer}" if offset == 1 else f"layer_{layer}_target_{offset}"


def loss_terms(
    num_layers: int,
    num_targets: int,
    target_weights: Sequence[float] | None,
    intermediate_layers: Sequence[int] | str | None,
    intermediate_weight: float,
) -> tuple[LossTerm, ...]:
    """All terms of the loss, the main one first, then the further targets, then layer by layer.

    Args:
        num_layers: Number of layers `n`.
        num_targets: Number of characters predicted at each position, `K`.
        target_weights: Weights of targets 2..K; `None` is the paper's 0.5 each.
        intermediate_layers: `"all"`, the layers (of 1..n-1) that carry losses, or `None`.
        intermediate_weight: Factor on all losses of intermediate layers.
    """
    weights = [1.0, *(target_weights if target_weights is not None else [0.5] * (num_targets - 1))]
    if intermediate_layers == "all":
        layers: Sequence[int] = range(1, num_layers)
    else:
        layers = sorted(int(layer) for layer in intermediate_layers or ())
    return tuple(
        LossTerm(
            name=term_name(layer, offset, num_layers),
            layer=layer,
            offset=offset,
            weight=weights[offset - 1] * (1.0 if layer == num_layers else intermediate_weight),
        )
        for layer in (num_layers, *layers)
        for offset in range(1, num_targets + 1)
    )


def weights_in_force(
    terms: Sequence[LossTerm], num_layers: int, schedule: str, position_loss: str, progress: float
) -> dict[str, float]:
    """The weight of each term by name when the share `progress` of training is done, and that of `last_position`.

    With `position_loss="last"` the main loss is that of the last position alone, so `last_position` takes over the
    weight of `next_char`; otherwise it is a monitor with weight 0.

    Raises:
        ValueError: If `progress` is outside 0..1 or the schedule returns a value that is negative or not finite.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"training_progress is {progress}; it is the share of training done, from 0 to 1")
    weights = {}
    for term in terms:
        factor = 1.0 if term.layer == num_layers else _SCHEDULES[schedule](term.layer, num_layers, progress)
        if not (math.isfinite(factor) and factor >= 0.0):
            raise ValueError(
                f"intermediate_schedule {schedule!r} returned {factor} for layer {term.layer} of {num_layers} at"
                f" training_progress {progress}; a schedule returns a finite number that is 0 or more"
            )
        weights[term.name] = term.weight * factor
    weights["last_position"] = 0.0
    if position_loss == "last":
        weights["last_position"], weights["next_char"] = weights["next_char"], 0.0
    return weights


def shifted_targets(labels: Tensor, offset: int) -> Tensor:
    """`labels` `(B, S)` moved so that position `t` holds the character `offset` steps ahead; -100 where there is none."""
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


def _head_loss_sum(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return cross_entropy_sum(head(hidden), targets)


def causal_lm_losses(
    hidden_states: Mapping[int, Tensor],
    heads: Mapping[str, Callable[[Tensor], Tensor]],
    terms: Sequence[LossTerm],
    labels: Tensor,
    denominators: Tensor,
    last_position_only: bool = False,
) -> dict[str, Tensor]:
    """The raw, unweighted value in nats of each of `terms`, as float32 scalars by name.

    Each head runs once more in the backward pass instead of keeping its logits until then: two dozen of them would
    take more memory than the head's arithmetic, a few percent of a step, takes time.

    Args:
        hidden_states: Layer number to `h_l` `(B, S, hidden_size)`, for each layer that `terms` name.
        heads: Term name to the classifier of that term, `(..., hidden_size)` to `(..., V)`; deterministic.
        terms: The terms to compute.
        labels: `(B, S)`; the character at position `t` is the target of position `t - offset`.
        denominators: `(2, K)`, see `mean_denominators`.
        last_position_only: Count only the last position of each row that has a target, and run the heads on it alone.
    """
    losses = {}
    for term in terms:
        hidden, targets = hidden_states[term.layer], shifted_targets(labels, term.offset)
        if last_position_only:
            last = last_target_positions(targets)
            hidden, targets = hidden.take_along_dim(last[..., None], dim=1), targets.take_along_dim(last, dim=1)
        total = checkpoint(
            _head_loss_sum, hidden, targets, heads[term.name], use_reentrant=False, preserve_rng_state=False
        )
        losses[term.name] = total / denominators[int(last_position_only), term.offset - 1]
    return losses
