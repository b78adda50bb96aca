"""The picture of a comparison: accuracy against total cost."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from eval.baselines.combine import OURS
from eval.baselines.table import LABELS

_INK, _QUIET, _GRID = "#1b1f24", "#5b6570", "#e9ecef"
_STYLES: dict[str, tuple[str, str]] = {
    "random": ("#9aa5b1", "X"),
    "prumerge": ("#d98200", "v"),
    "visionzip": ("#2e8b57", "^"),
    "pool": ("#1f77b4", "s"),
    "resampler": ("#0f9fb5", "P"),
    "tome": ("#7b5ea7", "D"),
    "vit": (_INK, "*"),
    OURS: ("#c2185b", "o"),
}
_COSTS = (
    ("gmacs", "GMACs until the answer begins"),
    ("ms", "milliseconds until the answer begins"),
)
_SMALL, _NORMAL = 8.0, 9.0
_HALO = [withStroke(linewidth=2.5, foreground="white")]
# Of the y axis: what a line of label text needs.
_LABEL_HEIGHT = 0.056


def draw_pareto(results: Sequence[dict[str, Any]], primary: str, title: str, note: str) -> bytes:
    """A PNG: accuracy with 95 % intervals against GMACs, and against measured milliseconds.

    Args:
        results: Of `combine`, with "gmacs" and "ms".
        primary: The figure to draw.
        title: What was asked.
        note: What was equal, and what the bars cover.
    """
    figure = Figure(figsize=(9.6, 5.2), dpi=200, facecolor="white")
    axes = figure.subplots(1, 2, sharey=True)
    low, high = _limits(results, primary)
    for axis, (cost, label) in zip(axes, _COSTS, strict=True):
        axis.set_ylim(low, high)
        _draw_panel(axis, results, primary, cost)
        axis.set_xlabel(label, fontsize=_NORMAL, color=_INK)
    axes[0].set_ylabel("accuracy, %", fontsize=_NORMAL, color=_INK)
    figure.text(
        0.06, 0.955, "Accuracy against total cost", fontsize=13, fontweight="bold", color=_INK, va="center"
    )
    figure.text(
        0.06,
        0.908,
        f"{title}. Numbers at the points: visual tokens.",
        fontsize=_NORMAL,
        color=_QUIET,
        va="center",
    )
    lines = "\n".join(textwrap.wrap(note, 150))
    figure.text(0.06, 0.02, lines, fontsize=_SMALL, color=_QUIET, va="bottom", linespacing=1.35)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.87, bottom=0.185, wspace=0.04)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})
    return buffer.getvalue()


def _limits(results: Sequence[dict[str, Any]], primary: str) -> tuple[float, float]:
    """Of accuracy: everything drawn, and some air."""
    figures = [result["figures"][primary] for result in results]
    figures += [
        result["random-picture"]["figures"][primary] for result in results if "random-picture" in result
    ]
    low, high = min(f["low"] for f in figures), max(f["high"] for f in figures)
    air = 0.08 * max(high - low, 1.0)
    return max(0.0, low - air), high + air


def _draw_panel(axis: Axes, results: Sequence[dict[str, Any]], primary: str, cost: str) -> None:
    ends: list[tuple[float, float, str]] = []
    for order, (method, (colour, marker)) in enumerate(_STYLES.items()):
        points = sorted((r for r in results if r["method"] == method), key=lambda r: r["tokens"])
        if not points:
            continue
        strong = method in (OURS, "vit")
        x = [point[cost]["total"] for point in points]
        y = [point["figures"][primary]["value"] for point in points]
        axis.errorbar(
            x,
            y,
            yerr=_distances([point["figures"][primary] for point in points]),
            fmt="none",
            ecolor=colour,
            elinewidth=1.4 if strong else 0.7,
            alpha=0.9 if strong else 0.4,
            zorder=2 + order,
        )
        axis.plot(x, y, color=colour, linewidth=2.6 if method == OURS else 1.2, zorder=12 + order)
        axis.scatter(
            x,
            y,
            s=190 if method == "vit" else 58 if method == OURS else 26,
            color=colour,
            marker=marker,
            edgecolors="white",
            linewidths=0.7,
            zorder=22 + order,
        )
        for place, point in zip(x, points, strict=True):
            single = point["figures"][primary]["by_seed"]
            if len(single) > 1:
                axis.scatter([place] * len(single), single, s=4, color=colour, alpha=0.6, zorder=2 + order)
        if strong:
            _number(axis, x, y, points, colour)
        ends.append((x[-1], y[-1], method))
    costs = [result[cost]["total"] for result in results if result["tokens"]]
    axis.set_xlim(0, max(costs, default=1.0) * 1.56)
    _label_ends(axis, ends, max(costs, default=1.0) * 1.13)
    _draw_floors(axis, results, primary)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=_SMALL, colors=_QUIET, length=0)
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= max(costs, default=1.0) * 1.1])
    for name, spine in axis.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_QUIET)


def _distances(figures: Sequence[dict[str, Any]]) -> list[list[float]]:
    # A percentile interval may miss its mean by a rounding error.
    return [
        [max(0.0, figure["value"] - figure["low"]) for figure in figures],
        [max(0.0, figure["high"] - figure["value"]) for figure in figures],
    ]


def _number(
    axis: Axes, x: Sequence[float], y: Sequence[float], points: Sequence[dict[str, Any]], colour: str
) -> None:
    """The number of visual tokens above each point, beside its bar."""
    for point, place_x, place_y in zip(points, x, y, strict=True):
        axis.annotate(
            str(point["tokens"]),
            (place_x, place_y),
            xytext=(-4, 7),
            textcoords="offset points",
            ha="right",
            fontsize=_SMALL,
            color=colour,
            fontweight="bold",
            zorder=40,
            path_effects=_HALO,
        )


def _label_ends(axis: Axes, ends: Sequence[tuple[float, float, str]], column: float) -> None:
    """A name for every line in a column at the right, moved apart, with a thin line to its last point."""
    low, high = axis.get_ylim()
    step = _LABEL_HEIGHT * (high - low)
    ordered = sorted(ends, key=lambda end: end[1])
    places = spread([end[1] for end in ordered], step, low + step, high - step)
    for (x, y, method), place in zip(ordered, places, strict=True):
        colour = _STYLES[method][0]
        axis.plot([x, column * 0.99], [y, place], color=colour, linewidth=0.6, alpha=0.5, zorder=1)
        name = LABELS[method].partition(" (")[0]
        axis.text(
            column,
            place,
            name,
            color=colour,
            va="center",
            fontsize=_NORMAL if method == OURS else _SMALL,
            fontweight="bold" if method in (OURS, "vit") else "normal",
        )


def spread(values: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Values in ascending order moved apart to at least `step`, within limits where there is room."""
    places = list(values)
    for index in range(len(places)):
        least = low if index == 0 else places[index - 1] + step
        places[index] = max(places[index], least)
    for index in reversed(range(len(places))):
        most = high if index == len(places) - 1 else places[index + 1] - step
        places[index] = min(places[index], most)
    return places


def _draw_floors(axis: Axes, results: Sequence[dict[str, Any]], primary: str) -> None:
    for name, value in floors_of(results, primary).items():
        blind = name == "no-image"
        axis.axhline(value, color=_QUIET, linestyle="--" if blind else ":", linewidth=0.9, zorder=1)
        words = "trained without pictures" if blind else "full ViT, wrong picture"
        axis.annotate(
            words,
            (0.015, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2.5 if blind else -2.5),
            textcoords="offset points",
            va="bottom" if blind else "top",
            fontsize=_SMALL,
            color=_QUIET,
            path_effects=_HALO,
            zorder=39,
        )


def floors_of(results: Sequence[dict[str, Any]], primary: str) -> dict[str, float]:
    """Accuracies that a model reaches without seeing the right picture."""
    floors = {}
    for result in results:
        if result["method"] == "no-image":
            floors["no-image"] = result["figures"][primary]["value"]
        if "random-picture" in result:
            floors["random-picture"] = result["random-picture"]["figures"][primary]["value"]
    return floors
