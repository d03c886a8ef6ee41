"""Files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError


def saving_failed_message(folder: str | os.PathLike, error: Exception) -> str:
    """What to tell the user when `folder` could not be written."""
    free = shutil.disk_usage(Path(folder).parent).free / 1e6
    return (
        f"saving {folder} failed: {error} ({free:,.0f} MB are free there now). What was written of it is removed;"
        " earlier checkpoints stay as they are"
    )


@contextmanager
def whole_files(folder: str | os.PathLike) -> Iterator[Path]:
    """A scratch folder whose files move into `folder` when the block is through, and disappear if it fails.

    Raises:
        OSError: If the files cannot be written, such as on a full disk.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".incomplete"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        for path in sorted(scratch.iterdir()):
            os.replace(path, folder / path.name)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(saving_failed_message(folder, error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when the block is through, and disappears if it fails.

    Raises:
        OSError: If the file cannot be written, or `path` is a folder or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file, and is not replaced")
    scratch = Path(tempfile.mkdtemp(prefix="_incomplete-", dir=path.parent))
    try:
        with open(scratch / "file", "wb") as file:
            yield file
        os.replace(scratch / "file", path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
