import pytest

from charformer_training.terminal import printable


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
