"""Builds nested frozen dataclasses from plain mappings, and refuses what it does not understand.

Reading the file (YAML, JSON) is the caller's business; this module sees mappings only and needs nothing
beyond the standard library.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from .settings_words import describe_type, describe_value, members_of

SettingsT = TypeVar("SettingsT")

_FLOAT_TEXT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DECIMAL = re.compile(r"[+-]?0\d+")
_WORDS = {"true": True, "false": False, "null": None, "none": None}


class SettingsError(ValueError):
    """One or more settings cannot be used.

    Attributes:
        problems: One sentence for each thing that is wrong, each naming its source and its key.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} settings cannot be used:{lines}")


class _MismatchError(Exception):
    """A value does not fit a type; carries the dotted path and the rest of the sentence."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path
        self.message = message


@dataclasses.dataclass(frozen=True)
class _FromOverride:
    """A value given on the command line: read by the parser, but its raw text is kept for text fields."""

    value: Any
    raw: str


def parse_override_value(text: str) -> Any:
    """Reads the right-hand side of `key=value`: JSON where it is JSON, otherwise plain text.

    `true`, `false`, `null` and `none` are understood in any case, and `[a, b]` needs no quotes.
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    stripped = text.strip()
    if stripped.lower() in _WORDS:
        return _WORDS[stripped.lower()]
    if stripped.startswith("[") and stripped.endswith("]") and not set("[]{}\"'") & set(stripped[1:-1]):
        return [parse_override_value(part.strip()) for part in stripped[1:-1].split(",") if part.strip()]
    return text


def build_settings(
    cls: type[SettingsT],
    mapping: Mapping[str, Any] | None,
    overrides: Iterable[str] = (),
    source: str | Path = "settings",
    parse_value: Callable[[str], Any] = parse_override_value,
) -> SettingsT:
    """Builds `cls` from a mapping, with command-line overrides on top.

    Fields may be int, float, bool, str, None, Path, Literal, tuple, list, dict, Any, unions of these, and
    nested dataclasses. Keys of a nested dataclass that are not given keep the values of the field's default.

    Args:
        cls: A dataclass; its `__post_init__` may raise ValueError for options that contradict each other.
        mapping: What was read from the file; None (an empty YAML file) counts as empty.
        overrides: Texts like `optim.learning_rate=1e-3`; later ones win.
        source: The file's name, for error messages.
        parse_value: Reads the right-hand side of an override, for example `yaml.safe_load`.

    Raises:
        SettingsError: With every problem found: unknown keys, wrong types, missing keys, contradictions.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"build_settings needs a dataclass, got {cls!r}")
    builder = _Builder(cls, str(source))
    if mapping is not None and not isinstance(mapping, Mapping):
        raise SettingsError([f"{source}: expected a mapping of settings at the top, got {_show(mapping)}"])
    tree = _copy_tree(mapping or {})
    for override in overrides:
        builder.apply_override(tree, override, parse_value)
    result = None if builder.problems else builder.build(cls, tree, "", None)
    if builder.problems:
        raise SettingsError(builder.problems)
    return cast(SettingsT, result)


def refuse_twice(loader: type[Any]) -> type[Any]:
    """A YAML loader that refuses a key that is there twice, of which YAML would forget the first.

    Args:
        loader: PyYAML's, which this package does without.
    """

    class Once(loader):
        """Looks at keys as they are written, before mappings are merged."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if not isinstance(key.value, str):
                    continue
                if key.value in seen:
                    again = f"again in line {key.start_mark.line + 1}"
                    raise SettingsError([f"the key {key.value!r} is there twice, {again}"])
                seen.add(key.value)
            return node

    return Once


