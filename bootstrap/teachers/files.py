"""Reading what a teacher's folder holds."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from .spec import TeacherError

# Of the complaints about weights that belong to another model, of which torch has one for every tensor.
_MOST_LINES, _LONGEST_LINE = 4, 200


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


def describe_misfit(error: Exception) -> str:
    """The beginning of what a library says about weights that do not fit, in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    shown = [textwrap.shorten(line, _LONGEST_LINE, placeholder=" ...") for line in lines[:_MOST_LINES]]
    more = f" (and {len(lines) - _MOST_LINES} more lines)" if len(lines) > _MOST_LINES else ""
    return " ".join(shown) + more
