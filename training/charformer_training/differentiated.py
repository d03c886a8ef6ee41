"""Whether a loss depends on given tensors, found in autograd's graph."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def depends_on(loss: Tensor, tensors: Iterable[Tensor]) -> bool:
    """Whether `loss` is computed from one of `tensors` such that gradients flow between them.

    Outputs of one operation are told apart, so this also holds for those of a compiled or a wrapped model. Nothing is
    computed, and nothing waits for the device.
    """
    wanted = {_place(tensor) for tensor in tensors if tensor.requires_grad}
    if any(tensor is loss for tensor in tensors):
        return True
    seen: set[Any] = set()
    waiting = [_place(loss)]
    while waiting:
        place = waiting.pop()
        if place in wanted:
            return True
        node = place[0]
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(node.next_functions)
    return False


def _place(tensor: Tensor) -> tuple[Any, int]:
    """The operation that made the tensor, and which of its outputs the tensor is."""
    return (tensor.grad_fn, tensor.output_nr)
