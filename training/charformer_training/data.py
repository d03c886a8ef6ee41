"""From text to windows of bytes: reading a corpus, splitting it by position, drawing windows.

A corpus is one memory-mapped array of bytes, so it can be larger than memory. A window is cut out of it only when it is
needed, and each process reads only its own windows. If the file changes during a run, reading a window raises an error.
"""

import contextlib
import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import HF_HOME
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_charformer.auxiliary_losses import IGNORE_INDEX

from .arguments import SPLIT_NAMES, STANDARD_LIBRARY, DataArguments
from .checks import checked_path, shown
from .corpus_files import (
    described,
    documents,
    files_of_folder,
    is_of_a_run,
    is_plain,
    is_table,
    looks_like_json_lines,
    readable,
    text_of_row,
)
from .terminal import one_line
from .units import is_utf8


logger = logging.get_logger(__name__)

# Where the recipes' texts come from: shown if one is missing, since nothing here downloads them.
_KNOWN = {
    "tinyshakespeare.txt": "data/tinyshakespeare/input.txt of Andrej Karpathy's char-rnn: 1,115,394 bytes, SHA-256"
    " 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "enwik8": "in enwik8.zip of Matt Mahoney's Large Text Compression Benchmark: 100,000,000 bytes, SHA-256"
    " 2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    "text8": "in text8.zip of Matt Mahoney's Large Text Compression Benchmark: 100,000,000 bytes, MD5"
    " 3bea1919949baf155f99411df5fada7e",
}
_UTF8_SAMPLE = 1 << 24
_RECORD_SAMPLE = 1 << 20


class CorpusChangedError(ValueError):
    """The file of a corpus was changed after it was opened."""


class CorpusFile(np.memmap):
    """The bytes of a file, `(num_bytes,)` uint8, memory-mapped. `stamp` is the file's inode, size and time when it was opened."""

    stamp: tuple[int, int, int] | None = None

    def __array_finalize__(self, source: Any) -> None:
        super().__array_finalize__(source)
        self.stamp = getattr(source, "stamp", None)

    def check(self, when: str = "") -> None:
        """Raise if the file was rewritten or truncated, since its bytes no longer match their checksum.

        Deleting the file, or replacing it with another, is harmless: the old one stays mapped.

        Raises:
            CorpusChangedError: Names the file and, by `when`, the moment.
        """
        if self.stamp is None or self.filename is None:
            return
        try:
            found = os.stat(self.filename)
        except OSError:
            return
        if found.st_ino == self.stamp[0] and (found.st_size, found.st_mtime_ns) != self.stamp[1:]:
            raise CorpusChangedError(
                f"{one_line(Path(self.filename).name)} was changed during the run{when}: {self.stamp[1]:,} bytes then,"
                f" {found.st_size:,} now. Train on a copy that stays as it is"
            )


