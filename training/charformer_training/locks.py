"""A lock that keeps a folder to one run, for as long as any process of the run lives."""

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
    fcntl = None  # type: ignore[assignment]  # a module on other systems

logger = logging.getLogger(__name__)

LOCK_FILE = "_run.lock"  # pushes to the Hub leave out what begins with an underscore
_held: dict[Path, int] = {}


@contextmanager
def run_lock(folder: str | os.PathLike[str], first: bool = True) -> Iterator[bool]:
    """Keep other runs out of `folder` while the block runs. Yields whether an earlier run was killed.

    Each process of a run holds a lock, which the system releases however the process ends. So a run counts until its last
    process is gone, even if its launcher has died. Of several processes, one calls this with `first` before the others.
    Forked processes do not inherit the lock. A process that already holds it may call this again.

    On network file systems the server must support POSIX locks; NFS does if its lock daemon runs. If the file system has
    no locks, a warning says that a second run would not be noticed. If clients cache locks locally, nothing can warn.

    Raises:
        FileExistsError: If another run holds the lock. The message says which.
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
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        reason = f"{LOCK_FILE} there is a link" if path.is_symlink() else error.strerror
        raise OSError(f"output_dir {folder} cannot be written to: {reason}") from error
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
    """Take the lock. Returns what an earlier run wrote into it, if that run was killed."""
    try:
        # Exclusive at first, to keep out other runs; then shared with the other processes of this one, in one step.
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
