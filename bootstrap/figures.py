"""Held-out figures in words: plain names, shares in percent."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "cosine": "cosine of the embeddings",
    "agreement": "label agreement",
    "retrieval": "nearest to the teacher's own embedding",
    "top1": "top-1 of the student",
    "teacher_top1": "top-1 of the teacher",
    "kept": "top-1 kept",
}
_SHARES = ("agreement", "retrieval", "top1", "teacher_top1", "kept")


def format_figure(name: str, value: float) -> str:
    """A figure as people read it: shares in percent, counts whole."""
    if name in _SHARES:
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def format_figures(figures: Mapping[str, float]) -> str:
    """Figures in one line, under the names they have in files."""
    return ", ".join(
        f"{name} {value if isinstance(value, int) else format(value, '.4f')}"
        for name, value in figures.items()
    )


def tabulate(figures: Mapping[str, Any], tokens: int | None = None) -> list[list[str]]:
    """Rows of figures, a column for each token count: head, then lines.

    Args:
        figures: of the run's end; other token counts under ``by_tokens``.
        tokens: the encoder's own token count, for the head.
    """
    columns = {"value" if tokens is None else _head(tokens): figures}
    for count, scores in figures.get("by_tokens", {}).items():
        if int(count) != tokens:
            columns[_head(int(count))] = scores
    if tokens is not None:
        columns = dict(sorted(columns.items(), key=lambda item: int(item[0].split()[0])))
    named = [name for name in NAMES if name in figures]
    rows = [
        [NAMES[name], *(format_figure(name, column[name]) for column in columns.values())] for name in named
    ]
    return [["held-out figure", *columns], *rows]


def _head(count: int) -> str:
    return f"{count} tokens"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def describe_end(figures: Mapping[str, Any], tokens: int, out: Path) -> str:
    """What a finished run says: its held-out figures, if there are any, and the next command."""
    command = f"python -m bootstrap.report {shlex.quote(str(out))}"
    if not figures:
        return f"no held-out figures: the run has no heldout.source; curves: {command}"
    table = align(tabulate(figures, tokens))
    return f"\n{table}\nof {figures['pictures']} held-out pictures; the run as a page: {command}"
