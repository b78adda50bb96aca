"""Shapes of JSON values: functions of a value and its place, which raise where the value does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

Shape = Callable[[Any, str], None]


class MisfitError(ValueError):
    """A value that is not what its place needs; the message names the place."""


def _misfit(place: str, wanted: str, value: Any) -> MisfitError:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 40 else f"{shown[:40]}…"
    return MisfitError(f"{place or 'it'} must be {wanted}, and is {shown}")


def refuse_infinite(value: Any, place: str = "") -> None:
    """Python's JSON may hold NaN and infinity, which no figure may be, read or not."""
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_infinite(inner, _below(place, key))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            refuse_infinite(inner, f"{place}[{position}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise _misfit(place, "a finite number", value)


def _below(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def text(value: Any, place: str) -> None:
    """A string."""
    if not isinstance(value, str):
        raise _misfit(place, "text", value)


def scalar(value: Any, place: str) -> None:
    """A string or a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _misfit(place, "text or a number", value)


def identifier(value: Any, place: str) -> None:
    """A string or a whole number."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _misfit(place, "text or a whole number", value)


def flag(value: Any, place: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise _misfit(place, "true or false", value)


def number(least: float | None = None, most: float | None = None, above: float | None = None) -> Shape:
    """A number in bounds; `above` is not in them itself."""

    def check(value: Any, place: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _misfit(place, "a number", value)
        if least is not None and value < least:
            raise _misfit(place, f"at least {least:g}", value)
        if most is not None and value > most:
            raise _misfit(place, f"at most {most:g}", value)
        if above is not None and value <= above:
            raise _misfit(place, f"more than {above:g}", value)

    return check


def count(value: Any, place: str) -> None:
    """A whole number, zero or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _misfit(place, "a whole number of at least 0", value)


def maybe(shape: Shape) -> Shape:
    """The shape, or null."""

    def check(value: Any, place: str) -> None:
        if value is not None:
            shape(value, place)

    return check


def each(shape: Shape, least: int = 0) -> Shape:
    """A list of values of one shape, so many at least."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, list):
            raise _misfit(place, "a list", value)
        if len(value) < least:
            raise _misfit(place, f"a list of at least {least}", value)
        for place_in_list, inner in enumerate(value):
            shape(inner, f"{place}[{place_in_list}]")

    return check


def by_name(shape: Shape, least: int = 0) -> Shape:
    """An object whose values have one shape, so many at least."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise _misfit(place, "an object", value)
        if len(value) < least:
            raise _misfit(place, f"an object of at least {least}", value)
        for key, inner in value.items():
            shape(inner, _below(place, key))

    return check


def fields(optional: Mapping[str, Shape] | None = None, /, **needed: Shape) -> Shape:
    """An object with the needed keys and perhaps the optional ones; others may be there too."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise _misfit(place, "an object", value)
        lacking = [key for key in needed if key not in value]
        if lacking:
            raise MisfitError(f"{place or 'it'} lacks {', '.join(lacking)}")
        for key, shape in {**(optional or {}), **needed}.items():
            if key in value:
                shape(value[key], _below(place, key))

    return check
