"""Terms whose gradients on the body oppose each other, combined by the library TorchJD rather than added up."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .term_gradients import body_parameters


AGGREGATORS = ("upgrad",)


class ConflictFreeGradients:
    """The gradient of each weighted term on the body over one optimizer step, and their combination by UPGrad.

    UPGrad projects the gradient of each term onto the directions that oppose no term's, and adds up the results (Quinton and
    Rey 2024, arXiv 2406.16232). Where no two terms oppose each other, this is the gradient of the weighted sum.

    Args:
        model: The model without wrappers.

    Raises:
        ValueError: If TorchJD is not installed.
    """

    def __init__(self, model: nn.Module):
        missing = [name for name in ("torchjd", "qpsolvers", "quadprog") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"gradient_aggregator is 'upgrad', which needs the package {missing[0]}; install it with"
                ' pip install "torchjd[quadprog-projector]", or leave gradient_aggregator out'
            )
        self._body: list[Any] = body_parameters(model)

    def begin_step(self) -> None:
        """Forget what an optimizer step that did not end has left."""
        for parameter in self._body:
            if hasattr(parameter, "jac"):
                del parameter.jac

    def add(self, loss: Tensor, terms: Sequence[Tensor]) -> None:
        """Add a micro-batch's gradients: of each of `terms`, weighted, and of the rest of `loss`, their sum and more."""
        from torchjd.autojac import backward

        rest = loss - torch.stack([*terms]).sum() if terms else loss
        # One at a time: many operations, like efficient attention, cannot be differentiated for several at once.
        backward([rest, *terms], inputs=self._body, retain_graph=True, parallel_chunk_size=1)

    def end_step(self) -> None:
        """Put the combined gradients in the place of those that `loss.backward()` has left on the body."""
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import jac_to_grad

        for parameter in self._body:
            parameter.grad = None
        number = len(self._body[0].jac)
        weights = torch.ones(number, dtype=self._body[0].dtype, device=self._body[0].device)
        jac_to_grad(self._body, UPGrad(weights), optimize_gramian_computation=True)
