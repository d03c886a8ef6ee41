"""Bits per byte of n-gram models, the baseline that a trained model must beat."""

import numpy as np


_CHUNK = 1 << 22


def ngram_bits_per_byte(train: np.ndarray, text: np.ndarray, order: int) -> float:
    """Mean code length in bits of each byte of `text` but the first, under an n-gram model counted on `train`.

    Orders are interpolated by Witten and Bell's method (Chen and Goodman 1998, section 2.5). The distribution of order n
    is mixed with that of order n - 1, whose weight grows with the number of different bytes seen after the context.
    The lowest order is mixed with the uniform distribution, so no byte has probability 0.

    Args:
        train: `(num_bytes,)` uint8.
        text: `(num_bytes,)` uint8, two bytes or more.
        order: 1 (unigram, no context) to 3 (trigram, two bytes of context).
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}; it must be 1, 2 or 3")
    counts = [_ngram_counts(train, length) for length in range(1, order + 1)]
    followers = [(table.reshape(-1, 256) > 0).sum(axis=1) for table in counts]
    totals = [table.reshape(-1, 256).sum(axis=1) for table in counts]

    bits = 0.0
    for start in range(1, len(text), _CHUNK):
        targets = np.asarray(text[start : start + _CHUNK], dtype=np.int64)
        probability = np.full(len(targets), 1 / 256)
        context = np.zeros(len(targets), dtype=np.int64)
        usable = np.ones(len(targets), dtype=bool)
        for length in range(order):
            if length:
                positions = np.arange(start, start + len(targets)) - length
                usable = positions >= 0
                context = (
                    np.where(usable, text[np.maximum(positions, 0)].astype(np.int64) << (8 * (length - 1)), 0)
                    + context
                )
            seen, distinct = totals[length][context], followers[length][context]
            hits = counts[length][(context << 8) | targets]
            with np.errstate(invalid="ignore"):
                mixed = (hits + distinct * probability) / (seen + distinct)
            probability = np.where(usable & (seen > 0), mixed, probability)
        bits -= float(np.log2(probability).sum())
    return bits / (len(text) - 1)


def _ngram_counts(data: np.ndarray, length: int) -> np.ndarray:
    """Number of occurrences of each string of `length` bytes, `(256 ** length,)` int64, indexed by its big-endian value."""
    counts = np.zeros(256**length, dtype=np.int64)
    for start in range(0, len(data) - length + 1, _CHUNK):
        chunk = np.asarray(data[start : start + _CHUNK + length - 1], dtype=np.int64)
        codes = np.zeros(len(chunk) - length + 1, dtype=np.int64)
        for position in range(length):
            codes = (codes << 8) | chunk[position : position + len(codes)]
        counts += np.bincount(codes, minlength=len(counts))
    return counts
