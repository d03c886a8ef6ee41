"""The layers of a model of Transformers, found among the hidden states that it returns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .probe import Trace, chain, looking_at, no_cache, same
from .probe_readout import Readout, readout_of


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that heads on its layers need."""

    output_kind: type[ModelOutput]
    states_name: str
    """The field of the output that holds the hidden states."""
    ends_with_layer: bool
    """Whether the last of the hidden states is the last layer's output, from which only `readout` makes what the head reads."""
    num_layers: int
    width: int
    """Width of the last hidden state."""
    layers: Mapping[int, int]
    """Layer number (1..n) to the index of its output in the hidden states; holds only the layers that were found."""
    widths: Mapping[int, int]
    """Layer number to the width of its output."""
    tail: tuple[str, ...] | None
    """Names of the modules that turn the last layer's output into the last hidden state; `None` if not only modules do."""
    readout: Readout | None
    """What turns a layer's output into the last hidden state where not only modules do; `None` if nothing does."""
    reads_forward: bool
    """Whether no position sees later positions."""


def anatomy_of(model: PreTrainedModel, trace: Trace) -> Anatomy:
    """Compare the outputs of the model's layers with the hidden states that it returns."""
    states, is_image = trace.states, trace.ids_name is None
    if is_image:
        numbers = {len(states), len(states) - 1}
    elif trace.ids_name == "decoder_input_ids":
        numbers = {len(states) - 1}
    else:
        numbers = {int(getattr(model.config.get_text_config(), "num_hidden_layers", None) or len(states) - 1)}
    found = _layers_of(model, trace, numbers)
    return Anatomy(
        output_kind=type(trace.outputs),
        states_name=trace.states_name,
        ends_with_layer=trace.embeddings_input is not None,
        num_layers=found.num_layers,
        width=width_of(trace.last),
        layers=found.indices,
        widths={layer: width_of(states[index]) for layer, index in found.indices.items()},
        tail=found.tail,
        readout=readout_of(model, trace, found.name) if found.indices and found.tail is None else None,
        reads_forward=not is_image and _reads_forward(model, trace),
    )


def width_of(state: Tensor) -> int:
    """The number of features of a hidden state: `(B, S, width)`, or a feature map `(B, width, height, width of the map)`."""
    return state.shape[1 if state.dim() == 4 else -1]


def _reads_forward(model: PreTrainedModel, trace: Trace) -> bool:
    name = trace.ids_name or ""
    other = trace.inputs[name].clone()
    other[0, -1] = other[0, 0]
    with looking_at(model):
        outputs: Any = model(
            **{**trace.inputs, name: other}, **no_cache(model), output_hidden_states=True, return_dict=True
        )
    if trace.logits.shape[:2] == other.shape:
        both = (trace.logits, outputs.logits)
    else:
        both = (trace.states[-1], outputs[trace.states_name][-1])
    before, after = (of_positions[:, :-1].float() for of_positions in both)
    if before.shape != after.shape or not before.numel():
        return False
    # Both runs do the same operations; a difference beyond rounding means that a position saw the last token.
    return bool((before - after).abs().max() <= 1e-5 * before.abs().max())


def _holds(output: Tensor, state: Tensor) -> bool:
    """Whether a layer's output is a hidden state, also with other dimensions first or padding at the end."""
    if output.dim() != 3 or state.dim() != 3 or output.shape == state.shape:
        return same(output, state)
    views = (output[:, : state.shape[1]], output.transpose(0, 1), output.transpose(1, 2))
    return any(same(view, state) for view in views)


class _Layers(NamedTuple):
    """The layers in a module list: its name, their number, the indices of their outputs, and `Anatomy.tail`."""

    name: str
    num_layers: int
    indices: dict[int, int]
    tail: tuple[str, ...] | None


def _layers_of(model: PreTrainedModel, trace: Trace, numbers: Iterable[int]) -> _Layers:
    states = trace.states
    best = _Layers("", max(numbers), {}, None)
    for name, returned in trace.layer_lists.items():
        size = len(cast(nn.ModuleList, model.get_submodule(name)))
        # LongcatFlash's num_hidden_layers counts its attentions, two a layer.
        if len(returned) not in numbers and not len(returned) == size == len(states) - 1:
            continue
        found: dict[int, int] = {}
        for number, output in enumerate(returned, start=1):
            after = max(found.values(), default=-1) + 1
            index = next((i for i in range(after, len(states)) if _holds(output, states[i])), None)
            if index is not None:
                found[number] = index
        is_last = found.get(len(returned)) == len(states) - 1
        is_last = is_last and trace.embeddings_input is None
        tail = () if is_last else chain(model, trace.calls, returned[-1], trace.last)
        if (len(found), tail is not None) > (len(best.indices), best.tail is not None):
            best = _Layers(name, len(returned), found, tail)
    return best
