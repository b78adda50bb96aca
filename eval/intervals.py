"""95 % intervals and paired tests, seeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

SEED = 0
RESAMPLES = 10_000
_Z = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Figure:
    """One reported number.

    Attributes:
        value: The figure, unrounded, in `unit`.
        n: How many independent units it is computed over.
        low: Lower end of its 95 % interval.
        high: Upper end.
        method: "wilson" or "bootstrap", perhaps "over pictures"; "subtasks' intervals" of a sum.
        unit: "%" or "points".
        protocol: The scoring rule, where a task has several.
        detail: True for a breakdown that the printed table leaves to the JSON file.
    """

    value: float
    n: int
    low: float
    high: float
    method: str
    unit: str = "%"
    protocol: str = ""
    detail: bool = False


def accuracy_figure(scores: Sequence[float], protocol: str = "", detail: bool = False) -> Figure:
    """Mean score in percent: Wilson's interval for right-or-wrong scores, the bootstrap for soft ones."""
    n = len(scores)
    if n == 0:
        raise ValueError("an accuracy needs at least one score")
    value = 100 * float(sum(scores)) / n
    if all(score in (0, 1) for score in scores):
        low, high = wilson_interval(int(sum(scores)), n)
        return Figure(value, n, 100 * low, 100 * high, "wilson", protocol=protocol, detail=detail)
    low, high = bootstrap_mean(scores)
    method = "bootstrap"
    if is_point(low, high):
        low, high = alike_interval(value / 100, n)
        method = "wilson"
    return Figure(value, n, 100 * low, 100 * high, method, protocol=protocol, detail=detail)


def grouped_figure(
    scores: Sequence[float], groups: Sequence[Hashable], protocol: str = "", detail: bool = False
) -> Figure:
    """Mean score in percent of questions that come in groups; the bootstrap draws groups.

    Groups of one question each are questions. Where all groups have one mean, the bootstrap would have no
    width: the interval is that of :func:`alike_interval` over the groups then.

    Args:
        scores: One a question.
        groups: The group of each, such as the picture that a caption is of.
        protocol: Printed beside the figure.
        detail: As in :class:`Figure`.
    """
    count = len(set(groups))
    if count == len(groups):
        return accuracy_figure(scores, protocol, detail)
    value = 100 * float(sum(scores)) / len(scores)
    low, high = bootstrap_groups(scores, groups)
    method = "bootstrap over pictures"
    if is_point(low, high):
        low, high = alike_interval(value / 100, count)
        method = "wilson over pictures"
    return Figure(value, len(scores), 100 * low, 100 * high, method, protocol=protocol, detail=detail)


def bootstrap_groups(scores: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """Percentile interval of the mean of scores that come in groups, which are drawn whole.

    Args:
        scores: One a question.
        groups: The group of each.
    """
    place = {group: row for row, group in enumerate(dict.fromkeys(groups))}
    rows = np.fromiter((place[group] for group in groups), dtype=np.int64, count=len(groups))
    sums = np.bincount(rows, weights=np.asarray(scores, dtype=np.float64))
    # Groups of one size and one sum are alike, so that the work does not grow with their number.
    sizes = np.bincount(rows)
    kinds, counts = np.unique(np.stack([sums.round(9), sizes], axis=1), axis=0, return_counts=True)
    return bootstrap_counts(counts.tolist(), lambda drawn: (drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1]))


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion, as fractions."""
    share = right / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == n else centre + half
    return low, high


def alike_interval(value: float, n: int, worst: float = 0.0, best: float = 1.0) -> tuple[float, float]:
    """95 % interval of a mean over n units that all gave the same, where every resample is alike too.

    n units that show nothing else leave room for a share of z² / (n + z²) of others, which is Wilson's upper
    limit of none in n (Wilson 1927, "Probable inference, the law of succession, and statistical inference";
    one-sided it is the rule of three of Hanley and Lippman-Hand 1983, "If nothing goes wrong, is everything
    all right?"). The interval holds what the mean would be if so many units had been the worst that can be,
    or the best. Of right-or-wrong units it is Wilson's.

    Args:
        value: What every unit gave.
        n: How many independent units: pictures, where questions about one go together.
        worst: The least that a unit can give.
        best: The most.
    """
    _, others = wilson_interval(0, n)
    return value - others * (value - worst), value + others * (best - value)


def is_point(low: float, high: float) -> bool:
    """Whether an interval has no width but for rounding; False where it is undefined."""
    return high - low <= 1e-9 * max(1.0, abs(low), abs(high))


def add_intervals(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """95 % interval of a sum of independent figures from their own, which need not be symmetric.

    The distances of the ends from their values add up as squares (MOVER: Zou and Donner 2008, "Construction
    of confidence limits about effect measures: a general approach").

    Args:
        parts: Value, lower end and upper end of each.
    """
    value = sum(part[0] for part in parts)
    below = math.sqrt(sum(max(0.0, part[0] - part[1]) ** 2 for part in parts))
    above = math.sqrt(sum(max(0.0, part[2] - part[0]) ** 2 for part in parts))
    return value - below, value + above


def bootstrap_mean(
    scores: Sequence[float], seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile interval of the mean.

    Drawing n scores with replacement is drawing how often each distinct score comes up, so the work does not
    grow with n.
    """
    values, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    return bootstrap_counts(counts.tolist(), lambda drawn: drawn @ values / len(scores), seed, resamples)


def bootstrap_counts(
    counts: Sequence[int],
    statistic: Callable[[np.ndarray], np.ndarray],
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Percentile interval of a statistic of how often each kind of outcome came up.

    Args:
        counts: How often each of K kinds of outcome was observed.
        statistic: Maps resampled counts (R, K) to R values; values that are not finite are left out.
        seed: Of the resampling.
        resamples: R.
    """
    n = int(sum(counts))
    shares = np.asarray(counts, dtype=np.float64) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)  # (R, K)
    return percentile_interval(statistic(drawn))


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the values that are finite; NaN twice if none is."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return math.nan, math.nan
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's test by the binomial distribution.

    Args:
        only_first: Questions that only the first run got right.
        only_second: Questions that only the second run got right.
    """
    n = only_first + only_second
    if n == 0:
        return 1.0
    # The tail sum is exact in integers, which floats could not hold for thousands of discordant pairs.
    tail = 0
    term = 1
    for k in range(min(only_first, only_second) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * _ratio(tail, n))


def _ratio(numerator: int, power: int) -> float:
    """numerator / 2**power without overflow."""
    shift = max(0, numerator.bit_length() - 64)
    return math.ldexp(float(numerator >> shift), shift - power)
