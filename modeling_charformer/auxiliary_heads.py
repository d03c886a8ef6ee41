"""The modules that exist for the auxiliary losses alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init


# Prefixes of the names of weights that exist for training only.
TRAINING_ONLY = ("auxiliary_heads.", "target_blocks.", "auxiliary_classifiers.", "loss_uncertainty.")


class AuxiliaryHead(nn.Linear):
    """A linear head that exists for training only; `index` is its number among the auxiliary heads."""

    def __init__(self, in_features: int, out_features: int, index: int):
        self.index = index
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Do nothing: `draw` initialises the weights once the standard deviation is known."""

    def draw(self, standard_deviation: float) -> None:
        """Draw the weights from a separate generator.

        At the same seed, auxiliary heads then change neither the rest of the model nor any later random number.
        """
        generator = torch.Generator().manual_seed(torch.initial_seed() + self.index)
        # On the CPU like the generator, also where a model is built on another device (`with torch.device("cuda")`).
        drawn = torch.empty(self.weight.shape, device="cpu").normal_(0.0, standard_deviation, generator=generator)
        init.copy_(self.weight, drawn)
        init.zeros_(self.bias)

    def resized(self, num_outputs: int, standard_deviation: float) -> "AuxiliaryHead":
        """A head with another number of outputs and the weights of this one; weights of new outputs are random."""
        other = AuxiliaryHead(self.in_features, num_outputs, self.index)
        other.draw(standard_deviation)
        other = other.to(self.weight.device, self.weight.dtype).requires_grad_(self.weight.requires_grad)
        rows = min(self.out_features, num_outputs)
        with torch.no_grad():
            other.weight[:rows], other.bias[:rows] = self.weight[:rows], self.bias[:rows]
        return other.train(self.training)


class ZeroLinear(nn.Linear):
    """A linear layer that begins with zeros."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ResidualBlock(nn.Module):
    """`h + SiLU(W h)` on hidden states `(..., hidden_size)`; the identity at first (Medusa, section 2.1.1).

    With `embedding_size` it is `h + SiLU(W [h; e])`. There `e`, of that size, is the embedding of the token before the
    one to predict (like Hydra, Ankner et al. 2024, arXiv 2402.05109, section 3).
    """

    def __init__(self, hidden_size: int, embedding_size: int = 0):
        super().__init__()
        self.linear = ZeroLinear(hidden_size + embedding_size, hidden_size)

    def forward(self, hidden_states: Tensor, previous: Tensor | None = None) -> Tensor:
        inputs = hidden_states if previous is None else torch.cat([hidden_states, previous], dim=-1)
        return hidden_states + nn.functional.silu(self.linear(inputs))


class UncertaintyWeighting(nn.Module):
    """A learned weight for each term of a loss: `exp(-s) * loss + s / 2` with `s` the logarithm of its variance.

    Kendall, Gal and Cipolla (2018, arXiv 1705.07115), section 3.2. At first every weight is the given one.
    """

    def __init__(self, names: Sequence[str]):
        super().__init__()
        # Vectors of one: FSDP cannot split scalars.
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in names})

    def forward(self, weights: Mapping[str, float], present: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
        """The learned weights, and the sum of `weight * s / 2` over the present terms whose weight is not 0."""
        learned: dict[str, Any] = {name: weights[name] for name in present}
        regularizer = []
        for name in present:
            if weights[name]:
                log_variance = self.log_variances[name].squeeze()
                learned[name] = weights[name] * torch.exp(-log_variance)
                regularizer.append(weights[name] * log_variance / 2)
        return learned, torch.stack(regularizer).sum()
