"""Messages to the user, and foreign text made safe to print."""

import contextlib
import io
import os
import re
import sys
import unicodedata
from logging import Filter, LogRecord, getLogger
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What wrong input, a damaged file, a full disk, a missing package or too little memory (of a GPU too) raises.
USER_ERRORS = (
    FloatingPointError,
    ImportError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    ValueError,
)


# Zero-width joiners: emoji and several scripts need them, and they are harmless.
_JOINERS = "\u200c\u200d"


def printable(text: object) -> str:
    """`text` with control characters, direction marks and lone surrogates escaped; newlines and tabs stay.

    Generated text, file names, and errors that quote them could otherwise move the cursor, clear the screen, or raise an
    error at a character that cannot be encoded.
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
    """An error's message, `printable`. A traceback that a worker of a DataLoader put into it is left out."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror and error.filename is not None:  # without its number
        text = f"{error.filename}: {error.strerror}"
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    return printable(text)


def report_error(program: str, error: BaseException) -> None:
    """Tell the user of an error without its traceback, which the log shows at the level `debug`."""
    logger.debug("traceback", exc_info=error)
    # A progress bar may hold the line.
    print(f"\n{program}: error: {error_message(error) or type(error).__name__}", file=sys.stderr)


class _Printable(Filter):
    """Makes what libraries log safe to print, since they quote configurations and names of files."""

    def filter(self, record: LogRecord) -> bool:
        record.msg, record.args = printable(re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())), ()  # without colours
        return True


class _LossyFile(io.FileIO):
    """A file whose `write` never fails. What cannot be written is lost, which stderr says once."""

    _lost = False

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if not self._lost:
                self._lost = True
                with contextlib.suppress(OSError):
                    os.write(
                        2, f"\nWhat is printed from here on is lost ({error.strerror}); the run goes on\n".encode()
                    )
            written = None
        return len(memoryview(data).cast("B")) if written is None else written


def use_safe_streams(for_a_run: bool = False) -> None:
    """Let stdout and stderr escape characters that their encoding lacks, so that printing a name never fails.

    What libraries log is made `printable`, too.

    With `for_a_run` they also survive a terminal that is closed, a pipe that nobody reads any more, and a full disk: a run
    of hours is worth more than its log.
    """
    for name in ("stdout", "stderr") if for_a_run else ():
        stream: Any = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # not one that a caller has put there
            lossy = io.BufferedWriter(_LossyFile(stream.fileno(), "wb", closefd=False))
            by_line = stream.line_buffering or stream.write_through
            setattr(sys, name, io.TextIOWrapper(lossy, stream.encoding, line_buffering=by_line))
    for library in ("transformers", "datasets", "huggingface_hub"):
        for handler in getLogger(library).handlers:
            if not any(isinstance(known, _Printable) for known in handler.filters):
                handler.addFilter(_Printable())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a replaced or closed stream
            stream.reconfigure(errors="backslashreplace")


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
