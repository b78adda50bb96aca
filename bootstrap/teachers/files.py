"""Reading what a teacher's folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .spec import TeacherError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from disk.

    Raises:
        TeacherError: if it is not one.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TeacherError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise TeacherError(f"{file} holds a {type(values).__name__}, not a JSON object")
    return values


def find_weights(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of ``names`` that is in ``folder``.

    Raises:
        TeacherError: if none is.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise TeacherError(f"folder {folder} has no weights: expected one of {', '.join(names)}")
