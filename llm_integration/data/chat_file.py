"""The raw records of a chat file, kept as they are written and parsed one at a time."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")


class ChatFile:
    """A chat file: a JSON list of records, or one JSON object a line (.jsonl).

    Parsed, LLaVA's mixture of 665,000 conversations would take several times its size on disk, in every
    process, and once more in each of their loader workers: Python counts references inside the objects, so
    that a fork's pages are copied by merely reading them. The text is one object, which forks share.

    Args:
        path: the file.

    Raises:
        ValueError: if it is missing, or neither.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"there is no chat file {path}")
        self.path = path
        # A character a byte: what structures JSON is ASCII, which no other character's bytes hold in UTF-8.
        self._text = path.read_bytes().decode("latin-1")
        self._places = array("Q")  # start and end of each record
        found = _find_lines(self._text) if path.suffix == ".jsonl" else _find_items(self._text, path)
        try:
            for start, end in found:
                self._places.append(start)
                self._places.append(end)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error

    def __len__(self) -> int:
        return len(self._places) // 2

    def __getitem__(self, index: int) -> Any:
        """One record, parsed; UnicodeDecodeError if it is no UTF-8."""
        start, end = self._places[2 * index : 2 * index + 2]
        return json.loads(self._text[start:end].encode("latin-1").decode("utf-8"))


def _find_lines(text: str) -> Iterator[tuple[int, int]]:
    """Where the lines of a text that are not empty begin and end; JSONDecodeError if one is no JSON."""
    start = 0
    while start < len(text):
        # Only "\n" ends a line: a turn may hold U+2028 and the like.
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        if _skip(text, start) < end:
            json.loads(text[start:end])
            yield start, end
        start = end + 1


def _find_items(text: str, path: Path) -> Iterator[tuple[int, int]]:
    """Where the items of a JSON list begin and end; ValueError, or JSONDecodeError, if it is none."""
    scan = json.JSONDecoder().raw_decode
    place = _skip(text, 0)
    if not text.startswith("[", place):
        raise ValueError(f"{path} must hold a list of records, found {type(json.loads(text)).__name__}")
    place = _skip(text, place + 1)
    more = not text.startswith("]", place)
    while more:
        _, end = scan(text, place)
        yield place, end
        place = _skip(text, end)
        more = text.startswith(",", place)
        if more:
            place = _skip(text, place + 1)
        elif not text.startswith("]", place):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    place = _skip(text, place + 1)
    if place < len(text):
        raise json.JSONDecodeError("Extra data", text, place)


def _skip(text: str, place: int) -> int:
    """The place behind white space."""
    found = _SPACE.match(text, place)
    return found.end() if found else place
