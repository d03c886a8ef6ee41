"""What a model does after its last layer where that is more than calls of modules: the model's own code is run for it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .probe import Trace, close, looking_at


@dataclass(frozen=True)
class Readout:
    """Runs the `forward` of the module that holds the layers, in which each layer returns one given output.

    Gemma 3n's layers, for example, have four streams. After the last one the model projects the streams, scales them and
    takes their mean before its final norm.
    """

    stack: str
    """Name of the module that holds the layers."""
    layers: str
    """Its attribute for them."""
    rows: int
    """The dimension of a layer's output that counts the rows; the next one counts the positions."""
    features: tuple[int, ...]
    """The other dimensions of a layer's output."""
    returned: int
    """The length of the tuple whose first element is a layer's output; 0 if a layer returns the output itself."""

    def flat(self, output: Tensor) -> Tensor:
        """A layer's output as `(B, S, n)`."""
        return output.movedim((self.rows, self.rows + 1), (0, 1)).flatten(2)

    def __call__(self, model: nn.Module, states: Tensor) -> Tensor:
        """What the model makes of a layer's output `(..., n)` at any positions, `(..., width)`."""
        positions = states.reshape(1, -1, *self.features)
        output = positions.movedim((0, 1), (self.rows, self.rows + 1))
        stack = model.get_submodule(self.stack)
        layers = getattr(stack, self.layers)
        given = _Stack(stack, self.layers, [_Layer(layer, output, self.returned) for layer in layers])
        # What the forward does with this one token before the layers is not used.
        ids = torch.zeros((1, 1), dtype=torch.long, device=states.device)
        outputs: Any = cast(Any, type(stack)).forward(given, input_ids=ids, use_cache=False)
        return cast(Tensor, outputs[0]).view(*states.shape[:-1], -1)


class _Stack:
    """Stands for a module in its own `forward`, with other layers."""

    def __init__(self, module: nn.Module, name: str, layers: list["_Layer"]) -> None:
        self.module = module
        setattr(self, name, layers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Layer:
    """Stands for a layer that returns a given output."""

    def __init__(self, module: nn.Module, output: Tensor, returned: int) -> None:
        self.module = module
        self.output = (output, *[None] * (returned - 1)) if returned else output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def readout_of(model: PreTrainedModel, trace: Trace, layer_list: str) -> Readout | None:
    """The readout of a model whose layers are in the list of that name; `None` if it gives other states than the model."""
    stack, _, layers = layer_list.rpartition(".")
    if trace.ids_name is None or "input_ids" not in inspect.signature(model.get_submodule(stack).forward).parameters:
        return None
    layer = cast(nn.ModuleList, model.get_submodule(layer_list))[-1]
    with looking_at(model), _returned(layer) as found:
        model(**trace.inputs)
    output = found[-1][0] if isinstance(found[-1], tuple) else found[-1]
    positions = (*trace.inputs[trace.ids_name].shape,)
    rows = next((i for i in range(output.dim() - 1) if (*output.shape[i : i + 2],) == positions), None)
    if rows is None:
        return None
    features = (*output.shape[:rows], *output.shape[rows + 2 :])
    readout = Readout(stack, layers, rows, features, len(found[-1]) if isinstance(found[-1], tuple) else 0)
    states = readout.flat(output)
    with looking_at(model):
        try:
            made = readout(model, states)
            # The losses of language models run on some of the positions, as rows.
            part = readout(model, states.flatten(0, 1)[::2])
        except Exception:  # the forward needs more than ids, or uses what the layers before made
            return None
    is_same = close(made, trace.last) and close(part, trace.last.flatten(0, 1)[::2])
    return readout if is_same else None


@contextmanager
def _returned(module: nn.Module) -> Iterator[list[Any]]:
    """What a module returns, at each call."""
    found: list[Any] = []
    hook = module.register_forward_hook(lambda _, args, output: found.append(output))
    try:
        yield found
    finally:
        hook.remove()
