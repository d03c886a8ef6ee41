"""The structure of a model of Transformers, found by running it on a few ids and not by its name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .models import evaluating


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that heads on its layers need."""

    output_kind: type[ModelOutput]
    width: int
    """Width of the last hidden state."""
    layers: Mapping[int, int]
    """Layer number (1..n) to the index of its output in `hidden_states`; holds only the layers that were found."""
    tail: tuple[str, ...] | None
    """Names of the modules that turn the last layer's output into the last hidden state; `None` if not only modules do."""
    reads_forward: bool
    """Whether no position sees later positions."""


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Run the model and compare the outputs of its layers with the hidden states that it returns.

    Raises:
        ValueError: If the model returns no hidden states.
    """
    ids = probe_ids(model)
    with _looking_at(model), _watched(model) as (layer_lists, between):
        outputs = model(input_ids=ids, output_hidden_states=True, return_dict=True)
    states = getattr(outputs, "hidden_states", None)
    if not states:
        raise ValueError(f"{type(model).__name__} returns no hidden states, so heads on its layers have no input")
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    with _looking_at(model):
        changed: Tensor = model(input_ids=other, output_hidden_states=True, return_dict=True).hidden_states[-1]
    before, after = states[-1][:, :-1].float(), changed[:, :-1].float()
    num_layers = model.config.get_text_config().num_hidden_layers
    layers, tail = _layers_and_tail(layer_lists, between, states, num_layers)
    return Anatomy(
        output_kind=type(outputs),
        width=states[-1].shape[-1],
        layers=layers,
        tail=tail,
        # Both runs do the same operations; a difference beyond rounding means that a position saw the last token.
        reads_forward=bool((before - after).abs().max() <= 1e-5 * before.abs().max()),
    )


def probe_ids(model: PreTrainedModel) -> Tensor:
    """Ids `(1, 6)`, without 0 if the vocabulary allows it: 0 may be padding, whose embedding is zero."""
    vocab_size: int = model.config.get_text_config().vocab_size
    return (torch.arange(1, 7, device=model.device) % vocab_size)[None]


@contextmanager
def _looking_at(model: nn.Module) -> Iterator[None]:
    # A model may draw random numbers; those of the rest of the program must not change.
    with evaluating(model), torch.random.fork_rng(devices=[]):
        yield


Call = tuple[str, Tensor, Tensor]


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[dict[str, list[Tensor]], list[Call]]]:
    """Record the outputs of the modules in each module list, and the name, input and output of modules in no list."""
    layer_lists: dict[str, list[Tensor]] = {
        name: [] for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    between: list[Call] = []

    def watch(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        returned = output if isinstance(output, Tensor) else next(iter(_tensors(output)), None)
        if returned is None:
            return
        if name.rpartition(".")[0] in layer_lists:
            layer_lists[name.rpartition(".")[0]].append(returned)
        elif inputs and isinstance(output, Tensor):
            between.append((name, inputs[0], output))

    hooks = []
    for name, module in model.named_modules():
        inside = [one for one in layer_lists if name.startswith(f"{one}.")]
        if not inside or name.rpartition(".")[0] in inside:
            hook = lambda module, args, kwargs, output, name=name: watch(name, module, args, kwargs, output)  # noqa: E731
            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield layer_lists, between
    finally:
        for handle in hooks:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return (value for value in values if isinstance(value, Tensor))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(one.equal(other))


def _layers_and_tail(
    layer_lists: Mapping[str, list[Tensor]], between: list[Call], states: tuple[Tensor, ...], num_layers: int
) -> tuple[dict[int, int], tuple[str, ...] | None]:
    best: dict[int, int] = {}
    tail: tuple[str, ...] | None = None
    for returned in layer_lists.values():
        if len(returned) != num_layers:
            continue
        found: dict[int, int] = {}
        for number, output in enumerate(returned, start=1):
            after = max(found.values(), default=-1) + 1
            index = next((i for i in range(after, len(states)) if _same(states[i], output)), None)
            if index is not None:
                found[number] = index
        own_tail = _path(between, returned[-1], states[-1])
        if (len(found), own_tail is not None) > (len(best), tail is not None):
            best, tail = found, own_tail
    return best, tail


def _path(between: list[Call], start: Tensor, end: Tensor) -> tuple[str, ...] | None:
    """Names of a chain of modules that turns `start` into `end`; `None` if there is none."""
    names: list[str] = []
    for name, given, returned in between:
        if _same(start, end):
            break
        if _same(given, start) and not _same(returned, start) and returned.shape[:-1] == start.shape[:-1]:
            names.append(name)
            start = returned
    return tuple(names) if _same(start, end) else None


@dataclass(frozen=True)
class OwnLoss:
    """How a causal language model computes its own loss."""

    is_shifted: bool
    """Whether the loss is the mean cross-entropy of each position's logits for the next token."""
    follows_shift_labels: bool
    """Whether the loss follows `shift_labels`, targets that are shifted already."""


def own_loss_of(model: PreTrainedModel) -> OwnLoss:
    """Compare the model's loss with the cross-entropy of its logits, on the label that these make least likely."""
    ids = probe_ids(model)
    labels = torch.full_like(ids, -100)
    with _looking_at(model):
        logits = cast(Any, model(input_ids=ids, return_dict=True)).logits.float()
        labels[0, -1] = logits[0, -2].argmin()
        is_shifted = _agrees(model, logits[0, -2], labels[0, -1], input_ids=ids, labels=labels)
        aligned = torch.full_like(ids, -100)
        aligned[0, 0] = logits[0, 0].argmin()
        try:
            follows = _agrees(model, logits[0, 0], aligned[0, 0], input_ids=ids, labels=labels, shift_labels=aligned)
        except Exception:  # the model does not accept them
            follows = False
    return OwnLoss(is_shifted, follows)


def _agrees(model: PreTrainedModel, logits: Tensor, label: Tensor, **inputs: Tensor) -> bool:
    outputs = model(**inputs, return_dict=True)
    loss, expected = outputs.loss.float(), F.cross_entropy(logits, label)
    if (balance := getattr(outputs, "aux_loss", None)) is not None:  # a mixture of experts adds it to its loss
        loss = loss - getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * balance
    precision = 1e-4 if outputs.logits.dtype in (torch.float32, torch.float64) else 1e-2
    return bool((loss - expected).abs() <= precision * expected.abs())


def logit_scale(made: Tensor, logits: Tensor, cap: float | None) -> float | None:
    """The factor that turns the output embeddings' product with the last hidden state into the model's logits.

    Args:
        made: The output embeddings applied to the last hidden state, `(B, S, V)`.
        logits: The model's logits `(B, S, V)`; a tanh has limited them to `-cap..cap` if there is a cap.

    Returns:
        The factor, or `None` if there is none.
    """
    made, logits = made.double(), logits.double()
    wanted = logits if cap is None else torch.atanh((logits / cap).clamp(-1 + 1e-9, 1 - 1e-9)) * cap
    square = float((made * made).sum())
    scale = float((made * wanted).sum()) / square if square else 1.0
    scale = 1.0 if abs(scale - 1.0) < 1e-4 else scale
    found = made * scale
    found = found if cap is None else torch.tanh(found / cap) * cap
    # The tolerance is that of half precision.
    return scale if bool((found - logits).abs().max() <= 0.02 * logits.abs().max()) else None
