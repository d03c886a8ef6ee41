"""How a classification model pools its last hidden state, found by comparing what its modules are given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_charformer.auxiliary_losses import last_of_text

from .probe import Trace, chains, close, looking_at


@dataclass(frozen=True)
class Pooling:
    """How positions become one vector: modules first, then an operation of `pooled`."""

    modules: tuple[str, ...]
    operation: str


OPERATIONS = ("first", "last", "last_eos", "mean", "mean_after_first", "first_and_mean")


def counted(operation: str, inputs: Mapping[str, Any], config: PreTrainedConfig) -> Tensor | None:
    """The mask `(B, S)` of the positions that count for an operation, from a model's inputs; `None` if all do."""
    text, ids = config.get_text_config(), inputs.get("input_ids")
    if operation == "last_eos":
        return None if ids is None else ids == text.eos_token_id
    mask, pad = inputs.get("attention_mask"), getattr(text, "pad_token_id", None)
    if mask is None and pad is not None and ids is not None:
        mask = ids != pad
    return mask


def pooled(hidden_states: Tensor, operation: str, mask: Tensor | None = None) -> Tensor:
    """One vector for each row, `(B, width)`, or `(B, 2 * width)` for `"first_and_mean"`.

    Args:
        hidden_states: `(B, S, width)`, or a feature map `(B, width, height, width of the map)`, of which the mean is taken.
        mask: `(B, S)`, 1 at positions that count. `"last"` and `"last_eos"` take the last one.
    """
    if hidden_states.dim() == 4:
        return hidden_states.mean(dim=(2, 3))
    if operation == "first":
        return hidden_states[:, 0]
    if operation.startswith("last"):
        return last_of_text(hidden_states, mask)
    if operation == "mean" and mask is not None:
        weights = mask.to(hidden_states.dtype)[..., None]
        return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)
    if operation == "mean":
        return hidden_states.mean(1)
    after_first = hidden_states[:, 1:].mean(1)
    return after_first if operation == "mean_after_first" else torch.cat([hidden_states[:, 0], after_first], dim=-1)


def pooling_of(model: PreTrainedModel, trace: Trace) -> Pooling | None:
    """The pooling of the last hidden state; `None` if no module is given the result of one of the operations."""
    state = trace.states[-1]
    if state.dim() not in (3, 4):
        return None
    follows = lambda given, returned: given.dim() == returned.dim()  # noqa: E731
    with looking_at(model):
        for tensor, names in chains(trace.calls, state, follows):
            for operation in OPERATIONS if tensor.dim() == 3 else ("mean",):
                vector = pooled(tensor, operation, counted(operation, trace.inputs, model.config))
                if any(_is(vector, one) for one in (*(call.given for call in trace.calls), trace.logits)):
                    return Pooling(names, operation)
    return None


def _is(vector: Tensor, other: Tensor) -> bool:
    return other.shape[0] == 1 and other.numel() == vector.numel() and close(other.reshape(vector.shape), vector, 1e-4)
