"""Files that appear whole, with the usual permissions, and never through a link."""

import os
import stat

import pytest

from charformer_training.files import append_line, remove, remove_scratch, whole_file, whole_files


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_follow_the_umask(tmp_path, umask):
    with whole_files(tmp_path) as scratch:
        (scratch / "weights").write_bytes(b"1")
        (scratch / "weights").chmod(0o600)  # as safetensors leaves it
        (scratch / "program").write_bytes(b"2")
        (scratch / "program").chmod(0o700)
    with whole_file(tmp_path / "single") as file:
        file.write(b"3")
    assert mode(tmp_path / "weights") == mode(tmp_path / "single") == 0o666 & ~umask
    assert mode(tmp_path / "program") == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program", "single", "weights"]


def test_what_fails_leaves_the_old_file_and_no_scratch(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file") as file:
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(OSError, match="saving .* failed: full"), whole_files(tmp_path) as scratch:
        (scratch / "file").write_text("half")
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_links_are_replaced_or_refused_and_never_followed(tmp_path):
    precious, folder = tmp_path / "precious", tmp_path / "folder"
    precious.write_text("mine")
    folder.mkdir()
    for name in ("one", "two", "three"):
        (folder / name).symlink_to(precious)
    with whole_files(folder) as scratch:
        (scratch / "one").write_text("new")
    with whole_file(folder / "two") as file:
        file.write(b"new")
    with pytest.raises(OSError):
        append_line(folder / "three", "new")
    assert precious.read_text() == "mine"
    assert (folder / "one").read_text() == (folder / "two").read_text() == "new"
    assert not (folder / "one").is_symlink() and not (folder / "two").is_symlink()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "leaf").write_text("mine")
    (folder / "_incomplete-x").symlink_to(tmp_path / "tree")
    remove_scratch(folder)
    assert not (folder / "_incomplete-x").is_symlink() and (tmp_path / "tree" / "leaf").exists()
    (folder / "linked").symlink_to(tmp_path / "tree")
    remove(folder / "linked")
    assert (tmp_path / "tree" / "leaf").exists()


def test_devices_are_not_replaced(tmp_path):
    with pytest.raises(OSError, match="is not a regular file"), whole_file("/dev/full"):
        pass
