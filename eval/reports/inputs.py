"""Recognises what a report is made of by its contents, and refuses what is not finished or not a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers import InputError, name_some, read_json, read_text
from eval.compare import SCORES
from eval.engine import ANSWERS
from eval.reports.records import check_record, check_rows

CONFIG = "config.json"
PARETO = "pareto.json"
QUICKSTART = "quickstart.json"
KINDS = {
    "run": "python -m eval.run",
    "scores": "python -m eval.rescore --json",
    "pareto": "python -m eval.pareto",
    "cost": "python -m eval.cost --json",
    "encoder": "python -m eval.zeroshot, retrieval, knn, probe or agreement with --json",
}
# The file of a folder that holds its record.
_FILES = {"run": SCORES, "pareto": PARETO}


@dataclass(frozen=True)
class Source:
    """One thing that was measured.

    Attributes:
        number: Its place in the report's list of sources, from 1.
        kind: One of `KINDS`.
        label: What the report calls it.
        path: The folder or file.
        content: What its command wrote.
    """

    number: int
    kind: str
    label: str
    path: Path
    content: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """What it was read from; of a folder, what a later report reads again."""
        names = (SCORES, CONFIG, ANSWERS, PARETO)
        return [self.path / name for name in names] if self.path.is_dir() else [self.path]

    @property
    def provenance(self) -> dict[str, Any]:
        """Command, commit, hash of the settings, versions, device, date; empty where none was written."""
        return dict(self.content.get("provenance") or {})


def read_sources(words: Sequence[str]) -> list[Source]:
    """Reads everything that a command line names.

    Args:
        words: Folders and files, each as PATH or as LABEL=PATH.

    Raises:
        InputError: If one is not there, is not finished, is no run, or is named twice.
    """
    sources: list[Source] = []
    seen: set[Path] = set()
    for label, path in (pair for word in words for pair in _open_quickstart(*_split(word))):
        resolved = path.resolve()
        if resolved in seen:
            raise InputError(f"{path} is named twice.")
        seen.add(resolved)
        kind, records = _read(path)
        name = label or (path.stem if path.is_file() else path.resolve().name)
        for number, record in enumerate(records, start=1):
            file = path / _FILES[kind] if path.is_dir() else path
            place = f"Record {number} of {file}" if len(records) > 1 else str(file)
            check_record(kind, record, place, KINDS[kind])
            if kind == "run":
                _check_run(record, path)
            called = f"{name}, record {number}" if len(records) > 1 else name
            sources.append(Source(len(sources) + 1, kind, called, path, record))
    return _tell_apart(sources)


def _split(word: str) -> tuple[str, Path]:
    if Path(word).exists() or "=" not in word:
        return "", Path(word)
    label, _, path = word.partition("=")
    if not label or not path:
        raise InputError(f"{word!r}: expected a path, or LABEL=PATH.")
    return label, Path(path)


def _open_quickstart(label: str, path: Path) -> list[tuple[str, Path]]:
    """The runs in a folder of eval.quickstart, by their labels; any other path as it is."""
    found = [file for file in (path / QUICKSTART, path / "language" / QUICKSTART) if file.is_file()]
    if not found:
        return [(label, path)]
    check_rows(content := _json(found[0]), str(found[0]))
    lead = f"{label}, " if label else ""
    return [(f"{lead}{name}", found[0].parent / "runs" / name) for name in content["rows"]]


def _read(path: Path) -> tuple[str, list[dict[str, Any]]]:
    if path.is_dir():
        kind, file = _find(path)
        return kind, [_json(file)]
    if not path.exists():
        raise InputError(f"There is no run at {path}.")
    if path.name == SCORES and (path.parent / CONFIG).is_file():
        raise InputError(f"{path} belongs to a run; name its folder, {path.parent}.")
    records = _json_or_lines(path)
    kinds = {_guess(record) for record in records}
    guess = kinds.pop() if len(kinds) == 1 else None
    if guess is None or (len(records) > 1 and guess != "cost"):
        raise InputError(
            f"{path} is not something a report is made of; expected the output of "
            f"{'; '.join(KINDS.values())}."
        )
    return guess, records


def _find(folder: Path) -> tuple[str, Path]:
    """The kind of a folder and the file that ends its run."""
    if (folder / PARETO).is_file():
        return "pareto", folder / PARETO
    parts = sorted(folder.glob("answers.part-*.jsonl"))
    if parts:
        lines = sum(read_text(part).count("\n") for part in parts)
        raise InputError(
            f"{folder} is a run that is not finished ({lines} questions answered so far); the command that "
            "began it goes on with it."
        )
    names = (CONFIG, ANSWERS, SCORES)
    there = [name for name in names if (folder / name).is_file()]
    if len(there) == len(names):
        return "run", folder / SCORES
    if (folder / "points").is_dir():
        points = [path.stem for path in sorted((folder / "points").glob("*.json"))]
        raise InputError(
            f"{folder} is a comparison that is not finished ({name_some(points) or 'no point'} there, no "
            f"{PARETO}); the command that began it goes on with it."
        )
    if ANSWERS in there or SCORES in there:
        lacking = [name for name in names if name not in there]
        raise InputError(f"{folder} is not a whole run: it has no {' and no '.join(lacking)}.")
    raise InputError(
        f"{folder} is no run: expected a folder that eval.run wrote ({', '.join(names)}), eval.pareto "
        f"({PARETO}) or eval.quickstart ({QUICKSTART})."
    )


def _json(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object.")
    return content


def _json_or_lines(path: Path) -> list[dict[str, Any]]:
    text = read_text(path)
    try:
        rows = [json.loads(text)]
    except json.JSONDecodeError as error:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = []
        for number, line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                if not rows:
                    raise InputError(f"{path} is neither JSON nor JSON lines ({error}).") from None
                raise InputError(f"Line {number} of {path} is not whole JSON.") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds no JSON object.")
    return rows


def _guess(record: Mapping[str, Any]) -> str | None:
    marks = {"scores": "units", "pareto": "points", "cost": "counts", "encoder": "differences"}
    found = [kind for kind, mark in marks.items() if mark in record and "provenance" in record]
    if not found and "units" in record and "figures" in record:
        return "scores"
    return found[0] if len(found) == 1 else None


def _check_run(record: Mapping[str, Any], path: Path) -> None:
    """Whether scores and answers of a folder belong together."""
    answers = read_text(path / ANSWERS)
    lines = sum(bool(line) for line in answers.split("\n"))
    if answers and not answers.endswith("\n"):
        raise InputError(f"The last line of {path / ANSWERS} is not whole.")
    coverage = record["coverage"]
    if not coverage["answered"] <= lines:
        raise InputError(
            f"{path / SCORES} was made of {coverage['answered']} answers and {path / ANSWERS} holds {lines}; "
            "they are not of the same run."
        )


def _tell_apart(sources: list[Source]) -> list[Source]:
    """Whole paths in place of labels that stand for several sources."""
    labels = [source.label for source in sources]
    return [
        source
        if labels.count(source.label) == 1
        else Source(source.number, source.kind, str(source.path), source.path, source.content)
        for source in sources
    ]
