"""Where supported releases of Transformers differ, found out by their signatures, and what they hand to every model."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.utils import TransformersKwargs


# The name of the key-value cache among the arguments of models and of masks, among the fields of outputs and among
# what `generate` passes on: "past_key_values" up to 5.23, "cache" from 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# What callers hand to every model, and attention reads, or nothing needs. The cache itself says where it ends.
COMMON_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {"cache_position", "return_dict"}


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that a model was given, by its new or its old name.

    PEFT hands a trained prefix over by the old name, beside an empty cache of `generate`'s by the new one: the prefix counts.

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
    """Refuse what a model would ignore though it changes the result.

    Args:
        arguments: What `forward` has no parameter for.
        attention: The attention implementation. An engine's own takes arguments that only it knows.
        packed_by_positions: Whether `position_ids` are given, from which the mask of packed rows follows.

    Raises:
        TypeError: If one of `arguments` is unknown, and has a value.
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
                f"a Charformer has no argument {name!r} (given as {type(value).__name__}); beside those of its forward it"
                f" takes {', '.join(sorted(COMMON_ARGUMENTS))}, and None for any other"
            )
        elif name in ("cu_seq_lens_q", "seq_idx") and not packed_by_positions and "flash" not in str(attention):
            raise TypeError(
                f"{name} alone does not keep packed texts apart with the attention {attention!r}; give position_ids, which"
                " begin at 0 with each text"
            )
