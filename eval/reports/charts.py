"""Rows of figures with their intervals, and bars: each row is a line of words above its drawing, so that a
phone shows it as well as a wide page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.reports.svg import Canvas, linear, pick_ticks, short, widen

_WIDTH = 460.0
_EDGE = 8.0
_ROW = 46.0


@dataclass(frozen=True)
class Span:
    """A figure with its interval.

    Attributes:
        label: What it is of.
        value: The figure.
        low: Lower end of its interval.
        high: Upper end.
        text: As written at the row's end.
        css: Class that gives the colour, such as "tone-1".
        hollow: For a floor.
    """

    label: str
    value: float
    low: float
    high: float
    text: str
    css: str
    hollow: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar of one or several pieces.

    Attributes:
        label: What it is of.
        pieces: (name, length, class) from the left.
        text: As written at the row's end.
        low: Where a whisker begins; None for no whisker.
        high: Where it ends.
    """

    label: str
    pieces: tuple[tuple[str, float, str], ...]
    text: str
    low: float | None = None
    high: float | None = None

    @property
    def total(self) -> float:
        """Length of the bar."""
        return sum(length for _, length, _ in self.pieces)


def draw_spans(rows: Sequence[Span], label: str, axis: str, zero: bool = False) -> str:
    """Dots with whiskers over one axis.

    Args:
        rows: From top to bottom.
        label: What the drawing shows.
        axis: What the axis counts.
        zero: Whether zero is the line that everything is measured from.
    """
    ends = [end for row in rows for end in (row.low, row.high, row.value)] + ([0.0] if zero else [])
    low, high = widen(ends)
    height = _ROW * len(rows) + 40
    canvas = Canvas(_WIDTH, height, label)
    x = linear(low, high, _EDGE, _WIDTH - _EDGE)
    bottom = _ROW * len(rows) + 6
    _draw_axis(canvas, x, pick_ticks(low, high), bottom, axis)
    if zero:
        canvas.line(x(0), 0, x(0), bottom, "zero")
    for place, row in enumerate(rows):
        top = _ROW * place
        words = f"{row.label}: {row.text}, 95 % interval {short(row.low)} to {short(row.high)}"
        with canvas.group(row.css, words):
            canvas.text(_EDGE, top + 16, row.label, "row-label")
            canvas.text(_WIDTH - _EDGE, top + 16, row.text, "row-value", "end")
            y = top + 31
            canvas.line(x(row.low), y, x(row.high), y, "whisker")
            for end in (row.low, row.high):
                canvas.line(x(end), y - 4, x(end), y + 4, "whisker")
            canvas.path(_circle(x(row.value), y, 5.5), "dot hollow" if row.hollow else "dot")
    return canvas.render()


def draw_bars(rows: Sequence[Bar], label: str, axis: str) -> str:
    """Bars from zero.

    Args:
        rows: From top to bottom.
        label: What the drawing shows.
        axis: What the axis counts.
    """
    longest = max(max(row.total, row.high or 0.0) for row in rows) or 1.0
    canvas = Canvas(_WIDTH, _ROW * len(rows) + 40, label)
    x = linear(0, longest * 1.02, _EDGE, _WIDTH - _EDGE)
    bottom = _ROW * len(rows) + 6
    _draw_axis(canvas, x, pick_ticks(0, longest), bottom, axis)
    for place, row in enumerate(rows):
        top = _ROW * place
        canvas.text(_EDGE, top + 16, row.label, "row-label")
        canvas.text(_WIDTH - _EDGE, top + 16, row.text, "row-value", "end")
        start = 0.0
        for name, length, css in row.pieces:
            with canvas.group(css, f"{row.label}, {name}: {short(length)}"):
                canvas.rect(x(start), top + 23, x(start + length) - x(start), 15, "bar")
            start += length
        if row.low is not None and row.high is not None:
            y = top + 30.5
            canvas.line(x(row.low), y, x(row.high), y, "spread")
            for end in (row.low, row.high):
                canvas.line(x(end), y - 4, x(end), y + 4, "spread")
    return canvas.render()


def _draw_axis(canvas: Canvas, x: object, ticks: Sequence[float], bottom: float, axis: str) -> None:
    assert callable(x)
    for tick in ticks:
        canvas.line(x(tick), 0, x(tick), bottom, "grid")
        anchor = "start" if x(tick) < 16 else "end" if x(tick) > _WIDTH - 16 else "middle"
        canvas.text(x(tick), bottom + 14, short(tick), "tick", anchor)
    canvas.text(_WIDTH - _EDGE, bottom + 30, axis, "axis", "end")


def _circle(x: float, y: float, r: float) -> str:
    return f"M{x - r:.2f} {y:.2f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