@dataclass(frozen=True)
class Split:
    """A part of a corpus: its bytes, `(num_bytes,)` uint8, usually memory-mapped.

    `start` is the place of its first byte in the corpus, and `source` is the corpus' name.
    """

    name: str
    data: np.ndarray
    source: str = ""
    start: int = 0

    @cached_property
    def sha256(self) -> str:
        """Checksum of the bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for start in range(0, len(self.data), 1 << 20):
            check_unchanged(self.data)
            digest.update(self.data[start : start + (1 << 20)].data)
        return digest.hexdigest()


def check_unchanged(data: np.ndarray, when: str = "") -> None:
    """Raise `CorpusChangedError` if `data` comes from a file that was changed since it was opened."""
    if isinstance(data, CorpusFile):
        data.check(when)


def load_corpus(
    arguments: DataArguments, write: bool = True, output_dir: str | None = None, field: str = "data_path"
) -> np.ndarray:
    """The bytes of the corpus, `(num_bytes,)` uint8, memory-mapped.

    A text file is mapped directly. Anything else is first written into one file of the cache, which lies in HF_HOME and is
    used again while the source files stay unchanged. Of several processes one writes that file first, and the others call
    this with `write=False` after it.

    Args:
        arguments: Where the text is.
        write: Whether this process writes the cache, and warns of files that are left out or are not UTF-8.
        output_dir: The folder that the run writes to. It is not read if it lies in the corpus' folder.
        field: The name of `data_path` in messages.

    Raises:
        FileNotFoundError: If `data_path` does not exist.
        ValueError: If there is no text in it, or it is of a kind that is not read.
    """
    corpus = _map(_corpus_path(arguments, write, output_dir, field))
    if write and not is_utf8(corpus[:_UTF8_SAMPLE]):
        logger.warning(
            f"{arguments.source} is not UTF-8, so its characters cannot be counted: bits per character mean nothing, bits per"
            " byte do. (iconv -f ENCODING -t UTF-8 converts it, if it is a text.)"
        )
    return corpus


def _corpus_path(arguments: DataArguments, write: bool, output_dir: str | None, field: str) -> Path:
    separator, column = arguments.document_separator.encode(), arguments.text_column
    if arguments.dataset_name is not None:
        key = _cache_key("dataset", str(arguments.dataset_name), arguments.source, column, separator.hex())
        if not write:
            return _cache_path(key)
        return write_corpus(([text] for text in _dataset_texts(arguments)), separator, key)
    if arguments.data_path == STANDARD_LIBRARY:
        return _cached(_standard_library_files(), arguments, separator)
    path = checked_path(field, arguments.data_path or "")
    if path.is_dir():
        own = None if output_dir is None else Path(output_dir)
        if own is not None and own.expanduser().resolve() == path.resolve():
            raise ValueError(f"output_dir is data_path, {one_line(path)}: the run would be a part of its own text")
        if is_of_a_run(path):
            raise ValueError(f"{field}: {one_line(path)} is the folder of a training run; give the folder of a text")
        files, others = files_of_folder(path, own)
        if others and write:
            logger.warning(f"Left out of {arguments.source}: {described(others)}")
        tables = list(filter(is_table, files))
        if len(tables) < len(files):
            _check_no_column(arguments, f"the folder {one_line(path)} does not hold tables alone")
            if tables and write:
                logger.warning(
                    f"{arguments.source} does not hold tables alone, so that"
                    f" {described({'its tables are read as plain text, names and escapes included': tables})}"
                )
        if not files:
            raise ValueError(
                f"{field}: the folder {one_line(path)} holds no text file"
                + (f": {described(others)}" if others else "")
            )
        corpus = _cached(files, arguments, separator)
        if write and len(tables) < len(files):
            _warn_of_records(corpus, arguments)
        return corpus
    if path.exists() and not path.is_file():
        raise ValueError(f"{field}: {one_line(path)} is a device or a pipe; give a regular file, or a folder")
    if not path.is_file():
        raise FileNotFoundError(_not_found(path, field, arguments.data_path))
    if path.stat().st_size == 0:
        raise ValueError(f"the file {one_line(path)} is empty")
    table = is_table(path)
    if not table:
        _check_no_column(arguments, f"{one_line(path)} is read as text, not as a table")
    corpus = path if is_plain(path) else _cached([path], arguments, separator)
    if write and not table:
        _warn_of_records(corpus, arguments)
    return corpus


def _warn_of_records(corpus: Path, arguments: DataArguments) -> None:
    """Warn if the corpus, which is read as plain text, is JSON lines. (The text of a table may well be JSON.)"""
    with readable(corpus), corpus.open("rb") as file:
        start = file.read(_RECORD_SAMPLE)
    if looks_like_json_lines(start):
        logger.warning(
            f"{arguments.source} begins with a record of JSON and is read as plain text, names and escapes included. (Files"
            " named .jsonl are read as tables.)"
        )


def _check_no_column(arguments: DataArguments, why: str) -> None:
    if arguments.text_column != DataArguments.text_column:
        raise ValueError(
            f"text_column is {shown('', arguments.text_column)}; it must be left out: {why} (.jsonl, .csv, .parquet)"
        )


def split_corpus(data: np.ndarray, train_share: float, validation_share: float, source: str = "") -> dict[str, Split]:
    """Split by position, like enwik8 and text8: the train split, then the validation split, then the test split."""
    ends = [0, int(len(data) * train_share), round(len(data) * (train_share + validation_share)), len(data)]
    return {
        name: Split(name, data[start:end], source, start)
        for name, start, end in zip(SPLIT_NAMES, ends, ends[1:], strict=False)
    }


class RandomWindows(Dataset[dict[str, np.ndarray]]):
    """`num_windows` windows of `window` bytes at random offsets, which depend on the seed and the index alone.

    Items are `{"input_ids", "labels"}`, both `(window,)` int64. With `windows_per_step`, an error names the step.

    Raises:
        ValueError: If the split is shorter than a window.
    """

    def __init__(self, split: Split, window: int, num_windows: int, seed: int, windows_per_step: int | None = None):
        _check_window(split, window)
        self.windows_per_step = windows_per_step
        self.split, self.window, self.num_windows, self.seed = split, window, num_windows, seed

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        last = len(self.split.data) - self.window
        offset = int(np.random.default_rng((self.seed, index)).integers(last, endpoint=True))
        step = "" if self.windows_per_step is None else f", at step {index // self.windows_per_step + 1}"
        check_unchanged(self.split.data, step)
        ids = np.asarray(self.split.data[offset : offset + self.window], dtype=np.int64)
        return {"input_ids": ids, "labels": ids}


class ConsecutiveWindows(Dataset[dict[str, np.ndarray]]):
    """Windows that cover a split from its start: each byte but the first is a target exactly once.

    Each window begins with the last byte of the one before. The last window is padded with targets of -100.
    """

    def __init__(self, split: Split, window: int, max_bytes: int | None = None):
        _check_window(split, window)
        self.split, self.data, self.window = split, split.data[:max_bytes], window

    def __len__(self) -> int:
        return -(-(len(self.data) - 1) // (self.window - 1))

    @cached_property
    def is_utf8(self) -> bool:
        """Whether the text is UTF-8. For any other text the Trainer reports no bits per character."""
        return is_utf8(self.data)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        check_unchanged(self.data, ", at an evaluation")
        start = index * (self.window - 1)
        ids = np.asarray(self.data[start : start + self.window], dtype=np.int64)
        missing = self.window - len(ids)
        return {
            "input_ids": np.pad(ids, (0, missing)),
            "labels": np.pad(ids, (0, missing), constant_values=IGNORE_INDEX),
        }


def _check_window(split: Split, window: int) -> None:
    if len(split.data) < window:
        raise ValueError(
            f"the {split.name} split has {len(split.data)} bytes, fewer than a window of max_position_embeddings={window};"
            " use a longer text, a shorter window, or other shares (train_share, validation_share)"
        )


def _map(path: Path) -> CorpusFile:
    found = path.stat()
    if found.st_size == 0:
        raise ValueError(f"the file {one_line(path)} is empty")
    corpus = CorpusFile(path, dtype=np.uint8, mode="r")
    corpus.stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
    return corpus


def _not_found(path: Path, field: str, given: str | None) -> str:
    or_dataset = ", or a dataset with --dataset_name" if field == "data_path" else ""
    known = f". It is {_KNOWN[path.name]}" if path.name in _KNOWN else ""
    if path.parts and path.parts[0].endswith(":") and len(path.parts[0]) > 2:  # https:
        known = ". It looks like an address: nothing is downloaded from one"
    return (
        f"{field}: there is no file or folder {one_line(given)!r} (from {one_line(os.getcwd())}); give a text file, a"
        f" folder of text files or '{STANDARD_LIBRARY}'{or_dataset}{known}"
    )


def _standard_library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]


def _cached(files: list[Path], arguments: DataArguments, separator: bytes) -> Path:
    """The file of the cache that holds the text of `files`; written if it does not exist yet."""
    tables = all(map(is_table, files))
    stamps = [_stamp(file) for file in files]
    key = _cache_key("files", separator.hex(), arguments.text_column if tables else "", *stamps)
    path = _cache_path(key)
    if path.exists():
        return path

    def texts() -> Iterator[Iterable[bytes]]:
        for file, stamp in zip(files, stamps, strict=True):
            yield from documents(file, arguments.text_column, tables)
            if _stamp(file) != stamp:
                raise CorpusChangedError(
                    f"{one_line(file.name)} was changed while it was read; give a copy that stays"
                )

    return write_corpus(texts(), separator, key)


def _stamp(file: Path) -> str:
    with readable(file):
        found = file.stat()
    return f"{file} {found.st_size} {found.st_mtime_ns}"


def _dataset_texts(arguments: DataArguments) -> Iterator[bytes]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(
            arguments.dataset_name,
            arguments.dataset_config,
            split=arguments.dataset_split,
            streaming=arguments.dataset_streaming,
        )
    except Exception as error:  # of many kinds: no network, no such name, split or configuration, damaged files
        reason = one_line(" ".join(str(error.__cause__ or error).split()))[:500] or type(error).__name__
        raise ValueError(f"dataset_name: {arguments.source} cannot be read: {reason}") from error
    try:
        columns = dataset.column_names
        if columns is not None and arguments.text_column not in columns:
            raise ValueError(
                f"text_column is {one_line(arguments.text_column)!r}; {arguments.source} has the columns"
                f" {one_line(columns)}"
            )
        rows = tqdm(dataset, desc=f"Reading {arguments.source}", unit=" rows", disable=None)
        for number, row in enumerate(rows, 1):
            yield from text_of_row(row, arguments.text_column, f"row {number} of {arguments.source}")
    except DatasetsError as error:
        reason = one_line(str(error.__cause__ or error).split("\n")[0])
        raise ValueError(f"dataset_name: {arguments.source} cannot be read: {reason}") from error


def _cache_key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _cache_path(key: str) -> Path:
    return Path(HF_HOME) / "charformer" / f"{key}.bytes"


def write_corpus(documents: Iterable[Iterable[bytes]], separator: bytes, key: str) -> Path:
    path = _cache_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(path.parent)
    with _unfinished(path.parent) as file:
        try:
            for number, pieces in enumerate(documents):
                if number:
                    file.write(separator)
                file.writelines(pieces)
            file.flush()
            if file.tell() == 0:
                raise ValueError("there is no text in the file, folder or dataset that was given")
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def _unfinished(folder: Path) -> Any:
    """A new file. It is locked, so that no other process deletes it like one that a killed process left."""
    while True:
        file = tempfile.NamedTemporaryFile(dir=folder, suffix=".incomplete", delete=False)  # noqa: SIM115
        _lock(file.fileno())
        if os.path.exists(file.name):  # else it was removed before it was locked
            return file
        file.close()


def _lock(descriptor: int) -> bool:
    """Lock a file for as long as this process lives. False if another process has locked it, or locks do not work."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # no such locks on this system or disk: nothing is removed
        return False
    return True


def _remove_unfinished(folder: Path) -> None:
    """Delete unfinished files that killed processes left in the cache."""
    for path in folder.glob("tmp*.incomplete"):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            if _lock(file.fileno()):
                path.unlink()
