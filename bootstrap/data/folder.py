"""A folder of pictures, searched recursively."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from bootstrap.data.decode import EXTENSIONS, BadPictureError
from bootstrap.data.names import PackedNames
from bootstrap.data.source import digest
from bootstrap.data.tars import is_tar_name

_log = logging.getLogger(__name__)


class FolderSource:
    """Every picture file below a folder, sorted by path.

    Links are followed, once; names that start with a dot are left out.

    Args:
        folder: where to look.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no picture in it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        self.title = str(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"the picture folder {self.title!r} does not exist or is not a folder")
        self.paths = PackedNames(sorted(walk_pictures(self.folder)))
        self._fingerprint: str | None = None
        if not self.paths:
            raise ValueError(
                f"no pictures in folder {self.title!r}: looked in it and below for "
                f"{' '.join(EXTENSIONS)}{_hint(self.folder)}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        try:
            return (self.folder / self.paths[index]).read_bytes()
        except OSError as error:
            raise BadPictureError("unreadable", error.strerror or str(error)) from error

    def name(self, index: int) -> str:
        """Path below the folder."""
        return self.paths[index]

    def files(self) -> Iterator[Path]:
        """The pictures' paths."""
        return (self.folder / path for path in self.paths)

    def fingerprint(self) -> str:
        """Of all paths and sizes, as they were when it was first asked for."""
        if self._fingerprint is None:
            self._fingerprint = digest(f"{path} {self._measure(path)}" for path in self.paths)
        return self._fingerprint

    def _measure(self, path: str) -> int:
        try:
            return (self.folder / path).stat().st_size
        except OSError:  # a link to nothing; reading it says so
            return -1


def _hint(folder: Path) -> str:
    """What a folder without pictures holds instead, and how to read that."""
    tar = next((path for path in sorted(folder.rglob("*")) if is_tar_name(path.name)), None)
    if tar is not None and tar.parent != folder:  # tars are looked for in the folder itself
        return f"; {tar.parent} holds tars: set data.source to it"
    if tar is not None:
        return "; it holds tars: set data.kind to tars"
    for pattern, what in (("*.parquet", "parquet files"), ("*.arrow", "arrow files")):
        if any(folder.rglob(pattern)):
            return f"; it holds {what}: set data.kind to hf"
    return ""


def _warn(error: OSError) -> None:
    _log.warning("%s cannot be read (%s): its pictures are left out", error.filename, error.strerror)


def walk_pictures(folder: Path) -> Iterator[str]:
    """Every picture file below a folder, as a path from there, in no order; see :class:`FolderSource`."""
    seen: set[tuple[int, int]] = set()
    for directory, below, files in os.walk(folder, followlinks=True, onerror=_warn):
        status = Path(directory).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        above = Path(directory).relative_to(folder).parts
        for name in files:
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS):
                yield "/".join((*above, name))  # a Path of each of millions takes its time
