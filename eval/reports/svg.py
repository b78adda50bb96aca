"""Drawing in SVG, by hand: shapes, scales and ticks. Colours and fonts are the style sheet's, so that one
drawing serves the light and the dark page."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Scale = Callable[[float], float]


class Canvas:
    """A drawing.

    Args:
        width: Of its own units; the page scales it.
        height: In the same units.
        label: What it shows, for those who cannot see it.
        css: Classes of the drawing.
    """

    def __init__(self, width: float, height: float, label: str, css: str = "chart") -> None:
        self._head = (
            f'<svg class="{css}" viewBox="0 0 {number(width)} {number(height)}" role="img" '
            f'aria-label="{html.escape(label)}">'
        )
        self._parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        self._parts.append(
            f'<line class="{css}" x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"/>'
        )

    def rect(self, x: float, y: float, width: float, height: float, css: str) -> None:
        """A rectangle."""
        self._parts.append(
            f'<rect class="{css}" x="{number(x)}" y="{number(y)}" width="{number(max(0.0, width))}" '
            f'height="{number(height)}"/>'
        )

    def path(self, d: str, css: str) -> None:
        """Any shape."""
        self._parts.append(f'<path class="{css}" d="{d}"/>')

    def polyline(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """A line through points."""
        words = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self._parts.append(f'<polyline class="{css}" points="{words}"/>')

    def text(self, x: float, y: float, words: str, css: str, anchor: str = "start") -> None:
        """A line of text; y is its baseline."""
        self._parts.append(
            f'<text class="{css}" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}">'
            f"{html.escape(words)}</text>"
        )

    @contextmanager
    def group(self, css: str = "", title: str = "") -> Iterator[None]:
        """Shapes that belong together; the title shows under the pointer."""
        self._parts.append(f'<g class="{css}">' if css else "<g>")
        if title:
            self._parts.append(f"<title>{html.escape(title)}</title>")
        yield
        self._parts.append("</g>")

    def render(self) -> str:
        """The drawing as one element."""
        return self._head + "".join(self._parts) + "</svg>"


def number(value: float) -> str:
    """Short, with two places at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Maps low ... high to start ... end."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """The same over logarithms; low must be positive."""
    scale = linear(math.log(low), math.log(high), start, end)
    return lambda value: scale(math.log(value))


def pick_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values, about so many."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def pick_log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 ... between two values; powers of ten where these are many, even steps where few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    if len(fine) < 3:
        return pick_ticks(low, high, 4)
    return fine if len(fine) <= 8 else [10.0**p for p in powers if low <= 10.0**p <= high]


def widen(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """Lowest and highest value with some room around them."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def short(value: float) -> str:
    """A number for reading: three digits that count, without an exponent."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
