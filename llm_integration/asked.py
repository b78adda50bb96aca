"""What many questions are asked about: pictures on the command line, or a file of questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .templates import IMAGE_MARK

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_OURS = ("answer", "skipped")


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        row: what its line in the answers begins with: ``image``, ``question``, and whatever else its own had.
        pictures: files.
    """

    row: dict[str, Any]
    pictures: tuple[Path, ...]


def find_pictures(places: Sequence[Path], prompt: str) -> list[Asked]:
    """One question about each of many pictures.

    Args:
        places: pictures, and folders; of a folder all pictures at any depth, in the order of their names.
        prompt: the question.

    Raises:
        ValueError: if a place is missing, a folder holds no picture, or the prompt is none.
    """
    _check_words(prompt, "--prompt")
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            if not place.exists():
                raise ValueError(f"--images {place}: there is no picture and no folder of that name")
            found.append(place)
            continue
        inside = [path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
        shown = sorted(path for path in inside if not path.name.startswith("."))
        if not shown:
            raise ValueError(f"--images {place}: the folder holds no picture ({', '.join(SUFFIXES)})")
        found += shown
    return [Asked({"image": str(path), "question": prompt}, (path,)) for path in found]


def read_questions(file: Path, folders: Sequence[Path] | None = None) -> list[Asked]:
    """The questions of a file, a JSON object a line.

    ``question`` is the text; ``image`` a path, a list of paths, or null (or nothing) for a question without
    picture. All else is kept for the answer's line.

    Args:
        file: JSON lines.
        folders: one folder that paths start from; by default the file's.

    Raises:
        ValueError: naming the line and what is wrong with it.
    """
    if folders is not None and (len(folders) > 1 or not folders[0].is_dir()):
        raise ValueError("--images beside --questions is the one folder that their pictures lie in")
    if not file.is_file():
        raise ValueError(f"--questions {file}: there is no such file")
    folder = folders[0] if folders else file.parent
    asked = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            asked.append(_read_question(line, f"line {number} of {file}", folder))
    if not asked:
        raise ValueError(f"--questions {file}: it holds no question")
    return asked


def _read_question(line: bytes, where: str, folder: Path) -> Asked:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise ValueError(f'{where} is not {{"image": path, "question": text}}: {line[:80]!r}')
    image = row.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"{where} names its picture as {image!r:.80}; expected a path, a list of paths, or null"
        )
    taken = [name for name in _OURS if name in row]
    if taken:
        raise ValueError(f"{where} has {taken[0]!r}, which is what its answer's line gets: rename it")
    _check_words(row["question"], where)
    return Asked({"image": image, **row}, tuple(folder / name for name in names))


def _check_words(question: str, where: str) -> None:
    if not question.strip():
        raise ValueError(f"{where}: the question is empty")
    if IMAGE_MARK in question:
        raise ValueError(f"{where}: leave {IMAGE_MARK} out of the question; its pictures come before it")
