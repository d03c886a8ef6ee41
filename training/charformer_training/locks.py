"""One run in a folder at a time, for as long as any of its processes lives."""

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = "_run.lock"  # pushes to the Hub leave out what begins with an underscore
_held: dict[Path, int] = {}


@contextmanager
def run_lock(folder: str | os.PathLike[str], first: bool = True) -> Iterator[bool]:
    """Keep other runs out of `folder` while the block runs; yields whether an earlier run ended without a word.

    Each process of a run holds a lock of its own, which the system releases with the process, however that ends: so a
    run whose launcher died is still seen, and one that was killed is not. Of several processes one calls this with
    `first`, before the others. Locks are not handed on to forked processes, and a process that holds one gets it again.

    On network file systems the server must support POSIX locks (NFS does, if its lock daemon runs). Where a file system
    has no locks, or clients cache them by themselves, two runs cannot be told apart; the former is said.

    Raises:
        FileExistsError: If another run holds the lock; says which.
        OSError: If the lock file cannot be written, or is a link.
    """
    folder = Path(folder).resolve()
    path = folder / LOCK_FILE
    if fcntl is None or path in _held:
        yield False
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"output_dir {folder} cannot be made: {error.strerror}") from error
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        earlier = _lock(descriptor, path, first)
        _held[path] = descriptor
        try:
            yield earlier is not None
        finally:
            if first:
                os.ftruncate(descriptor, 0)  # ended by itself, if with an error
    finally:
        _held.pop(path, None)
        os.close(descriptor)


def _lock(descriptor: int, path: Path, first: bool) -> dict[str, Any] | None:
    """Take the lock; returns what an earlier run wrote that did not get to its end."""
    try:
        # Exclusive at first: the others of this run share it. (This changes from one to the other in one step.)
        fcntl.lockf(descriptor, (fcntl.LOCK_EX if first else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise FileExistsError(
                f"another run is at work in output_dir {path.parent}{_told(_read(descriptor))}; wait until it is done, stop"
                " it (each of its processes), or give another output_dir"
            ) from None
        logger.warning(
            "%s: this file system has no locks (%s), so a second run here would not be noticed", path, error
        )
        return None
    if not first:
        return None
    earlier = _read(descriptor)
    mine = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat("T", "seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(mine).encode(), 0)
    with contextlib.suppress(OSError):
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return earlier


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _told(run: dict[str, Any] | None) -> str:
    return "" if run is None else f" (process {run.get('pid')} on {run.get('host')}, since {run.get('since')})"
