"""From text to windows of bytes: reading a corpus, splitting it by position, drawing windows.

A corpus is one memory-mapped array of bytes. Windows are cut out of it when they are asked for, so its size costs no
memory, and each process reads its own windows only.
"""

import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HOME
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from modeling_charformer.auxiliary_losses import IGNORE_INDEX

from .arguments import SPLIT_NAMES, STANDARD_LIBRARY, DataArguments


@dataclass(frozen=True)
class Split:
    """A part of a corpus: its bytes, `(num_bytes,)` uint8, usually memory-mapped.

    `start` is the place of its first byte in the corpus, `source` says in words what that is.
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
            digest.update(self.data[start : start + (1 << 20)].data)
        return digest.hexdigest()


def load_corpus(arguments: DataArguments, write: bool = True) -> np.ndarray:
    """The bytes of the corpus, `(num_bytes,)` uint8, memory-mapped.

    A single file is mapped as it is. Files of a folder and rows of a dataset are first written one after the other
    into one file of the cache (in the folder that HF_HOME names), folders once as long as they stay as they are. Of
    several processes only one does so, first: the others call this with `write=False`.

    Raises:
        FileNotFoundError: If `data_path` does not exist.
        ValueError: If there is no text in it.
    """
    separator = arguments.document_separator.encode()
    if arguments.dataset_name is not None:
        key = _cache_key(
            "dataset", str(arguments.dataset_name), arguments.source, arguments.text_column, separator.hex()
        )
        return _map(_write_corpus(_dataset_texts(arguments), separator, key) if write else _cache_path(key))
    if arguments.data_path == STANDARD_LIBRARY:
        return _load_files(_standard_library_files(), separator, arguments.source)
    path = Path(arguments.data_path or "").expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _is_text_file(file, path)]
        return _load_files(files, separator, f"the folder {path}")
    if not path.is_file():
        raise FileNotFoundError(
            f"data_path: there is no file or folder {str(path)!r} (from {os.getcwd()}); give a text file, a folder of"
            f" text files or '{STANDARD_LIBRARY}', or a dataset by --dataset_name"
        )
    return _map(path)


def split_corpus(data: np.ndarray, train_share: float, validation_share: float, source: str = "") -> dict[str, Split]:
    """The train, validation and test splits: parts of the corpus one after the other, as those of enwik8 and text8."""
    ends = [0, int(len(data) * train_share), round(len(data) * (train_share + validation_share)), len(data)]
    return {
        name: Split(name, data[start:end], source, start)
        for name, start, end in zip(SPLIT_NAMES, ends, ends[1:], strict=False)
    }


class RandomWindows(Dataset):
    """`num_windows` windows of `window` bytes from random offsets; which, follows from the seed and the index alone.

    Items are `{"input_ids", "labels"}`, both `(window,)` int64.

    Raises:
        ValueError: If the split is shorter than a window.
    """

    def __init__(self, split: Split, window: int, num_windows: int, seed: int):
        _check_window(split, window)
        self.split, self.window, self.num_windows, self.seed = split, window, num_windows, seed

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        last = len(self.split.data) - self.window
        offset = int(np.random.default_rng((self.seed, index)).integers(last, endpoint=True))
        ids = np.asarray(self.split.data[offset : offset + self.window], dtype=np.int64)
        return {"input_ids": ids, "labels": ids}


class ConsecutiveWindows(Dataset):
    """The windows that cover a split from its start, so that each byte but the first is a target exactly once.

    Each window begins with the last byte of the one before. The last is filled up with targets of -100.
    """

    def __init__(self, split: Split, window: int, max_bytes: int | None = None):
        _check_window(split, window)
        self.split, self.data, self.window = split, split.data[:max_bytes], window

    def __len__(self) -> int:
        return -(-(len(self.data) - 1) // (self.window - 1))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
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


def _map(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:
        raise ValueError(f"the file {path} is empty")
    return np.memmap(path, dtype=np.uint8, mode="r")


def _is_text_file(path: Path, root: Path) -> bool:
    if any(part.startswith(".") for part in path.relative_to(root).parts) or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(8192)
    return bool(start) and b"\0" not in start


def _standard_library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]


def _load_files(files: list[Path], separator: bytes, source: str) -> np.ndarray:
    if not files:
        raise ValueError(f"{source} holds no text file (binary, hidden and empty files do not count)")
    stamps = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    path = _cache_path(_cache_key("files", separator.hex(), *stamps))
    if not path.exists():
        _write_corpus((file.read_bytes() for file in files), separator, path.stem)
    return _map(path)


def _dataset_texts(arguments: DataArguments) -> Iterator[bytes]:
    from datasets import load_dataset

    dataset = load_dataset(
        arguments.dataset_name,
        arguments.dataset_config,
        split=arguments.dataset_split,
        streaming=arguments.dataset_streaming,
    )
    columns = dataset.column_names
    if columns is not None and arguments.text_column not in columns:
        raise ValueError(f"text_column is {arguments.text_column!r}; {arguments.source} has the columns {columns}")
    for row in tqdm(dataset, desc=f"Reading {arguments.source}", unit=" rows"):
        if row[arguments.text_column]:
            yield row[arguments.text_column].encode()


def _cache_key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _cache_path(key: str) -> Path:
    return Path(HF_HOME) / "charformer" / f"{key}.bytes"


def _write_corpus(texts: Iterable[bytes], separator: bytes, key: str) -> Path:
    path = _cache_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".incomplete", delete=False) as file:
        try:
            for number, text in enumerate(texts):
                file.write(separator + text if number else text)
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)
    if path.stat().st_size == 0:
        raise ValueError("the dataset holds no text")
    return path
