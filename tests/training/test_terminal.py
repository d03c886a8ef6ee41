import contextlib
import io
import logging
import os
import sys

import pytest

from charformer_training.terminal import error_message, one_line, printable, use_safe_streams


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\x9b2J\r\x07\x00", "\\x9b2J\\r\\x07\\x00"),
        ("\u202e\u2028", "\\u202e\\u2028"),  # turns the direction of a line, ends one
        ("täglich\n\tдень \ufffd", "täglich\n\tдень \ufffd"),
    ],
    ids=ascii,
)
def test_printed_text_cannot_drive_a_terminal(text, shown):
    assert printable(text) == shown


def test_a_name_stays_on_its_line_whatever_its_bytes_are():
    assert one_line("caf\udce9\n\tä\ud800") == "caf\\xe9\\n\\tä\\ud800"


def test_an_error_of_a_loaders_worker_is_its_last_line():
    text = "Caught X in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\nX: the text: gone\n"
    assert error_message(ValueError(text)) == "the text: gone"
    assert error_message(ValueError("two\nlines\x1b[2J")) == "two\nlines\\x1b[2J"


def test_what_libraries_log_cannot_drive_a_terminal(monkeypatch):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    for _ in range(2):
        use_safe_streams()
    assert len(handler.filters) == 1
    logging.getLogger("transformers.of_a_test").warning("\x1b[31munknown\x1b[0m %s", "\x1b[2J")
    assert stream.getvalue() == "unknown \\x1b[2J\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_run_outlives_the_disk_of_its_log(monkeypatch, capfd, unbuffered):
    with open("/dev/full", "wb", buffering=0) as device:
        stream = io.TextIOWrapper(device if unbuffered else io.BufferedWriter(device), write_through=unbuffered)
        for name in ("stdout", "__stdout__"):
            monkeypatch.setattr(sys, name, stream)
        use_safe_streams()
        with pytest.raises(OSError, match="No space left"):  # what other programs print is their result
            print("a", flush=True)
        use_safe_streams(for_a_run=True)
        for line in "bc":
            print(line, flush=True)
        assert capfd.readouterr().err.count("What is printed from here on is lost (No space left on device)") == 1
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            stream.close()
