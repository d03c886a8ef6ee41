"""How a classification model pools its last hidden state, found by comparing what its modules are given."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_charformer.auxiliary_losses import last_of_text

from .probe import Trace, chains, close


# At most so many positions before those of an image's parts: the class's, and registers.
_MAX_SKIPPED = 9


@dataclass(frozen=True)
class Pooling:
    """How positions become one vector."""

    operation: str
    """`"first"`, `"last"`, `"last_eos"`, `"mean"`, or `"first_and_mean"`, both behind each other."""
    skipped: int = 0
    """The number of positions that a mean leaves out at the beginning."""
    modules: tuple[str, ...] = ()
    """Names of the modules that are applied before."""


def counted(operation: str, inputs: Mapping[str, Any], config: PreTrainedConfig) -> Tensor | None:
    """The mask `(B, S)` of the positions that count for an operation, from a model's inputs; `None` if all do."""
    text, ids, mask = config.get_text_config(), inputs.get("input_ids"), inputs.get("attention_mask")
    if operation == "last_eos":
        return None if ids is None else ids == text.eos_token_id
    pad = getattr(text, "pad_token_id", None)
    if operation == "last" and mask is None and pad is not None and ids is not None:
        mask = ids != pad
    return mask


def pooled(hidden_states: Tensor, pooling: Pooling, mask: Tensor | None = None) -> Tensor:
    """One vector for each row, `(B, width)`, or `(B, 2 * width)` for `"first_and_mean"`.

    Args:
        hidden_states: `(B, S, width)`, or a feature map `(B, width, height, width of the map)`, of which the mean is taken.
        pooling: What to do; its modules have been applied.
        mask: `(B, S)`, 1 at positions that count. `"last"` and `"last_eos"` take the last one.
    """
    if hidden_states.dim() == 4:
        return hidden_states.mean(dim=(2, 3))
    if pooling.operation == "first":
        return hidden_states[:, 0]
    if pooling.operation.startswith("last"):
        return last_of_text(hidden_states, mask)
    kept = hidden_states[:, pooling.skipped :]
    if mask is None:
        mean = kept.mean(1)
    else:
        weights = mask[:, pooling.skipped :, None].to(kept.dtype)
        mean = (kept * weights).sum(1) / weights.sum(1).clamp(min=1)
    return mean if pooling.operation == "mean" else torch.cat([hidden_states[:, 0], mean], dim=-1)


def pooling_of(model: PreTrainedModel, trace: Trace) -> Pooling | None:
    """The pooling of the last hidden state; `None` if no module is given the result of one that is known."""
    state = trace.states[-1]
    if state.dim() not in (3, 4):
        return None
    follows = lambda given, returned: given.dim() == returned.dim()  # noqa: E731
    given = [*(call.given for call in trace.calls), trace.logits]
    for tensor, names in chains(trace.calls, state, follows):
        for pooling in _candidates(trace, tensor, names):
            mask = counted(pooling.operation, trace.inputs, model.config)
            if mask is not None and tensor.dim() == 3 and mask.shape != tensor.shape[:2]:
                continue  # other positions than the tokens', like Perceiver's latents
            vector = pooled(tensor, pooling, mask)
            if any(_is(vector, one) for one in given):
                return pooling
    return None


def _candidates(trace: Trace, tensor: Tensor, names: tuple[str, ...]) -> Iterator[Pooling]:
    if tensor.dim() == 3 and "decoder_input_ids" in trace.inputs:
        yield Pooling("last_eos", 0, names)
        yield Pooling("last", 0, names)
    elif tensor.dim() == 3:
        yield Pooling("first", 0, names)
        yield Pooling("last", 0, names)
    yield Pooling("mean", 0, names)
    if "pixel_values" in trace.inputs and tensor.dim() == 3:
        for skipped in range(1, min(_MAX_SKIPPED, tensor.shape[1])):
            yield Pooling("mean", skipped, names)
            yield Pooling("first_and_mean", skipped, names)


def _is(vector: Tensor, other: Tensor) -> bool:
    return other.shape[0] == 1 and other.numel() == vector.numel() and close(other.reshape(vector.shape), vector, 1e-4)
