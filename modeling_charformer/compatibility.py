"""Differences between the supported releases of Transformers, and checks of what callers pass to every model.

The differences are detected by signatures, not by version numbers.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.utils.generic import TransformersKwargs


# The name of the key-value cache: "past_key_values" up to Transformers 5.23, "cache" from 5.24 on. Models, mask functions,
# outputs and `generate` all use it.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# Arguments that callers pass to every model. Attention reads some of them; the others have no effect on the result:
# `cache_position`, for example, because the cache itself knows its length.
COMMON_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {"cache_position", "return_dict"}


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that a model was given under its new or its old name.

    With a PEFT prefix both are given: `generate` passes an empty cache under the new name and PEFT its trained prefix
    under the old one. The prefix is then the cache.

    Raises:
        ValueError: If both names are given, with different caches, and the new one is not empty.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        if not cache.get_seq_length():
            return past_key_values
        raise ValueError(
            "cache and past_key_values are two names of one argument, and both are given; give one of them"
        )
    return past_key_values if cache is None else cache


def check_arguments(arguments: Mapping[str, Any], attention: str | None, packed_by_positions: bool) -> None:
    """Refuse arguments that should change the result but would be ignored.

    Args:
        arguments: The keyword arguments that are no parameters of `forward`.
        attention: Name of the attention implementation. That of an inference engine may take arguments unknown here.
        packed_by_positions: Whether `position_ids` are given; the mask of packed rows is derived from them.

    Raises:
        TypeError: If one of `arguments` is unknown and is not `None`.
    """
    if attention not in ALL_MASK_ATTENTION_FUNCTIONS:
        return
    for name, value in arguments.items():
        if value is None:
            continue
        if name == "token_type_ids" and isinstance(value, Tensor):
            if not torch.compiler.is_compiling() and value.any():
                raise TypeError("token_type_ids are not all 0; a Charformer knows one type of text. Leave them out")
        elif name not in COMMON_ARGUMENTS:
            raise TypeError(
                f"a Charformer has no argument {name!r} (given as {type(value).__name__}); besides the parameters of"
                f" its forward it takes {', '.join(sorted(COMMON_ARGUMENTS))}, and None for any other"
            )
        elif name in ("cu_seq_lens_q", "seq_idx") and not packed_by_positions and "flash" not in str(attention):
            raise TypeError(
                f"{name} alone does not keep packed texts apart with the attention {attention!r}; give position_ids, which"
                " begin at 0 with each text"
            )


def check_ids(name: str, ids: Any) -> None:
    """Raise ValueError unless `ids` are a `(batch, sequence)` tensor of integers."""
    if not isinstance(ids, Tensor):
        found = f"is of the type {type(ids).__name__}"
    elif ids.dtype not in (torch.int64, torch.int32):
        found = f"is a tensor of {ids.dtype}"
    elif ids.dim() != 2:
        found = f"has the shape {tuple(ids.shape)}"
    else:
        return
    raise ValueError(
        f"{name} {found}; give a tensor of torch.long of the shape (batch, sequence), as a tokenizer does with"
        ' return_tensors="pt"'
    )


def check_range(name: str, ids: Tensor, end: int, field: str, ignore_index: int | None = None) -> None:
    """Raise ValueError if one of `ids` on the CPU is outside `0..end - 1`, the range that the configuration's `field` sets.

    Elsewhere they are not checked, because the check would wait for the device.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    if ignore_index is not None:
        ids = ids.masked_fill(ids == ignore_index, 0)
    # For the few ids of a step of generation, Python is faster than a kernel.
    bounds = ids.flatten().tolist() if ids.numel() < 32 else [int(bound) for bound in ids.aminmax()]
    low, high = min(bounds), max(bounds)
    if low < 0 or high >= end:
        raise ValueError(f"{name} contains {high if high >= end else low}; it must be in 0..{end - 1} ({field}={end})")


def check_mask(mask: Any) -> None:
    """Raise ValueError if a mask `(B, S)` on the CPU numbers the texts of a packed row, of which models and targets know nothing.

    Other masks, and what is none, are not checked.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or mask.numel() == 0:
        return
    if (largest := int(mask.max())) > 1:
        raise ValueError(
            f"attention_mask holds {largest}; it must hold 0 and 1. Where it numbers the texts of packed rows, targets would"
            " reach into the next text: give position_ids in its place, which begin at 0 with each text"
        )
