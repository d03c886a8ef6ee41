import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from charformer_training import data as data_module
from charformer_training.data import (
    ConsecutiveWindows,
    DataArguments,
    RandomWindows,
    Split,
    load_corpus,
    split_corpus,
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(data_module, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def as_split(content: bytes, name: str = "train") -> Split:
    return Split(name, np.frombuffer(content, np.uint8))


def test_a_file_is_mapped_as_it_is(text_file):
    corpus = load_corpus(DataArguments(data_path=str(text_file)))
    assert isinstance(corpus, np.memmap) and corpus.tobytes() == text_file.read_bytes()


def test_a_folder_is_its_text_files_in_the_order_of_their_paths(tmp_path, cache):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "2.txt").write_bytes(b"two\r\n")
    (folder / "a.md").write_bytes("eins ä".encode())
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / ".hidden").write_bytes(b"hidden")
    (folder / "empty").write_bytes(b"")
    arguments = DataArguments(data_path=str(folder), document_separator="|")
    assert load_corpus(arguments).tobytes() == "eins ä|two\r\n".encode()
    (written,) = cache.rglob("*.bytes")
    stamp = written.stat().st_mtime_ns
    load_corpus(arguments)
    assert written.stat().st_mtime_ns == stamp  # not written again
    (folder / "a.md").write_bytes(b"changed")
    assert load_corpus(arguments).tobytes() == b"changed|two\r\n"


def test_the_standard_library_is_python_text():
    corpus = load_corpus(DataArguments(data_path="python-stdlib"))
    assert len(corpus) > 1_000_000
    text = corpus.tobytes()
    assert b"def " in text and b"\0" not in text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_its_rows(tmp_path, streaming):
    Dataset.from_dict({"text": ["one", "", "zwei ä", None, "drei"]}).to_parquet(tmp_path / "part.parquet")
    arguments = DataArguments(dataset_name=str(tmp_path), dataset_streaming=streaming)
    assert load_corpus(arguments).tobytes() == "one\nzwei ä\ndrei".encode()
    wrong = DataArguments(dataset_name=str(tmp_path), dataset_streaming=streaming, text_column="body")
    with pytest.raises(ValueError, match=r"text_column is 'body'.*columns \['text'\]"):
        load_corpus(wrong)


def test_a_failed_write_leaves_nothing(cache):
    def texts():
        yield b"begun"
        raise RuntimeError("connection lost")

    with pytest.raises(RuntimeError, match="connection lost"):
        data_module._write_corpus(texts(), b"", "key")
    assert not list(cache.rglob("*.*"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path / "missing.txt", FileNotFoundError, "no file or folder .*missing.txt.*text file, a folder"),
        (lambda path: path / "empty.txt", ValueError, "empty.txt is empty"),
        (lambda path: path / "folder", ValueError, "holds no text file"),
    ],
)
def test_a_corpus_without_text_raises(tmp_path, make, error, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "binary").write_bytes(b"\0\1\2")
    with pytest.raises(error, match=message):
        load_corpus(DataArguments(data_path=str(make(tmp_path))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of data_path"),
        ({"data_path": "x", "dataset_name": "y"}, "give one of data_path"),
        ({"data_path": "x", "train_share": 1.0}, "train_share is 1.0"),
        ({"data_path": "x", "train_share": 0.9, "validation_share": 0.2}, "come to more than 1"),
        ({"data_path": "x", "max_eval_bytes": 1}, "max_eval_bytes is 1"),
    ],
)
def test_wrong_arguments_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


def test_splits_follow_one_another_and_have_checksums():
    corpus = np.arange(200, dtype=np.uint8)
    splits = split_corpus(corpus, 0.9, 0.05)
    assert [len(split.data) for split in splits.values()] == [180, 10, 10]
    assert np.concatenate([split.data for split in splits.values()]).tolist() == corpus.tolist()
    assert splits["test"].sha256 == hashlib.sha256(corpus[190:].tobytes()).hexdigest()
    # nanoGPT's split of tiny Shakespeare, and those of enwik8 and text8
    assert [len(split.data) for split in split_corpus(np.zeros(1_115_394, np.uint8), 0.9, 0.1).values()] == [
        1_003_854,
        111_540,
        0,
    ]
    sizes = [len(split.data) for split in split_corpus(np.zeros(10**8, np.uint8), 0.9, 0.05).values()]
    assert sizes == [90_000_000, 5_000_000, 5_000_000]


def test_random_windows_follow_from_seed_and_index():
    split = as_split(bytes(range(256)))
    windows = RandomWindows(split, 16, 1000, seed=5)
    assert len(windows) == 1000
    starts = set()
    for index in range(1000):
        ids = windows[index]["input_ids"]
        assert ids.dtype == np.int64 and ids.tolist() == list(range(ids[0], ids[0] + 16))
        starts.add(int(ids[0]))
    assert min(starts) == 0 and max(starts) == 240  # both ends are reached
    assert len(starts) > 200  # of 241
    again, other = RandomWindows(split, 16, 10, seed=5), RandomWindows(split, 16, 10, seed=6)
    assert [again[i]["input_ids"][0] for i in range(10)] == [windows[i]["input_ids"][0] for i in range(10)]
    assert [other[i]["input_ids"][0] for i in range(10)] != [windows[i]["input_ids"][0] for i in range(10)]


@pytest.mark.parametrize("length", [16, 17, 31, 32, 100])
def test_consecutive_windows_predict_each_byte_once(length):
    content = bytes(range(length))
    windows = ConsecutiveWindows(as_split(content), 16)
    targets = [
        label
        for item in map(windows.__getitem__, range(len(windows)))
        for label in item["labels"][1:].tolist()
        if label != -100
    ]
    assert targets == list(content[1:])
    assert all(
        len(item["input_ids"]) == len(item["labels"]) == 16 for item in map(windows.__getitem__, range(len(windows)))
    )


def test_evaluation_can_be_cut_short():
    windows = ConsecutiveWindows(as_split(bytes(range(100))), 16, max_bytes=40)
    assert sum((item["labels"][1:] != -100).sum() for item in map(windows.__getitem__, range(len(windows)))) == 39


@pytest.mark.parametrize(
    "make", [lambda split: RandomWindows(split, 16, 4, 0), lambda split: ConsecutiveWindows(split, 16)]
)
def test_a_window_longer_than_the_split_raises_naming_both(make):
    with pytest.raises(ValueError, match="the validation split has 15 bytes.*max_position_embeddings=16"):
        make(as_split(bytes(15), "validation"))


@pytest.mark.slow
def test_a_large_file_costs_no_private_memory(tmp_path):
    """A sparse file of 1 GB: read from its beginning to its end, mapped, it must not become private memory."""
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(10**9)
    program = f"""
import re
from charformer_training.data import *

def private_megabytes():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(size) for size in re.findall(r"Anonymous: +(\\d+) kB", file.read())) / 1024

before = private_megabytes()
splits = split_corpus(load_corpus(DataArguments(data_path={str(path)!r})), 0.9, 0.05)
splits["validation"].sha256
windows = RandomWindows(splits["train"], 512, 10**7, 0)
for index in range(2000):
    windows[index]
print(private_megabytes() - before)
"""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs Linux's account of memory")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 100
