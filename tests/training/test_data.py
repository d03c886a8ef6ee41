import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from charformer_training import data as data_module
from charformer_training.arguments import DataArguments
from charformer_training.data import (
    ConsecutiveWindows,
    RandomWindows,
    Split,
    load_corpus,
    split_corpus,
)


pytestmark = pytest.mark.usefixtures("cache")


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
        yield [b"begun"]
        raise RuntimeError("connection lost")

    with pytest.raises(RuntimeError, match="connection lost"):
        data_module.write_corpus(texts(), b"", "key")
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


TEXTS = ["one", None, "zwei ä", "", "drei"]
WHOLE = "one\nzwei ä\ndrei".encode()


def json_lines() -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)).encode()


def json_array(indent: int | None = None) -> bytes:
    return json.dumps([{"id": n, "text": text} for n, text in enumerate(TEXTS)], indent=indent).encode()


def table(delimiter: str) -> bytes:
    return (
        "\n".join(["id,text", *(f'{n},"{text or ""}"' for n, text in enumerate(TEXTS))])
        .replace(",", delimiter)
        .encode()
    )


def twins(path: Path) -> None:
    texts = pyarrow.array(["one", "two"])
    pyarrow.parquet.write_table(pyarrow.table([texts, texts], names=["text", "text"]), path)


def parquet(path: Path) -> bytes:
    Dataset.from_dict({"id": list(range(5)), "text": TEXTS}).to_parquet(path / "made")
    return (path / "made").read_bytes()


