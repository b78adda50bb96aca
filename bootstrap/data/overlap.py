"""Whether two sources lie in the same files."""

from __future__ import annotations

from pathlib import Path

from bootstrap.data.concat import ConcatSource
from bootstrap.data.folder import FolderSource
from bootstrap.data.source import AnySource, OnDisk


def find_shared(source: AnySource, other: AnySource) -> Path | None:
    """A file that two sources have in common, by whatever path or link; None if there is none."""
    if not isinstance(source, OnDisk) or not isinstance(other, OnDisk):
        return None
    theirs = {identity for path in source.files() if (identity := _identify(path)) is not None}
    return next((path for path in other.files() if _identify(path) in theirs), None)


def check_outside(out: Path, source: AnySource) -> None:
    """See that what is written to a directory does not become part of a source.

    Args:
        out: where pictures will be written.
        source: what is trained on.

    Raises:
        ValueError: if the directory lies in a folder that is searched for pictures.
    """
    for folder in _searched_folders(source):
        try:
            below = out.resolve().relative_to(folder.resolve())
        except ValueError:
            continue
        if not any(part.startswith(".") for part in below.parts):
            raise ValueError(
                f"out={out} lies in the picture folder {folder}, so the run would train on the pictures that "
                "it draws: name a directory elsewhere"
            )


def _searched_folders(source: AnySource) -> list[Path]:
    if isinstance(source, ConcatSource):
        return [folder for part in source.sources for folder in _searched_folders(part)]
    return [source.folder] if isinstance(source, FolderSource) else []


def _identify(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:  # reading it says so
        return None
    return status.st_dev, status.st_ino
