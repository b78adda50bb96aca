"""Files of JSON lines that grow while something runs; a kill leaves them whole but for their last line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic import explain_full_disk


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds a line for each row, and waits until the disk has them.

    Args:
        path: The file; it is made where there is none.
        rows: JSON objects.

    Raises:
        OSError: If the disk is full (errno ENOSPC), naming the file.
    """
    with explain_full_disk(path), path.open("ab") as file:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.write(text.encode("utf-8", "replace"))  # names of files may hold what is no text
        file.flush()
        os.fsync(file.fileno())


def cut_unfinished(path: Path) -> bool:
    """Cuts off what follows the last whole line; True if there was something."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole == content:
        return False
    with path.open("r+b") as file:
        file.truncate(len(whole))
    return True


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file; one that is just being written is not there yet.

    Raises:
        ValueError: If one is no JSON, with its number.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1].decode("utf-8", errors="replace")
    rows = []
    for number, line in enumerate(whole.split("\n"), start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"Line {number} of {path} is not JSON; delete the line.") from None
    return rows
