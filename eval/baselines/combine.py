"""Trainings of one point put together: means, and intervals over the choice of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.baselines.data import Quiz
from eval.intervals import RESAMPLES, SEED, alike_interval, is_point

OURS = "sparseformer"
BLIND = "no-image"
METHOD = "bootstrap over pictures"
ALIKE = "wilson over pictures"
_PERCENT = (0.0, 100.0)
_POINTS = (-100.0, 100.0)  # of a difference


def resample_pictures(
    values: Mapping[str, float], pictures: Mapping[str, str], limits: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Mean over questions with a 95 % interval that draws whole pictures, whose questions are alike.

    Args:
        values: By question.
        pictures: The picture of each question; a question that is not in it is its own.
        limits: The least and the most that a value can be: where all pictures have one mean, the interval
            is that of :func:`eval.intervals.alike_interval`. None where there are none; it has no width
            then.
    """
    groups: dict[str, list[float]] = {}
    for key, value in values.items():
        groups.setdefault(pictures.get(key, key), []).append(value)
    sums = np.array([sum(group) for group in groups.values()])
    counts = np.array([len(group) for group in groups.values()])
    share = np.full(len(groups), 1 / len(groups))
    drawn = np.random.default_rng(SEED).multinomial(len(groups), share, size=RESAMPLES)  # (R, pictures)
    value = float(sums.sum() / counts.sum())
    low, high = np.percentile(drawn @ sums / (drawn @ counts), [2.5, 97.5])
    method = METHOD
    if limits is not None and is_point(low, high):
        low, high = alike_interval(value, len(groups), *limits)
        method = ALIKE
    return {
        "value": value,
        "low": float(low),
        "high": float(high),
        "n": int(counts.sum()),
        "pictures": len(groups),
        "method": method,
    }


def mean_over(rows: Sequence[Mapping[str, float]], scale: float = 1.0) -> dict[str, float]:
    """Mean of each key's values."""
    return {key: scale * sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def combine(results: Sequence[dict[str, Any]], test: Quiz, own_tokens: int = 0) -> list[dict[str, Any]]:
    """One entry for each method and N.

    Args:
        results: Of all points, see `run_point`.
        test: The questions.
        own_tokens: N that the SparseFormer was made for; with this the full ViT is compared.

    Returns:
        With "commits" (of its trainings), "figures" (one, see :func:`name_figure`) and "nats", both with
        value, interval, and the mean of each training; "details" (all of the benchmark's figures, means over
        trainings); for the full ViT also "random-picture"; where a model was trained without pictures,
        "gain": the bits that seeing adds about the right answer, paired with it by question; and for rivals
        "ours_minus": the SparseFormer's accuracy with the same N (`own_tokens` against the full ViT) minus
        theirs, paired too.
    """
    pictures = {example.key: str(example.image) for example in test.examples}
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["tokens"]), []).append(result)
    units = {place: mean_over([r["units"] for r in group], 100.0) for place, group in groups.items()}
    blind = mean_over([r["nats"] for r in groups[BLIND, 0]]) if (BLIND, 0) in groups else None
    combined = []
    figure = name_figure(results, test.task.primary)
    for (method, tokens), group in groups.items():
        entry: dict[str, Any] = {
            "method": method,
            "tokens": tokens,
            "trained": group[0]["trained"],
            "training": group[0]["training"],
            "seeds": [r["seed"] for r in group],
            "loss": [r["loss"]["last"] for r in group],
            "commits": sorted({r["commit"] for r in group if r.get("commit")}),
            **_summarise(group, pictures, figure),
        }
        if blind is not None:
            entry["gain"] = _gain(group, blind, pictures)
        if "random-picture" in group[0]:
            wrong = [r["random-picture"] for r in group]
            entry["random-picture"] = _summarise(wrong, pictures, figure)
            if blind is not None:
                entry["random-picture"]["gain"] = _gain(wrong, blind, pictures)
        ours = units.get((OURS, own_tokens if method == "vit" else tokens))
        if ours is not None and method != OURS:
            theirs = units[method, tokens]
            gaps = {key: ours[key] - theirs[key] for key in ours}
            entry["ours_minus"] = resample_pictures(gaps, pictures, _POINTS)
        combined.append(entry)
    return combined


def name_figure(results: Sequence[Mapping[str, Any]], primary: str) -> str:
    """What the mean score of the questions is called.

    The benchmark's primary figure where it is just that, and "accuracy" otherwise (POPE's is an F1, MME's a
    sum of points).

    Args:
        results: Of all points, see `run_point`.
        primary: The name of the benchmark's primary figure.
    """
    for result in results:
        mean = 100.0 * sum(result["units"].values()) / len(result["units"])
        if abs(result["figures"].get(primary, math.inf) - mean) > 1e-6:
            return "accuracy"
    return primary


def _gain(
    group: Sequence[dict[str, Any]], blind: Mapping[str, float], pictures: Mapping[str, str]
) -> dict[str, Any]:
    rows = [{key: (blind[key] - r["nats"][key]) / math.log(2) for key in blind} for r in group]
    single = [sum(row.values()) / len(row) for row in rows]
    return {**resample_pictures(mean_over(rows), pictures), "by_seed": single}


def _summarise(group: Sequence[dict[str, Any]], pictures: Mapping[str, str], figure: str) -> dict[str, Any]:
    scores, nats = [r["units"] for r in group], [r["nats"] for r in group]
    return {
        "figures": {
            figure: {
                **resample_pictures(mean_over(scores, 100.0), pictures, _PERCENT),
                "by_seed": [100 * sum(row.values()) / len(row) for row in scores],
            }
        },
        "nats": {
            **resample_pictures(mean_over(nats), pictures),
            "by_seed": [sum(row.values()) / len(row) for row in nats],
        },
        "details": mean_over([r["figures"] for r in group]),
    }
