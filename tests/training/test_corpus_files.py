"""Files that are no text, change or vanish while they are read, or hold records of JSON."""

import gzip
import json
import os

import pytest

from charformer_training import corpus_files
from charformer_training import data as data_module
from charformer_training.arguments import DataArguments
from charformer_training.data import load_corpus


pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    "text",
    ["BM is a name", "MZ begins", "OTTO", "II* x", "RIFF", "Der Größe", "ЪШ текст", "日本語", "1.\r\nabcdefghijklあ"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "koi8-r", "cp1252", "shift_jis"])
def test_text_in_any_encoding_is_none_of_the_other_kinds(tmp_path, messages, text, encoding):
    try:
        content = (text * 40).encode(encoding)
    except UnicodeEncodeError:
        return
    (tmp_path / "a.txt").write_bytes(content)
    assert load_corpus(DataArguments(data_path=str(tmp_path / "a.txt"))).tobytes() == content


def test_raw_bytes_are_read_and_said(tmp_path, messages):
    (tmp_path / "a.bin").write_bytes(b"a\0" * 99)
    assert len(load_corpus(DataArguments(data_path=str(tmp_path / "a.bin")))) == 198
    assert "a.bin is not UTF-8, so its characters cannot be counted" in messages.text


@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize("moment", ["_why_not", "documents", "changed"])
def test_a_file_that_is_deleted_or_changed_while_it_is_read_is_named(tmp_path, cache, monkeypatch, place, moment):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.jsonl").write_text('{"text": "x"}\n' * 9)
    module = corpus_files if moment == "_why_not" else data_module
    name = "documents" if moment == "changed" else moment
    original = getattr(module, name)

    def meddle(path, *args):
        found = original(path, *args)
        if path.name == ("a.jsonl" if place == "file" else "b.jsonl"):
            path.write_text("other") if moment == "changed" else path.unlink()
        return found

    monkeypatch.setattr(module, name, meddle)
    path = folder / "a.jsonl" if place == "file" else folder
    message = (
        r"[ab].jsonl" if moment == "changed" else r"[ab].jsonl cannot be read: it is gone, deleted or renamed while"
    )
    if (place, moment) == ("file", "_why_not"):
        path.unlink()
        message = "data_path: there is no file or folder '.*a.jsonl'"
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        load_corpus(DataArguments(data_path=str(path)))
    assert "Errno" not in str(raised.value) and not list(cache.rglob("*.*"))


def test_a_text_that_grows_while_it_is_read_is_named(tmp_path, cache, monkeypatch):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / name).write_text("x" * 99)
    original = corpus_files.documents

    def grow(path, *args):
        yield from original(path, *args)
        with path.open("a") as file:
            file.write("more")

    monkeypatch.setattr(data_module, "documents", grow)
    with pytest.raises(data_module.CorpusChangedError, match="a was changed while it was read"):
        load_corpus(DataArguments(data_path=str(tmp_path / "texts")))
    assert not list(cache.rglob("*.*"))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    walk = os.walk

    def refuse(folder, onerror):
        onerror(PermissionError(13, "Permission denied", str(folder / "closed")))
        return walk(folder)

    (tmp_path / "a").write_text("text")
    monkeypatch.setattr(os, "walk", refuse)
    _, others = corpus_files.files_of_folder(tmp_path)
    assert corpus_files.described(others) == "unreadable folders: 1 (closed)"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x" * 300, "data_path is 'xxx.* 300 bytes long; a path has"),
        ("x\0y", "a path holds no zero byte"),
        ("~no-such-user/x", "no home directory of this user"),
        ("/dev/null", "data_path: /dev/null is a device or a pipe"),
        ("https://example.org/a.txt", "It looks like an address: nothing is downloaded"),
    ],
)
def test_a_path_that_can_be_no_text_is_refused_with_the_field(path, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_corpus(DataArguments(data_path=path))


def test_a_column_that_would_not_be_read_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("body,id\nsome text,1\n")
    load_corpus(DataArguments(data_path=str(tmp_path), text_column="body"))  # the control
    (tmp_path / "b.txt").write_text("text")
    for path in (tmp_path, tmp_path / "b.txt"):
        with pytest.raises(ValueError, match="text_column is 'body'; it must be left out: .* (tables|table)"):
            load_corpus(DataArguments(data_path=str(path), text_column="body"))


RECORDS = "".join(json.dumps({"text": json.dumps({"a": number})}) + "\n" for number in range(2)).encode()


@pytest.mark.parametrize("place", ["file", "compressed", "folder", "dataset"])
def test_texts_of_a_table_may_be_json(tmp_path, messages, place):
    name = "a.jsonl.gz" if place == "compressed" else "a.jsonl"
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_bytes(gzip.compress(RECORDS) if place == "compressed" else RECORDS)
    folder = str(tmp_path / "texts")
    if place == "dataset":
        arguments = DataArguments(dataset_name=folder)
    else:
        arguments = DataArguments(data_path=folder if place == "folder" else f"{folder}/{name}")
    assert load_corpus(arguments).tobytes() == b'{"a": 0}\n{"a": 1}'
    assert "record of JSON" not in messages.text


@pytest.mark.parametrize("place", ["compressed", "folder"])
def test_records_in_a_compressed_text_or_a_folder_are_said(tmp_path, messages, place):
    (tmp_path / "texts").mkdir()
    path = tmp_path / "texts" / "a.txt.gz"
    path.write_bytes(gzip.compress(RECORDS))
    arguments = DataArguments(data_path=str(path.parent if place == "folder" else path))
    assert load_corpus(arguments).tobytes() == RECORDS
    assert "begins with a record of JSON and is read as plain text" in messages.text
    messages.clear()
    load_corpus(arguments, write=False)
    assert "record of JSON" not in messages.text
