"""Nats, bits, bytes and characters: one definition of each."""

import codecs
import math
from typing import Any

import numpy as np


NATS_PER_BIT = math.log(2)
_CHUNK = 1 << 22


def begins_character(data: Any) -> Any:
    """Which bytes of an array or tensor begin a character of UTF-8: all but continuation bytes (10xxxxxx)."""
    return data & 0xC0 != 0x80


def count_characters(data: np.ndarray) -> int:
    """How many characters of UTF-8 begin after the first byte of `data`, `(num_bytes,)` uint8."""
    return sum(
        int(begins_character(np.asarray(data[start : start + _CHUNK])).sum()) for start in range(1, len(data), _CHUNK)
    )


def is_utf8(data: np.ndarray) -> bool:
    """Whether `data`, `(num_bytes,)` uint8, is a part of a text in UTF-8; either end may cut a character.

    Zero bytes do not occur in text, but do in UTF-16, which can pass for UTF-8 otherwise.
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