def expand_home(value: Any) -> Any:
    """Home in texts that begin with ``~/``, in lists and mappings too; a shell looks at words alone."""
    if isinstance(value, Mapping):
        return {key: expand_home(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(expand_home(item) for item in value)
    if not isinstance(value, str) or not (value == "~" or value.startswith("~/")):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError:  # nobody's home: whoever opens the path says so
        return value


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """Turns a (nested) dataclass into plain mappings, lists and scalars that JSON and YAML can hold.

    `build_settings(type(settings), settings_to_dict(settings))` equals `settings`.
    """
    if isinstance(settings, type) or not dataclasses.is_dataclass(settings):
        raise TypeError(f"settings_to_dict needs a dataclass instance, got {settings!r}")
    return {f.name: _to_plain(getattr(settings, f.name)) for f in dataclasses.fields(settings) if f.init}


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return settings_to_dict(value)
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class _Builder:
    """One build: the root class, the file's name, the overrides seen, the problems found."""

    def __init__(self, root: type, source: str) -> None:
        self.root = root
        self.source = source
        self.overridden: dict[str, str] = {}
        self.problems: list[str] = []

    def complain(self, path: str, message: str) -> None:
        """Notes a problem, led by the place the value came from: an override or the file."""
        place = self.source
        for key, text in self.overridden.items():
            if path == key or path.startswith((key + ".", key + "[")):
                place = f"override '{text}'"
        self.problems.append(f"{place}: {message}")

    def apply_override(self, tree: dict[str, Any], text: str, parse_value: Callable[[str], Any]) -> None:
        """Writes `key.sub=value` into the tree of mappings."""
        key, equals, raw = text.partition("=")
        key = key.strip()
        parts = key.split(".")
        if not equals or not all(parts):
            self.problems.append(f"override '{text}': expected the form key.sub=value")
            return
        try:
            value = parse_value(raw)
        except Exception as error:  # the caller's parser may raise anything, for example yaml.YAMLError
            if not _is_plain(raw):
                self.problems.append(f"override '{text}': the value cannot be read ({error})")
                return
            value = raw.strip()
        if type(value) is int and _DECIMAL.fullmatch(raw.strip()):
            value = int(raw)  # YAML takes 010 for eight
        node: dict[str, Any] = tree
        for depth, part in enumerate(parts[:-1]):
            child = node.get(part)
            child = child.value if isinstance(child, _FromOverride) else child
            if child is None:
                child = {}
            elif not isinstance(child, dict):
                outer = ".".join(parts[: depth + 1])
                self.problems.append(
                    f"override '{text}': '{outer}' is {_show(child)} in {self.source}, not a mapping"
                )
                return
            node[part] = child
            node = child
        node[parts[-1]] = _FromOverride(_copy_tree(value) if isinstance(value, Mapping) else value, raw)
        self.overridden.pop(key, None)
        self.overridden[key] = text

    def build(self, cls: Any, tree: Mapping[Any, Any], path: str, base: Any) -> Any:
        """Builds one dataclass; `base` is an instance whose values stand in for keys that are not given."""
        hints = get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        before = len(self.problems)
        values: dict[str, Any] = {}
        for key, value in tree.items():
            here = _join(path, key)
            if key not in fields:
                self.complain(here, self.describe_unknown(key, path, list(fields)))
                continue
            default = getattr(base, key) if base is not None else _default_of(fields[key])
            try:
                values[key] = self.convert(value, hints[key], here, default)
            except _MismatchError as mismatch:
                self.complain(mismatch.path, mismatch.message)
        for name, field in fields.items():
            if name in tree:
                continue
            if base is not None:
                values[name] = getattr(base, name)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                here = _join(path, name)
                self.complain(here, f"missing required key '{here}' ({describe_type(hints[name])})")
        if len(self.problems) > before:
            return None
        try:
            return cls(**values)
        except ValueError as error:
            where = f"{path}: " if path else ""
            touched = [
                f"'{t}'" for key, t in self.overridden.items() if not path or key.startswith(path + ".")
            ]
            note = f" (with {', '.join(touched)})" if touched else ""
            self.problems.append(f"{self.source}{note}: {where}{error}")
            return None

    def describe_unknown(self, key: Any, path: str, names: list[str]) -> str:
        """The sentence for a key that does not exist, with the nearest one that does."""
        here = _join(path, key)
        if not isinstance(key, str):
            return f"key '{here}' is {_show(key)}, not text; YAML needs quotes around it"
        plain = key.replace("-", "_")
        elsewhere = [p for p in _all_paths(self.root) if p.rsplit(".", 1)[-1] == plain]
        near = difflib.get_close_matches(plain, names, n=1, cutoff=0.6)
        if plain not in names and elsewhere:
            return f"unknown key '{here}'; did you mean '{elsewhere[0]}'?"
        if near:
            return f"unknown key '{here}'; did you mean '{_join(path, near[0])}'?"
        return f"unknown key '{here}'; valid here: {', '.join(names) or 'nothing'}"

    def convert(self, value: Any, hint: Any, path: str, default: Any = None) -> Any:
        """Checks a value against a type and returns it as that type."""
        if isinstance(value, str):
            value = expand_home(value)
        if isinstance(value, _FromOverride):
            is_text = str in members_of(hint) or Path in members_of(hint)
            if is_text and isinstance(value.value, (str, list, Mapping)) and _is_plain(value.raw):
                # YAML takes " #" for a comment, "a: b" for a mapping.
                return self.convert(value.raw.strip(), hint, path, default)
            try:
                return self.convert(value.value, hint, path, default)
            except _MismatchError:
                # `name=49` for a text field means the text "49", `folder=2024` the folder of that name.
                if str in members_of(hint) and not isinstance(value.value, (Mapping, list)):
                    return value.raw
                if str in members_of(hint) and _is_braces(value.value):
                    return value.raw.strip()
                if Path in members_of(hint) and type(value.value) in (int, float):
                    return Path(value.raw)
                raise
        if hint is Any:
            return _strip(value)
        members = members_of(hint)
        for member in members:
            if _is_exact(value, member):
                return value
        mismatch: _MismatchError | None = None
        for member in members:
            try:
                return self.convert_one(value, member, path, default)
            except _MismatchError as error:
                # A mismatch deeper down says more than "not one of these types".
                if error.path != path or len(members) == 1:
                    mismatch = mismatch or error
        raise mismatch or _MismatchError(path, f"'{path}' must be {describe_type(hint)}, got {_show(value)}")

    def convert_one(self, value: Any, member: Any, path: str, default: Any) -> Any:
        """As `convert`, for one member of a union."""
        wrong = _MismatchError(path, f"'{path}' must be {describe_type(member)}, got {_show(value)}")
        origin, args = get_origin(member) or member, get_args(member)
        if dataclasses.is_dataclass(member) and isinstance(member, type):
            if isinstance(value, member):
                return value
            if not isinstance(value, Mapping):
                raise wrong
            return self.build(member, value, path, default if isinstance(default, member) else None)
        if origin is Literal:
            for allowed in args:
                if type(allowed) is type(value) and allowed == value:
                    return value
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            if near:
                raise _MismatchError(path, f"{wrong.message}; did you mean '{near[0]}'?")
        elif member is float and type(value) is int:
            return float(value)
        elif member is float and isinstance(value, str) and _FLOAT_TEXT.fullmatch(value.strip()):
            return float(value)  # YAML 1.1 reads 1e-3 (no dot) as text
        elif member is Path and isinstance(value, (str, Path)):
            return Path(value)
        elif origin in (tuple, list) and isinstance(value, (tuple, list)):
            return self.convert_sequence(value, origin, args, path)
        elif origin in (dict, Mapping) and isinstance(value, Mapping):
            key_hint, item_hint = args or (Any, Any)
            return {
                self.convert(key, key_hint, _join(path, key)): self.convert(item, item_hint, _join(path, key))
                for key, item in value.items()
            }
        elif origin not in _KNOWN:
            raise TypeError(
                f"settings field '{path}' has the type {member!r}, which build_settings cannot read"
            )
        raise wrong

    def convert_sequence(self, value: Sequence[Any], origin: Any, args: tuple[Any, ...], path: str) -> Any:
        """Converts a list to `tuple[...]` or `list[...]`, item by item."""
        if origin is list or (len(args) == 2 and args[1] is Ellipsis) or not args:
            hints = [args[0] if args else Any] * len(value)
        elif len(args) == len(value):
            hints = list(args)
        else:
            raise _MismatchError(
                path, f"'{path}' must be a list of {len(args)} values, got {len(value)}: {list(value)!r}"
            )
        return origin(
            self.convert(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, hints, strict=True))
        )


_KNOWN = (int, float, bool, str, type(None), Path, Literal, tuple, list, dict, Mapping)


def _is_exact(value: Any, member: Any) -> bool:
    # `type is` rather than isinstance: True is not an integer here.
    return member in (int, float, bool, str, type(None)) and type(value) is member


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _all_paths(cls: Any, prefix: str = "") -> list[str]:
    paths = []
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        paths.append(prefix + field.name)
        for member in members_of(hints[field.name]):
            if isinstance(member, type) and dataclasses.is_dataclass(member):
                paths += _all_paths(member, f"{prefix}{field.name}.")
    return paths


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _copy_tree(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: _copy_tree(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _is_plain(raw: str) -> bool:
    """Whether the right-hand side of an override is bare text: not quoted, no list, no mapping."""
    text = raw.strip()
    return not text.startswith(('"', "'", "[")) and not (text.startswith("{") and text.endswith("}"))


def _is_braces(value: Any) -> bool:
    """Whether a mapping is what YAML makes of ``{0..3}``, which names files."""
    return isinstance(value, Mapping) and bool(value) and all(item is None for item in value.values())


def _strip(value: Any) -> Any:
    if isinstance(value, _FromOverride):
        return _strip(value.value)
    return {key: _strip(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _show(value: Any) -> str:
    return describe_value(value.value if isinstance(value, _FromOverride) else value)
