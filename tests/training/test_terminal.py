import pytest

from charformer_training.terminal import error_message, one_line, printable


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
