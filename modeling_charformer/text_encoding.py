"""The position of each token in its text: its word, and its offsets in characters, both computed on demand.

`transformers.BatchEncoding` reads the words and offsets of a row from `TextEncoding`, which has the interface of
`tokenizers.Encoding`.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple


Part = str | bytes | Sequence[int]  # text, raw bytes, or ids as they are
Span = tuple[int, int]

# The names of tokens by their ids. Bytes beyond ASCII are parts of characters.
BYTE_NAMES = [chr(byte) if byte < 0x80 else f"<0x{byte:02X}>" for byte in range(256)]

# In running text, a word begins with the white space before it.
WORDS = re.compile(r"\s*\S+|\s+")


class AddedTokenMatch(NamedTuple):
    """An added token in a text, from character `start` to before `stop`."""

    start: int
    stop: int
    token_id: int


def byte_string(text: str) -> bytes:
    """The bytes of `text`; a surrogate that stands for a byte that is not UTF-8 is that byte."""
    return text.encode("utf-8", errors="surrogateescape")


def byte_ids(part: Part) -> list[int]:
    return list(byte_string(part) if isinstance(part, str) else part)


def _byte_count(character: str) -> int:
    code = ord(character)
    if code < 0x80 or 0xDC80 <= code <= 0xDCFF:
        return 1
    return 2 if code < 0x800 else 3 if code < 0x10000 else 4


def _character_spans(part: Part, start: int) -> Iterator[Span]:
    """A span for each id of `part`, whose first character has the number `start`; raw bytes and ids count as characters."""
    if not isinstance(part, str) or part.isascii():
        yield from ((index, index + 1) for index in range(start, start + len(part)))
        return
    for index, character in enumerate(part, start):
        for _ in range(_byte_count(character)):
            yield index, index + 1


class EncodedText:
    """One text or list of words: its `ids`, and by the same index `offsets` and `word_ids`.

    Args:
        parts: A text, or its words.
        matches: For each part the added tokens in it, in order.
        are_words: Whether the parts are words; offsets are then counted in each word.
    """

    def __init__(self, parts: Sequence[Part], matches: Sequence[Sequence[AddedTokenMatch]], are_words: bool):
        self._parts, self._matches, self._are_words = parts, matches, are_words
        self.ids = byte_ids(parts[0]) if len(parts) == 1 and not matches[0] else self._all_ids()

    def _all_ids(self) -> list[int]:
        ids: list[int] = []
        for part, found in zip(self._parts, self._matches, strict=True):
            position = 0
            for match in found:
                ids += byte_ids(part[position : match.start])
                ids.append(match.token_id)
                position = match.stop
            ids += byte_ids(part[position:])
        return ids

    def window(self, start: int, stop: int) -> list[int]:
        """The ids from `start` to before `stop`."""
        return self.ids if stop - start == len(self.ids) else self.ids[start:stop]

    @cached_property
    def _offsets_by_part(self) -> list[list[Span]]:
        by_part = []
        for part, found in zip(self._parts, self._matches, strict=True):
            offsets: list[Span] = []
            position = 0
            for match in found:
                offsets += _character_spans(part[position : match.start], position)
                offsets.append((match.start, match.stop))
                position = match.stop
            by_part.append([*offsets, *_character_spans(part[position:], position)])
        return by_part

    @cached_property
    def offsets(self) -> list[Span]:
        return [span for offsets in self._offsets_by_part for span in offsets]

    @cached_property
    def word_ids(self) -> list[int]:
        if self._are_words:
            return [word for word, offsets in enumerate(self._offsets_by_part) for _ in offsets]
        text = self._parts[0]
        if not isinstance(text, str):
            return [0] * len(self.ids)
        words = [word for word, match in enumerate(WORDS.finditer(text)) for _ in match.group()]
        return [words[start] for start, _ in self.offsets]


def truncation_windows(length: int, max_length: int, stride: int, side: str) -> list[Span]:
    """The pieces `(start, stop)`, at most `max_length` long, of a truncated sequence: the kept one, then the overflow.

    Args:
        stride: Number of tokens that each piece repeats of the one before it.
        side: Which end is cut off, `"right"` or `"left"`.

    Raises:
        ValueError: If `stride` is not below `max_length`.
    """
    if length <= max_length:
        return [(0, length)]
    if max_length <= 0:
        return [(0, 0)]
    if stride >= max_length:
        raise ValueError(f"stride is {stride}; it must be below max_length, of which the text has {max_length}")
    step, windows = max_length - stride, []
    for start in range(0, length, step):
        stop = min(start + max_length, length)
        windows.append((start, stop) if side == "right" else (length - stop, length - start))
        if stop == length:
            break
    return windows


def pair_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """The lengths to which a pair of sequences is cut to fit `room` tokens, the longer one first."""
    shorter, longer = sorted((first, second))
    longer = max(shorter, room - shorter) if shorter <= room else shorter
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (shorter, longer) if first <= second else (longer, shorter)


class TextEncoding:
    """One row of a batch.

    Args:
        ids, attention_mask, special_tokens_mask: The row's; what neither text holds is 1 in the last one.
        texts: The text, or the pair of texts, and the part of each that the row holds.
        names: What added tokens are called, by their ids.
    """

    def __init__(
        self,
        ids: list[int],
        attention_mask: list[int],
        special_tokens_mask: list[int],
        texts: Sequence[tuple[EncodedText, Span]],
        names: dict[int, str],
    ):
        self.ids, self.attention_mask, self.special_tokens_mask = ids, attention_mask, special_tokens_mask
        self._texts, self._names = texts, names

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_sequences(self) -> int:
        return len(self._texts)

    @property
    def tokens(self) -> list[str]:
        return [self._names.get(index) or BYTE_NAMES[index] for index in self.ids]

    @cached_property
    def _places(self) -> list[tuple[int, int] | None]:
        """For each token the number of its text and its index there, or `None`."""
        places = (
            (number, index) for number, (_, (start, stop)) in enumerate(self._texts) for index in range(start, stop)
        )
        return [None if special else next(places) for special in self.special_tokens_mask]

    @property
    def sequence_ids(self) -> list[int | None]:
        return [None if place is None else place[0] for place in self._places]

    @cached_property
    def word_ids(self) -> list[int | None]:
        return [None if place is None else self._texts[place[0]][0].word_ids[place[1]] for place in self._places]

    @cached_property
    def offsets(self) -> list[Span]:
        return [(0, 0) if place is None else self._texts[place[0]][0].offsets[place[1]] for place in self._places]

    def token_to_sequence(self, token_index: int) -> int | None:
        return self.sequence_ids[token_index]

    def token_to_word(self, token_index: int) -> int | None:
        return self.word_ids[token_index]

    def token_to_chars(self, token_index: int) -> Span | None:
        return None if self._places[token_index] is None else self.offsets[token_index]

    def word_to_tokens(self, word_index: int, sequence_index: int = 0) -> Span | None:
        found = [
            index
            for index, word in enumerate(self.word_ids)
            if word == word_index and self.sequence_ids[index] == sequence_index
        ]
        return (found[0], found[-1] + 1) if found else None

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> Span | None:
        tokens = self.word_to_tokens(word_index, sequence_index)
        return tokens and (self.offsets[tokens[0]][0], self.offsets[tokens[1] - 1][1])

    def char_to_token(self, char_index: int, sequence_index: int = 0) -> int | None:
        for index, (start, stop) in enumerate(self.offsets):
            if start <= char_index < stop and self.sequence_ids[index] == sequence_index:
                return index
        return None

    def char_to_word(self, char_index: int, sequence_index: int = 0) -> int | None:
        token = self.char_to_token(char_index, sequence_index)
        return None if token is None else self.word_ids[token]
