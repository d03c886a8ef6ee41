"""What supported releases of Transformers do differently, found out by their signatures."""

import inspect

from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask


# The name of the key-value cache among the arguments of models and of masks, among the fields of outputs and among
# what `generate` passes on: "past_key_values" up to 5.23, "cache" from 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


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
