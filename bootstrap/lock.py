"""One process at a time in a run directory."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK_FILE = ".lock"


@contextmanager
def lock_directory(folder: Path) -> Iterator[None]:
    """Keep other processes out of a directory until the block, or this process, ends.

    The lock is advisory and belongs to the process (``fcntl.lockf``): no worker that outlives it keeps it.
    Where the system or the file system knows no locks, nothing is locked.

    Args:
        folder: an existing directory; the lock is a file in it, which stays.

    Raises:
        ValueError: if another process holds the lock.
    """
    path = folder / LOCK_FILE
    with path.open("a+", encoding="utf-8") as file:
        if not _take(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{folder} is in use by {holder}: wait for it, stop it, or name another directory with out=…"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _take(file: Any) -> bool:
    """Whether the lock is ours, or there are no locks here."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
