"""Write files that appear whole or not at all, with the usual permissions of new files. Links are not followed."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError


SCRATCH_PREFIX = "_incomplete-"  # pushes to the Hub leave out what begins with an underscore


def saving_failed_message(folder: str | os.PathLike[str], error: Exception) -> str:
    """What to tell the user when `folder` could not be written."""
    free = shutil.disk_usage(Path(folder).parent).free / 1e6
    return (
        f"saving {folder} failed: {error} ({free:,.0f} MB are free there now). The incomplete files are removed;"
        " earlier checkpoints stay unchanged"
    )


@contextmanager
def whole_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder. Its files move into `folder` when the block ends, and are deleted if it fails.

    Raises:
        OSError: If the files cannot be written, such as on a full disk.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=folder))
    try:
        yield scratch
        give_default_permissions(scratch)
        for path in sorted(scratch.iterdir()):
            os.replace(path, folder / path.name)  # a link of that name is replaced, not followed
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(saving_failed_message(folder, error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to. It replaces `path` when the block ends, and is deleted if it fails.

    Raises:
        OSError: If the file cannot be written, or `path` is a folder or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file, so it is not replaced")
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=path.parent))
    try:
        with open(scratch / "file", "wb") as file:
            yield file
        os.replace(scratch / "file", path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_regular(folder: Path, names: Iterable[str], appended: Collection[str] = ()) -> None:
    """Refuse a folder in which something else has the name of a file that will be written.

    A link is replaced, unless the file is one of those that are `appended` to.

    Raises:
        FileExistsError: Names it, and says what it is.
    """
    for name in names:
        path = folder / name
        if path.is_symlink() and name in appended:
            raise FileExistsError(f"{path} is a link; links are not followed, so delete it or give another output_dir")
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a device or a pipe"
            raise FileExistsError(f"{path} is {kind}; a run writes a file of this name, so give another output_dir")


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append a line to a text file, in UTF-8.

    Raises:
        OSError: If it cannot be written, or `path` is a link.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "ab") as file:
        file.write(line.encode("utf-8", "replace") + b"\n")


def remove(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_scratch(folder: Path) -> None:
    """Delete unfinished files that a killed process left. No other process may be writing to `folder`."""
    for left in folder.glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):
            remove(left)


def give_default_permissions(folder: Path) -> None:
    """Apply the umask to files below `folder` that only their owner may read, like those of safetensors."""
    probe = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=folder))
    try:
        # os.umask() can only be read by setting it, which would affect other threads for a moment.
        (probe / "file").touch()
        mode = stat.S_IMODE((probe / "file").stat().st_mode)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o600 != mode:
            path.chmod(mode)