def zipped(content: bytes, *names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.jsonl", lambda path: json_lines()),
        ("a.jsonl.gz", lambda path: gzip.compress(json_lines())),
        ("a.json", lambda path: json_lines()),
        ("a.json", lambda path: b"\xef\xbb\xbf\n" + json_array()),
        ("a.JSON.bz2", lambda path: bz2.compress(json_array(indent=2))),
        ("a.zip", lambda path: zipped(json_lines(), "data/a.jsonl")),
        ("a.csv.zip", lambda path: zipped(table(","), "a")),
        ("a.csv", lambda path: table(",")),
        ("a.tsv", lambda path: table("\t")),
        ("a.csv", lambda path: b"\xef\xbb\xbf" + table(",")),
        ("a.parquet", parquet),
        ("a", parquet),
        ("a.txt", lambda path: WHOLE),
        ("a.gz", lambda path: gzip.compress(WHOLE)),
        ("no ending", lambda path: bz2.compress(WHOLE)),
        ("a.txt.xz", lambda path: lzma.compress(WHOLE)),
        ("enwik8.zip", lambda path: zipped(WHOLE, "enwik8")),
    ],
)
def test_files_as_people_have_them_are_their_text(tmp_path, name, make):
    (tmp_path / "data [1]*").mkdir()
    path = tmp_path / "data [1]*" / name
    path.write_bytes(make(tmp_path))
    for given in (path, path.parent):
        assert load_corpus(DataArguments(data_path=str(given))).tobytes() == WHOLE


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n', "text_column is 'text'; row 1 of a.jsonl has the columns \\['id'\\]"),
        ("a.jsonl", b'{"text": 5}\n', "text_column 'text' holds 5 in row 1 of a.jsonl; it must hold text"),
        ("a.jsonl", b'{"text": "a"}\n{"text\n', "a.jsonl: row 2 cannot be read"),
        ("a.jsonl", b"[1]\n", "row 1 of a.jsonl is \\[1\\]; it must be a mapping"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "row 1 of a.jsonl cannot be written in UTF-8"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "a.jsonl is not UTF-8 after row 0"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl: row 1 cannot be read"),
        ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "a.jsonl: row 1 cannot be read: Exceeds the limit"),
        (
            "a.json",
            b'{\n"text": "a"\n}',
            "a.json: row 1 cannot be read: .* holds an array of records, or a record in each",
        ),
        ("a.json", b'[{"text": "a"}, 5]', "row 2 of a.json is 5; it must be a mapping"),
        ("a.json", b'{"data": [{"text": "a"}]}', "row 1 of a.json has the columns \\['data'\\]"),
        ("a.rtf", rb"{\rtf1\ansi text}", "a.rtf is a document of an office program"),
        ("a.csv", b"id;text\n1;2\n", "has the columns \\['id;text'\\]"),
        ("a.csv", b"id,text\n1,one\n2,two, three\n", "a.csv: row 2 .* more cells than the header, 2"),
        ("a.csv", b"id,text\n1,one\n2\n", "a.csv: row 2 cannot be read: it has fewer cells than the header, 2"),
        ("a.csv", b'id,text\n1,"one\n2,two\n', "a.csv: row 1 cannot be read: a quotation mark is not closed"),
        ("a.tsv", b"text\ttext\na\tb\n", "a.tsv: row 1 cannot be read: 2 columns have the name 'text'"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "a.jsonl: row 1 cannot be read: a name is given twice"),
        ("a.parquet", twins, "a.parquet cannot be read: 2 columns have the name 'text'"),
        ("a.txt.gz", gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), "a.txt.gz is compressed twice"),
        ("a.parquet", b"PAR1" + b"x" * 99, "a.parquet cannot be read"),
        ("a.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.gz cannot be read"),
        ("a.xz", lzma.compress(b"text" * 99)[:30], "a.xz cannot be read"),
        ("a.docx", zipped(b"x", "1", "2"), "a.docx is a zip archive of 2 files"),
        ("a.zip", b"PK\x03\x04" + b"x" * 99, "a.zip cannot be read"),
        ("a.zip", b"PK\x05\x06" + b"\0" * 18, "a.zip is a zip archive of 0 files"),
        ("a.tar", b"name".ljust(257, b"\0") + b"ustar" + b"\0" * 250, "a.tar is a tar archive"),
        (
            "a.tar.gz",
            gzip.compress(b"name".ljust(257, b"\0") + b"ustar" + b"\0" * 250, mtime=0),
            "a.tar.gz is a tar archive",
        ),
        ("a.pdf", b"%PDF-1.7", "a.pdf is a PDF document, not a text"),
        ("a.png", b"\x89PNG\r\n", "a.png is a picture"),
        ("a.mp3", b"ID3\x04\0" + b"\xff" * 99, "a.mp3 is a sound or a film, not a text"),
        ("b.mp3", b"\xff\xfb\x90d\0\0" + b"\xaa" * 99, "b.mp3 is a sound or a film"),
        ("a.mp4", b"\0\0\0\x20ftypisom", "a.mp4 is a sound or a film"),
        ("a.wav", b"RIFF\x24\x08\0\0WAVEfmt ", "a.wav is a sound"),
        ("a.webp", b"RIFF\x24\x08\0\0WEBPVP8 ", "a.webp is a picture"),
        ("a.bmp", b"BM\x36\x10\0\0\0\0\0\0", "a.bmp is a picture"),
        ("a.ttf", b"\0\1\0\0\0\x0f", "a.ttf is a font"),
        ("a.exe", b"MZ\x90\0\3\0\0\0", "a.exe is a program"),
        ("a.pyc", b"\xa7\r\r\n\0\0\0\0", "a.pyc is a program"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a.doc is a document of an office program"),
        ("a.deb", b"!<arch>\ndebian-binary", "a.deb is a package or a library"),
        ("a.pt", b"\x80\x02}q", "a.pt is a pickle"),
        ("a.safetensors", b"\x40\0\0\0\0\0\0\0{\x22a\x22", "a.safetensors is a model's weights"),
        ("a.gz", gzip.compress(b"RIFF\x24\x08\0\0WAVEfmt ", mtime=0), "a.gz is a sound"),
        ("\x1b[2J.pdf", b"%PDF-1.7", r"\\x1b\[2J.pdf is a PDF"),
        ("enwik8", None, "enwik8.zip of Matt Mahoney.*SHA-256 2b49720e"),
    ],
)
def test_files_that_are_not_text_are_refused_by_name(tmp_path, cache, name, content, message):
    if callable(content):
        content(tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_corpus(DataArguments(data_path=str(tmp_path / name)))
    assert not list(cache.rglob("*.*"))


def test_tables_that_are_read_as_text_are_said(tmp_path, messages):
    """By the beginning of the text, and of a folder by the names."""
    (tmp_path / "a.txt").write_bytes(json_lines())
    assert load_corpus(DataArguments(data_path=str(tmp_path / "a.txt"))).tobytes() == json_lines()
    assert "a.txt begins with a record of JSON and is read as plain text" in messages.text
    messages.clear()
    (tmp_path / "a.txt").write_bytes(b"{text}\n")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"id,text\n"))
    assert load_corpus(DataArguments(data_path=str(tmp_path))).tobytes() == b"{text}\n\nid,text\n"
    assert "its tables are read as plain text, names and escapes included: 1 (b.csv.gz)" in messages.text
    assert "begins with" not in messages.text


def test_the_folder_of_a_run_is_not_a_text(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "model.py").write_text("code that travels with a model")
    with pytest.raises(ValueError, match="data_path: .* is the folder of a training run"):
        load_corpus(DataArguments(data_path=str(tmp_path)))


def test_a_dataset_that_cannot_be_loaded_is_refused_by_its_field(tmp_path):
    for name, config, reason in ((f"{tmp_path}/none", None, "find"), (str(tmp_path), None, "data")):
        with pytest.raises(ValueError, match=f"dataset_name: .* cannot be read: .*{reason}"):
            load_corpus(DataArguments(dataset_name=name, dataset_config=config))


def test_a_column_of_numbers_in_a_dataset_is_named(tmp_path):
    Dataset.from_dict({"id": [1, 2]}).to_parquet(tmp_path / "part.parquet")
    with pytest.raises(ValueError, match="text_column 'id' holds 1 in row 1 of .*; it must hold text"):
        load_corpus(DataArguments(dataset_name=str(tmp_path), text_column="id"))


