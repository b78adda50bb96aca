"""Accuracy against cost: every method a line, every point with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.baselines.combine import OURS
from eval.baselines.table import name_method
from eval.reports.svg import Canvas, linear, logarithmic, number, pick_log_ticks, pick_ticks, short, widen

_WIDTH, _HEIGHT = 470.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 38.0, 12.0, 14.0, 46.0
_FLOORS = {"no-image": "trained without pictures", "random-picture": "full ViT, wrong picture"}


def name_skipped(points: Sequence[str]) -> list[str]:
    """Points that cannot be, as eval.pareto names them ("METHOD at N (why)"), with the methods in words."""
    parts = (point.partition(" ") for point in points)
    return [f"{name_method(method)}{space}{rest}" for method, space, rest in parts]


def floors_of(points: Sequence[Mapping[str, Any]], primary: str) -> dict[str, float]:
    """What a model reaches without seeing the right picture, by name."""
    floors = {}
    for point in points:
        if point["method"] == "no-image":
            floors["no-image"] = float(point["figures"][primary]["value"])
        if "random-picture" in point:
            floors["random-picture"] = float(point["random-picture"]["figures"][primary]["value"])
    return floors


def draw_scatter(points: Sequence[Mapping[str, Any]], primary: str, cost: str, axis: str) -> str:
    """One panel.

    Args:
        points: Of a comparison of towers.
        primary: The figure to draw.
        cost: "gmacs" or "ms".
        axis: What the cost is, in words.
    """
    seeing = [point for point in points if point["method"] != "no-image"]
    floors = floors_of(points, primary)
    figures = [point["figures"][primary] for point in seeing]
    costs = [float(point[cost]["total"]) for point in seeing]
    low, high = min(costs) / 1.12, max(costs) * 1.12
    x = logarithmic(low, high, _LEFT, _WIDTH - _RIGHT)
    bottom, top = widen([v for f in figures for v in (f["low"], f["high"])] + list(floors.values()))
    y = linear(bottom, top, _HEIGHT - _BOTTOM, _TOP)
    canvas = Canvas(_WIDTH, _HEIGHT, f"Accuracy in percent against {axis}")
    for tick in pick_ticks(bottom, top, 6):
        canvas.line(_LEFT, y(tick), _WIDTH - _RIGHT, y(tick), "grid")
        canvas.text(_LEFT - 6, y(tick) + 4, short(tick), "tick", "end")
    for tick in pick_log_ticks(low, high):
        canvas.line(x(tick), _TOP, x(tick), _HEIGHT - _BOTTOM, "grid")
        canvas.text(x(tick), _HEIGHT - _BOTTOM + 16, short(tick), "tick", "middle")
    canvas.text(_WIDTH - _RIGHT, _HEIGHT - 8, axis, "axis", "end")
    canvas.text(_LEFT, 9, "accuracy, %", "axis")
    placed: list[float] = []
    for name, value in sorted(floors.items(), key=lambda item: -item[1]):
        canvas.line(_LEFT, y(value), _WIDTH - _RIGHT, y(value), f"floor {name}")
        line = y(value) - 4 if all(abs(y(value) - other) > 12 for other in placed) else y(value) + 12
        placed.append(y(value))
        canvas.text(_WIDTH - _RIGHT - 2, line, f"{_FLOORS[name]}, {value:.1f}", "floor-label", "end")
    methods = dict.fromkeys(point["method"] for point in seeing)
    for method in sorted(methods, key=lambda method: (method == OURS, method == "vit")):  # ours on top
        mine = sorted((p for p in seeing if p["method"] == method), key=lambda p: p[cost]["total"])
        _draw_method(canvas, method, mine, primary, cost, x, y)
    return canvas.render()


def _draw_method(
    canvas: Canvas,
    method: str,
    points: Sequence[Mapping[str, Any]],
    primary: str,
    cost: str,
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> None:
    with canvas.group(f"method method-{method}"):
        places = [(x(p[cost]["total"]), y(p["figures"][primary]["value"])) for p in points]
        if len(places) > 1:
            canvas.polyline(places, "trace")
        for point, (across, up) in zip(points, places, strict=True):
            figure = point["figures"][primary]
            unit = "GMACs" if cost == "gmacs" else "ms"
            words = (
                f"{name_method(method)}, {point['tokens']} tokens: {figure['value']:.1f} % "
                f"[{figure['low']:.1f}, {figure['high']:.1f}], {short(point[cost]['total'])} {unit}"
            )
            with canvas.group("", words):
                canvas.line(across, y(figure["low"]), across, y(figure["high"]), "whisker")
                quartiles = point[cost].get("quartiles")
                if quartiles and min(quartiles) > 0:
                    canvas.line(x(quartiles[0]), up, x(quartiles[1]), up, "whisker")
                canvas.path(marker(method, across, up), "dot")
            if method in (OURS, "vit"):
                canvas.text(across, y(figure["high"]) - 5, str(point["tokens"]), "point-label", "middle")


def marker(method: str, x: float, y: float, size: float = 5.0) -> str:
    """The shape of a method's points, as a path."""
    if method == "vit":
        return _star(x, y, size * 1.7)
    shapes: dict[str, list[tuple[float, float]]] = {
        "pool": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "visionzip": [(0, -1.25), (1.15, 0.9), (-1.15, 0.9)],
        "prumerge": [(0, 1.25), (1.15, -0.9), (-1.15, -0.9)],
        "tome": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
        "resampler": [
            *((-0.45, -1.25), (0.45, -1.25), (0.45, -0.45), (1.25, -0.45), (1.25, 0.45), (0.45, 0.45)),
            *((0.45, 1.25), (-0.45, 1.25), (-0.45, 0.45), (-1.25, 0.45), (-1.25, -0.45), (-0.45, -0.45)),
        ],
        "random": [
            *((-1.2, -0.7), (-0.7, -1.2), (0, -0.5), (0.7, -1.2), (1.2, -0.7), (0.5, 0)),
            *((1.2, 0.7), (0.7, 1.2), (0, 0.5), (-0.7, 1.2), (-1.2, 0.7), (-0.5, 0)),
        ],
    }
    if method not in shapes:
        r = number(size * 1.15)
        twice = number(2.3 * size)
        return f"M{number(x - 1.15 * size)} {number(y)}a{r} {r} 0 1 0 {twice} 0a{r} {r} 0 1 0 -{twice} 0z"
    return _outline([(x + size * dx, y + size * dy) for dx, dy in shapes[method]])


def _star(x: float, y: float, size: float) -> str:
    turns = [(math.pi * k / 5 - math.pi / 2, 1.0 if k % 2 == 0 else 0.45) for k in range(10)]
    return _outline([(x + size * r * math.cos(t), y + size * r * math.sin(t)) for t, r in turns])


def _outline(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points) + "z"
