"""The picture of a comparison: accuracy against total cost."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from eval.baselines.combine import BLIND, OURS
from eval.baselines.table import name_method

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
# For towers that are not of the project.
_SPARE = (("#8c5a3c", "<"), ("#3949ab", ">"), ("#7a8b1f", "p"), ("#b23a48", "h"))
_COSTS = (
    ("gmacs", "GMACs until the answer begins"),
    ("ms", "milliseconds (one CPU thread) until the answer begins"),
)
_SMALL, _NORMAL = 8.0, 9.0
_HALO = [withStroke(linewidth=2.5, foreground="white")]
# Of the y axis: what a line of label text needs.
_LABEL_HEIGHT = 0.056


Read = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes the figure that is drawn out of a result."""


def draw_pareto(results: Sequence[dict[str, Any]], primary: str, title: str, note: str) -> bytes:
    """A PNG: accuracy, and bits gained by seeing, against GMACs and against measured milliseconds.

    Args:
        results: Of `combine`, with "gmacs" and "ms".
        primary: The figure to draw.
        title: What was asked.
        note: What was equal, and what the bars cover.
    """
    rows: list[tuple[str, Read]] = [("accuracy, %", lambda result: result["figures"][primary])]
    if all("gain" in result for result in results):
        rows.append(("bits about the right answer", lambda result: result["gain"]))
    height = 1.6 + 3.6 * len(rows)
    figure = Figure(figsize=(9.6, height), dpi=200, facecolor="white")
    axes = figure.subplots(len(rows), 2, sharey="row", sharex="col", squeeze=False)
    for axis, (_, label) in zip(axes[-1], _COSTS, strict=True):
        axis.set_xlabel(label, fontsize=_NORMAL, color=_INK)
    for row, (name, read) in zip(axes, rows, strict=True):
        for axis, (cost, _) in zip(row, _COSTS, strict=True):
            axis.set_ylim(*_limits(results, read))
            _draw_panel(axis, results, read, cost)
        row[0].set_ylabel(name, fontsize=_NORMAL, color=_INK)
    what = "Accuracy against total cost" + (", and what seeing adds" if len(rows) > 1 else "")
    for text, below, size, weight, colour in (
        (what, 0.23, 13.0, "bold", _INK),
        (f"{title}. Numbers at the points: visual tokens.", 0.48, _NORMAL, "normal", _QUIET),
    ):
        figure.text(
            0.065, 1 - below / height, text, fontsize=size, fontweight=weight, color=colour, va="center"
        )
    lines = "\n".join(textwrap.wrap(note, 150))
    figure.text(0.065, 0.1 / height, lines, fontsize=_SMALL, color=_QUIET, va="bottom", linespacing=1.35)
    figure.subplots_adjust(
        left=0.065, right=0.99, top=1 - 0.68 / height, bottom=0.97 / height, wspace=0.04, hspace=0.07
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})
    return buffer.getvalue()


def _limits(results: Sequence[dict[str, Any]], read: Read) -> tuple[float, float]:
    """All towers and the model without pictures, and some air."""
    figures = [read(result) for result in results]
    low, high = min(f["low"] for f in figures), max(f["high"] for f in figures)
    air = 0.07 * ((high - low) or 1.0)
    return low - air, high + air


def style_methods(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every method, in the order of drawing: ours on top of all."""
    others = sorted(set(methods) - {*_STYLES, BLIND})
    return {**dict(zip(others, cycle(_SPARE), strict=False)), **_STYLES}


def _draw_panel(axis: Axes, results: Sequence[dict[str, Any]], read: Read, cost: str) -> None:
    ends: list[tuple[float, float, str]] = []
    styles = style_methods([result["method"] for result in results])
    for order, (method, (colour, marker)) in enumerate(styles.items()):
        points = sorted((r for r in results if r["method"] == method), key=lambda r: r["tokens"])
        if not points:
            continue
        strong = method in (OURS, "vit")
        x = [point[cost]["total"] for point in points]
        y = [read(point)["value"] for point in points]
        axis.errorbar(
            x,
            y,
            yerr=_distances([read(point) for point in points]),
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
            single = read(point)["by_seed"]
            if len(single) > 1:
                axis.scatter([place] * len(single), single, s=4, color=colour, alpha=0.6, zorder=2 + order)
        if strong:
            _number(axis, x, y, points, colour, below=method != OURS)
        ends.append((x[-1], y[-1], method))
    dearest = max((result[cost]["total"] for result in results if result["method"] != BLIND), default=1.0)
    axis.set_xlim(0, dearest * 1.56)
    _label_ends(axis, ends, styles, dearest * 1.13)
    _draw_floors(axis, floors_of(results, read))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=7))
    axis.grid(True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=_SMALL, colors=_QUIET, length=0)
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= dearest * 1.1])
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
    axis: Axes,
    x: Sequence[float],
    y: Sequence[float],
    points: Sequence[dict[str, Any]],
    colour: str,
    below: bool,
) -> None:
    """The number of visual tokens beside each point's bar: left above the point, or right below it."""
    for point, place_x, place_y in zip(points, x, y, strict=True):
        axis.annotate(
            str(point["tokens"]),
            (place_x, place_y),
            xytext=(5, -15) if below else (-4, 7),
            textcoords="offset points",
            ha="left" if below else "right",
            fontsize=_SMALL,
            color=colour,
            fontweight="bold",
            zorder=40,
            path_effects=_HALO,
        )


def _label_ends(
    axis: Axes,
    ends: Sequence[tuple[float, float, str]],
    styles: Mapping[str, tuple[str, str]],
    column: float,
) -> None:
    """A name for every line in a column at the right, moved apart, with a thin line to its last point."""
    low, high = axis.get_ylim()
    step = _LABEL_HEIGHT * (high - low)
    ordered = sorted(ends, key=lambda end: end[1])
    places = spread([end[1] for end in ordered], step, low + step, high - step)
    for (x, y, method), place in zip(ordered, places, strict=True):
        colour = styles[method][0]
        axis.plot([x, column * 0.99], [y, place], color=colour, linewidth=0.6, alpha=0.5, zorder=1)
        name = name_method(method).partition(" (")[0]
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


def _draw_floors(axis: Axes, floors: dict[str, float]) -> None:
    highest = max(floors, key=lambda name: floors[name], default="")
    bottom = axis.get_ylim()[0]
    for name, value in floors.items():
        outside = value < bottom
        above = name == highest or outside
        if not outside:
            style = "--" if name == BLIND else ":"
            axis.axhline(value, color=_QUIET, linestyle=style, linewidth=0.9, zorder=1)
        words = "trained without pictures" if name == BLIND else "full ViT, wrong picture"
        axis.annotate(
            f"{words}: {value:.2f}, below" if outside else words,
            (0.015, max(value, bottom)),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2.5 if above else -2.5),
            textcoords="offset points",
            va="bottom" if above else "top",
            fontsize=_SMALL,
            color=_QUIET,
            path_effects=_HALO,
            zorder=39,
        )


def floors_of(results: Sequence[dict[str, Any]], read: Read) -> dict[str, float]:
    """What a model reaches without seeing the right picture."""
    floors = {}
    for result in results:
        if result["method"] == BLIND:
            floors[BLIND] = read(result)["value"]
        if "random-picture" in result:
            floors["random-picture"] = read(result["random-picture"])["value"]
    return floors
