"""Files that a command writes in the end: seen to be writable before the work, and said in one sentence."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from eval.answers import InputError
from sparse_vlm.atomic import write_atomic


def check_output(path: Path | None, option: str, others: Iterable[Path | None] = ()) -> None:
    """Sees that a file can be written, without leaving anything behind.

    Args:
        path: The file; None is not asked for.
        option: How the caller names it, for messages.
        others: Files that the same command reads, or writes besides; folders may be among them.

    Raises:
        InputError: If it is a folder or one of the others, or its folder cannot be made or written to.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; name a file.")
        if path.resolve() in [other.resolve() for other in others if other is not None]:
            raise InputError(f"{option} {path} is named for something else, too; name another file.")
        folder = path.resolve().parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written: {error.strerror or error}.") from None


def write_output(path: Path, content: bytes | str, option: str) -> None:
    """Writes a file whole or not at all.

    Args:
        path: The file.
        content: Of it.
        option: How the caller names it, for messages.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        write_atomic(path, content)
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written: {error.strerror or error}.") from None
