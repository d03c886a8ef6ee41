"""Conversions between nats, bits, bytes and characters."""

import codecs
import math
from typing import Any

import numpy as np


NATS_PER_BIT = math.log(2)
_CHUNK = 1 << 22


def begins_character(data: Any) -> Any:
    """Whether each byte begins a character of UTF-8, i.e. is no continuation byte (10xxxxxx).

    Works on numbers, arrays and tensors.
    """
    return data & 0xC0 != 0x80


def count_characters(data: np.ndarray) -> int:
    """Number of UTF-8 characters that begin after the first byte of `data`, `(num_bytes,)` uint8."""
    return sum(
        int(begins_character(np.asarray(data[start : start + _CHUNK])).sum()) for start in range(1, len(data), _CHUNK)
    )


def is_utf8(data: np.ndarray) -> bool:
    """Whether `data`, `(num_bytes,)` uint8, is part of a UTF-8 text; a character may be cut at either end.

    Zero bytes mean no: text has none, while UTF-16, which may otherwise decode as UTF-8, has many.
    """
    begin = 0
    while begin < min(3, len(data)) and not begins_character(int(data[begin])):
        begin += 1
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(begin, len(data), _CHUNK):
            chunk = np.asarray(data[start : start + _CHUNK]).tobytes()
            if b"\0" in chunk:
                return False
            decoder.decode(chunk)
    except UnicodeDecodeError:
        return False
    return True
