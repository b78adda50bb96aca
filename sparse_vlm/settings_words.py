"""How settings are described in error messages: what a type accepts, what a value is."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Path: "a path",
}
_LONGEST = 200  # characters of a value that are shown


def describe_type(hint: Any) -> str:
    """Says in words what a settings field of this type accepts."""
    members = members_of(hint)
    if len(members) > 1:
        return " or ".join(describe_type(member) for member in members)
    origin, args = get_origin(hint) or hint, get_args(hint)
    if hint in _NAMES:
        return _NAMES[hint]
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in args)
    if origin in (tuple, list):
        return "a list"
    if dataclasses.is_dataclass(hint):
        return "a mapping with the keys " + ", ".join(f.name for f in dataclasses.fields(hint) if f.init)
    return "a mapping" if origin in (dict, Mapping) else "anything" if hint is Any else str(hint)


def members_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself as the only one."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def describe_value(value: Any) -> str:
    """A value, the beginning of a long one, and what kind of thing it is, in words."""
    kind = {bool: "boolean", int: "integer", float: "number", str: "text", dict: "mapping", list: "list"}
    if value is None:
        return "null"
    text = repr(value)
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"{shown} ({kind.get(type(value), type(value).__name__)})"
