"""LLaVA's chat records: what they may say, and what is wrong with one that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..templates import IMAGE_MARK

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class BadRecordError(ValueError):
    """One training record cannot be used; the sentence names the record and its file."""


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        where: the record and its file, for messages.
        messages: ``{"role", "content"}``, beginning with the user and ending with the assistant; pictures
            are ``<image>`` marks in the user's text.
        pictures: names of the pictures, in the order of their marks.
    """

    where: str
    messages: tuple[dict[str, str], ...]
    pictures: tuple[str, ...]


def describe(raw: Any, index: int, file: str | Path) -> str:
    """How messages name a record."""
    name = raw.get("id") if isinstance(raw, Mapping) else None
    return f"record {index}{f' (id {name!r})' if name is not None else ''} of {file}"


def parse_record(raw: Any, where: str) -> Record:
    """Read one record of LLaVA's chat JSON.

    A picture alone in its turn is moved to the turn's front, as LLaVA does; several stay where they stand.

    Raises:
        BadRecordError: naming the record and what is wrong with it.
    """
    if not isinstance(raw, Mapping):
        raise BadRecordError(f"{where} is no JSON object")
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRecordError(f"{where} has an empty conversation")
    pictures = _read_pictures(raw, where)
    messages: list[dict[str, str]] = []
    for turn in turns:
        role = _ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, Mapping) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
        if role is None or not isinstance(text, str):
            raise BadRecordError(
                f"{where} has a turn that is not {{'from': 'human' or 'gpt', 'value': text}}: {turn!r:.120}"
            )
        if not messages and role == "assistant":
            continue  # LLaVA skips an answer that nobody asked for
        if messages and messages[-1]["role"] == role:
            raise BadRecordError(f"{where} has two turns of the {role} in a row")
        messages.append({"role": role, "content": _place_marks(text) if role == "user" else text.strip()})
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not any(answers):
        raise BadRecordError(f"{where} has no answer to learn from")
    if any(IMAGE_MARK in answer for answer in answers):
        raise BadRecordError(f"{where} has an {IMAGE_MARK} mark in an answer")
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if marks != len(pictures):
        raise BadRecordError(
            f"{where} has {marks} {IMAGE_MARK} mark{'s' * (marks != 1)} for {len(pictures)} "
            f"picture{'s' * (len(pictures) != 1)}"
        )
    return Record(where, tuple(messages), pictures)


def _read_pictures(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    image = raw.get("image", raw.get("images"))
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise BadRecordError(
            f"{where} names its picture as {image!r:.80}; expected a path or a list of paths"
        )
    return tuple(names)


def _place_marks(text: str) -> str:
    if text.count(IMAGE_MARK) != 1:
        return text.strip()
    return f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}".strip()
