"""The positions on which an auxiliary term is computed if `position_share` is below 1.

A row with `n` targets is cut into `m = ceil(share * n)` strata of equal length, up to one position. One position of each is
drawn evenly at random, and its cross-entropy counts as often as its stratum has positions:

    estimate = sum over strata j of  size_j * CE(position drawn from j)

Each position is drawn with the probability `1 / size_j`. So the expected value of the estimate, and that of its gradient, are
those of the sum over all `n` positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .cross_entropy import IGNORE_INDEX
from .loss_settings import AuxiliaryLossSettings, LossTerm


# A share is a whole number of these parts, so that all devices compute the same number of strata.
_PARTS = 2**20
_32_BITS = 2**32 - 1


class SampledPositions(NamedTuple):
    """Positions `(B, P)` of a batch, on which a term is computed. Where a row has fewer than `P`, the rest have no target."""

    positions: Tensor
    targets: Tensor
    weights: Tensor
    """How often each target counts, float32."""

    def of(self, states: Tensor, ahead: int = 0) -> Tensor:
        """`states` `(B, S, hidden_size)` at the positions, or that many positions after them, `(B, P, hidden_size)`."""
        # No target is as far ahead as the end of the row; beyond it any state will do.
        positions = (self.positions + ahead).clamp(max=states.shape[1] - 1) if ahead else self.positions
        return states.take_along_dim(positions[..., None], dim=1)


class PositionSampler:
    """Draws positions for the terms of one forward pass.

    The draw of a term depends on `seed`, `step` and the term alone. It is therefore the same in each micro-batch of an optimizer
    step, on each process, and in a run that was resumed. All rows of a batch share their random numbers. Without a step,
    a number drawn from torch's default generator takes its place: another for each forward pass.

    Args:
        settings: The losses of the model; `position_share` is the share.
        seed: Any whole number; `None` means 0.
        step: Number of optimizer steps done.
    """

    def __init__(self, settings: AuxiliaryLossSettings, seed: int | None, step: int | None):
        self._parts = max(1, int(float(settings.position_share_text) * _PARTS))
        self._seed, self._step = (seed or 0) % (_32_BITS + 1), step
        self._key: Tensor | None = None

    def sample(self, term: LossTerm, targets: Tensor) -> SampledPositions:
        """Draw positions of each row for `term`.

        Args:
            targets: `(B, S)`, the term's targets; -100 where there is none.
        """
        length, device = targets.shape[1], targets.device
        if self._key is None:
            self._key = self._key_of_step(device)
        counted = (targets != IGNORE_INDEX).cumsum(1)
        total = counted[:, -1:]
        strata = (total * self._parts + _PARTS - 1) // _PARTS  # (B, 1); 0 in a row without targets
        # The number of strata of a full row: shapes depend on no value, so that torch.compile has one graph.
        number = torch.arange((length * self._parts + _PARTS - 1) // _PARTS, device=device)
        present = number < strata
        begin = number * total // strata.clamp(min=1)
        size = (number + 1) * total // strata.clamp(min=1) - begin
        key = _mixed(_mixed(self._key + term.layer) + term.offset)
        rank = begin + ((_mixed(key + number) * size) >> 32)
        # The first position up to which `rank + 1` targets were counted. Where there is no stratum, any position will do.
        positions = torch.searchsorted(counted, torch.where(present, rank + 1, 1)).clamp(max=length - 1)
        return SampledPositions(
            positions,
            targets.gather(1, positions).masked_fill(~present, IGNORE_INDEX),
            size.masked_fill(~present, 0).float(),
        )

    def _key_of_step(self, device: torch.device) -> Tensor:
        if self._step is None:
            return torch.randint(_32_BITS + 1, (), device=device)
        seed = torch.full((), self._seed, device=device)
        return _mixed(_mixed(seed) + self._step % (_32_BITS + 1))


def _mixed(numbers: Tensor) -> Tensor:
    """A pseudorandom number of 32 bits for each whole number: the same on all devices, and traceable by torch.compile."""
    numbers = (numbers + 0x9E3779B9) & _32_BITS  # otherwise 0 would stay 0
    for _ in range(2):
        numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & _32_BITS  # below 2**59, so nothing overflows
    return numbers ^ (numbers >> 16)
