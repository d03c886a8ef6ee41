"""Text from outside, made safe to print."""

import contextlib
import sys
import unicodedata


# Emoji and several scripts need these two; they cannot do harm.
_JOINERS = "\u200c\u200d"


def printable(text: object) -> str:
    """`text` with control characters, direction marks and lone surrogates escaped; newlines and tabs stay.

    Generated text, names of files and columns, and errors that quote them could otherwise move the cursor, clear the
    screen, or stop the program at a character that cannot be encoded.
    """
    return "".join(
        char
        if char.isprintable() or char in "\n\t" or char in _JOINERS or unicodedata.category(char) == "Zs"
        else _escaped(char)
        for char in str(text)
    )


def one_line(text: object) -> str:
    """`printable` text for a place that must stay one line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def error_message(error: BaseException) -> str:
    """What an error says, `printable`; of one that a loader's worker met, without the traceback that comes with it."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    return printable(text)


def use_safe_streams() -> None:
    """Has both streams escape what their encoding cannot hold, so that no name or text ends a program."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a replaced or closed stream
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