def test_what_is_left_out_of_a_folder_is_counted_and_named(tmp_path, messages):
    folder = tmp_path / "texts"
    (folder / "out" / "checkpoint-2").mkdir(parents=True)
    (folder / "other run").mkdir()
    (folder / "kept").mkdir()
    (folder / "a.txt").write_bytes(b"eins")
    (folder / "kept" / "b.gz").write_bytes(gzip.compress(b"zwei"))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "data.bin").write_bytes(b"a\0")
    (folder / "empty").touch()
    (folder / "broken").symlink_to("gone")
    (folder / "loop").symlink_to(".")
    (folder / "t.parquet").write_bytes(parquet(tmp_path))
    os.mkfifo(folder / "pipe")
    for own in ("out/card.md", "other run/config.json", "other run/model.safetensors"):
        (folder / own).write_bytes(b"of a run")
    for _ in range(2):
        corpus = load_corpus(DataArguments(data_path=str(folder)), output_dir=str(folder / "out"))
        assert corpus.tobytes() == b"eins\nzwei"
        (folder / "out" / "samples.jsonl").write_bytes(b"the run goes on")
    for part in (
        "binary: 2 (data.bin, picture.png)",
        "empty: 1 (empty)",
        "links to nothing: 1 (broken)",
        "links to folders: 1 (loop)",
        "no regular files: 1 (pipe)",
        "tables among texts: 1 (t.parquet)",
        "folders of training runs: 2 (other run, out)",
    ):
        assert part in messages.text
    with pytest.raises(ValueError, match="output_dir is data_path"):
        load_corpus(DataArguments(data_path=str(folder)), output_dir=str(folder / "kept" / ".."))


@pytest.mark.parametrize(
    ("encoding", "said"), [("utf-8", False), ("ascii", False), ("koi8-r", True), ("utf-16", True), ("utf-16-le", True)]
)
def test_text_that_is_not_utf8_is_said(tmp_path, messages, encoding, said):
    text = "a text. " if encoding == "ascii" else "жёлтый лес. "
    (tmp_path / "text").write_bytes((text * 99).encode(encoding))
    load_corpus(DataArguments(data_path=str(tmp_path / "text")))
    assert ("text is not UTF-8" in messages.text) is said


@pytest.mark.parametrize("change", ["rewritten", "cut", "grown", "replaced", "deleted"])
def test_a_corpus_that_changes_during_a_run_is_noticed_with_the_step(tmp_path, change):
    path = tmp_path / "text"
    path.write_bytes(b"a" * 10_000)
    split = split_corpus(load_corpus(DataArguments(data_path=str(path))), 0.9, 0.05)["train"]
    windows = RandomWindows(split, 16, 100, seed=0, windows_per_step=10)
    evaluated = ConsecutiveWindows(split, 16)
    checksum = split.sha256
    assert windows[42]["input_ids"].tolist() == [97] * 16
    if change in ("replaced", "deleted"):  # the file that was opened is still there, as it was
        path.rename(tmp_path / "old")
        if change == "replaced":
            path.write_bytes(b"b" * 10_000)
        assert windows[42]["input_ids"].tolist() == [97] * 16
        assert Split("train", split.data).sha256 == checksum
        return
    with path.open("r+b") as file:
        if change == "rewritten":
            os.utime(path, ns=(0, 0))  # a clock that is too coarse for this test must not hide it
            file.write(b"b" * 10_000)
        else:
            file.truncate(100 if change == "cut" else 20_000)
    with pytest.raises(
        data_module.CorpusChangedError, match="text was changed during the run, at step 5: 10,000 bytes"
    ):
        windows[42]
    with pytest.raises(data_module.CorpusChangedError, match="at an evaluation"):
        evaluated[0]
    with pytest.raises(data_module.CorpusChangedError):
        _ = Split("train", split.data).sha256


def test_what_a_killed_process_left_in_the_cache_is_removed(tmp_path, cache):
    folder = cache / "charformer"
    folder.mkdir(parents=True)
    (folder / "tmpkilled.incomplete").write_bytes(b"half a corpus")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a").write_bytes(b"text")
    with data_module._unfinished(folder) as busy:
        load_corpus(DataArguments(data_path=str(tmp_path / "texts")))
        assert [path.name for path in folder.glob("*.incomplete")] == [Path(busy.name).name]  # is being written


def test_names_that_are_not_utf8_are_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(path)
    with open(path + b"/\xff.txt", "wb") as file:
        file.write(b"text")
    arguments = DataArguments(data_path=os.fsdecode(path))
    assert load_corpus(arguments).tobytes() == b"text" and arguments.source == r"caf\xe9"
    assert load_corpus(DataArguments(data_path=os.fsdecode(path + b"/\xff.txt"))).tobytes() == b"text"


def test_windows_say_whether_their_text_is_utf8():
    assert ConsecutiveWindows(as_split("жёлтый лес, ".encode() * 9), 16).is_utf8
    assert not ConsecutiveWindows(as_split("жёлтый лес, ".encode("koi8-r") * 9), 16).is_utf8
