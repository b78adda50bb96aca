"""Pictures with what is known of them: class folders, numbered names, a file of labels, CIFAR."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from bootstrap.data.decode import EXTENSIONS, decode_picture
from eval.answers import InputError, name_some, read_json

_NUMBERED = re.compile(r"(\d+)_.+")
_MAX_PIXELS = 80_000_000


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures in a fixed order.

    Attributes:
        source: Where they come from.
        names: One each.
        read: Opens the picture of a place; raises bootstrap's `BadPictureError` for a broken one.
        labels: Class index of each; None where none are known.
        classes: Class names that the files themselves give, in the order of the labels.
        stamp: Changes when a picture may have changed.
        prompts: The template set (`eval.encoder.classes`) that suits them.
    """

    source: str
    names: tuple[str, ...]
    read: Callable[[int], Image.Image]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    stamp: str = ""
    prompts: str = "simple"

    def first(self, limit: int | None) -> Pictures:
        """The first so many; of labelled pictures, evenly over the classes."""
        if limit is None or limit >= len(self.names):
            return self
        places = list(range(limit))
        if self.labels is not None:
            seen: dict[int, int] = {}
            rank = []
            for place, label in enumerate(self.labels):
                rank.append((seen.get(label, 0), place))
                seen[label] = seen.get(label, 0) + 1
            places = sorted(place for _, place in sorted(rank)[:limit])
        return self.at(places)

    def at(self, places: Sequence[int]) -> Pictures:
        """Some of them."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[place] for place in places),
            read=lambda place: self.read(places[place]),
            labels=None if self.labels is None else tuple(self.labels[place] for place in places),
        )


def load_pictures(source: Path, labels: Path | None = None) -> Pictures:
    """Pictures of a folder, with their labels where the folder or a file says them.

    Args:
        source: A folder of class folders; a folder of pictures named like `207_golden_retriever.jpg`; or any
            folder of pictures, with `labels`. Hidden files and folders are left out.
        labels: JSON of file names and class indices, or with these under "labels" and names under "classes".

    Raises:
        InputError: If there are no pictures, or labels do not fit them.
    """
    if not source.is_dir():
        raise InputError(f"There is no folder of pictures {source}.")
    files = sorted(
        path
        for path in source.rglob("*")
        if path.suffix.lower() in EXTENSIONS and not _is_hidden(path.relative_to(source)) and path.is_file()
    )
    if not files:
        raise InputError(f"{source} holds no pictures ({', '.join(EXTENSIONS)}).")
    names = tuple(path.relative_to(source).as_posix() for path in files)
    known, classes = _own_labels(names) if labels is None else _read_labels(labels, source, names)
    return Pictures(str(source), names, reader_of(files), known, classes, stamp_of(files))


def _is_hidden(path: Path) -> bool:
    """Whether a file is no picture of the folder's own: previews, thumbnails, bins, leavings of archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def reader_of(files: Sequence[Path]) -> Callable[[int], Image.Image]:
    """Opens a file by its place."""
    return lambda place: decode_picture(files[place].read_bytes(), _MAX_PIXELS)


def stamp_of(files: Sequence[Path]) -> str:
    """Changes when a file is replaced."""
    marks = [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in files)]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()


def _own_labels(names: tuple[str, ...]) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    # One folder with everything in it is no class.
    if all(folders) and len(set(folders)) > 1:
        counted = all(folder.isascii() and folder.isdigit() for folder in folders)
        classes = tuple(sorted(set(folders), key=int if counted else None))  # 10 after 9
        index = {name: place for place, name in enumerate(classes)}
        return tuple(index[folder] for folder in folders), classes
    numbers = [_NUMBERED.fullmatch(Path(name).stem) for name in names]
    if all(numbers):
        return tuple(int(match[1]) for match in numbers if match), None
    return None, None


def _read_labels(
    path: Path, source: Path, names: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    table = read_json(path)
    if not isinstance(table, dict):
        raise InputError(f"{path} must be an object of file names and class indices.")
    listed = table.get("classes") if isinstance(table.get("labels"), dict) else None
    if isinstance(table.get("labels"), dict):
        table = table["labels"]
    missing = [name for name in names if name not in table]
    if missing:
        raise InputError(
            f"{path} says nothing about {len(missing)} pictures of {source} ({name_some(missing)})."
        )
    top = len(listed) if listed else None
    for name in names:
        label = table[name]
        if type(label) is not int or label < 0 or (top is not None and label >= top):
            limit = "" if top is None else f" below {top}"
            raise InputError(f"{path}: the label of {name} must be a class index{limit}, and is {label!r}.")
    return tuple(table[name] for name in names), tuple(str(name) for name in listed) if listed else None
