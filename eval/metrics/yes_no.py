"""Reading yes and no out of an answer, and the figures of POPE and MME."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from eval.intervals import (
    RESAMPLES,
    SEED,
    Figure,
    alike_interval,
    bootstrap_counts,
    is_point,
    percentile_interval,
    wilson_interval,
)

# Kinds of outcome: gold yes said yes / no / neither, gold no said yes / no / neither.
KINDS = (("yes", "yes"), ("yes", "no"), ("yes", ""), ("no", "yes"), ("no", "no"), ("no", ""))


def read_pope_llava(answer: str) -> str:
    """LLaVA's (and POPE's own) rule: the first sentence says "no" if it has the word No, no or not."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def read_exact(answer: str) -> str:
    """The strict rule, lmms-eval's: the whole answer is the word, in any case; "" otherwise."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else ""


def read_mme(answer: str) -> str:
    """MME's official rule: "yes" or else "no" within the first four characters; "" otherwise."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "")


RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def binary_rates(counts: np.ndarray, forgiving_recall: bool) -> dict[str, np.ndarray]:
    """The five rates, as fractions, of counts (..., 6) of `KINDS`; NaN where nothing is to divide by."""
    yes_yes, yes_no, yes_other, no_yes, no_no, _ = np.moveaxis(counts.astype(np.float64), -1, 0)  # 6 x (...)
    total = counts.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = yes_yes / (yes_yes + no_yes)
        missed = yes_no + (0 if forgiving_recall else yes_other)
        recall = yes_yes / (yes_yes + missed)
        # Without a true "yes" it is 0, which the harmonic mean of both, 0 / 0, would not say of a resample.
        f1 = 2 * yes_yes / (2 * yes_yes + no_yes + missed)
        rates = ((yes_yes + no_no) / total, precision, recall, f1, (yes_yes + no_yes) / total)
    return dict(zip(RATES, rates, strict=True))


def binary_figures(
    pairs: Sequence[tuple[str, str]], protocol: str, forgiving_recall: bool = False
) -> dict[str, Figure]:
    """Accuracy, precision, recall, F1 and the share of "yes" among the answers, in percent.

    Args:
        pairs: (gold, said), gold "yes" or "no", said "yes", "no" or "".
        protocol: Printed beside the figures.
        forgiving_recall: True leaves answers that are neither out of the recall, as lmms-eval does.
    """
    counts = _count(pairs)
    n = len(pairs)
    figures = {}
    for name, value in binary_rates(counts, forgiving_recall).items():
        if name in ("accuracy", "yes_ratio"):
            method = "wilson"
            low, high = wilson_interval(int(counts[0] + counts[4 if name == "accuracy" else 3]), n)
        else:
            method = "bootstrap"
            low, high = bootstrap_counts(counts.tolist(), _rate(name, forgiving_recall))
            if is_point(low, high):
                method = "wilson"
                low, high = alike_interval(float(value), _count_counted(name, counts, forgiving_recall))
        figures[name] = Figure(100 * _number(value), n, 100 * low, 100 * high, method, protocol=protocol)
    return figures


def mean_figures(
    groups: Sequence[Sequence[tuple[str, str, str]]], protocol: str, forgiving_recall: bool = False
) -> dict[str, Figure]:
    """Accuracy and F1 averaged over groups of questions about the same pictures.

    The groups share pictures and half of their questions, so the bootstrap draws pictures.

    Args:
        groups: For each group, (picture, gold, said).
        protocol: Printed beside the figures.
        forgiving_recall: See `binary_figures`.
    """
    pictures = {
        name: row for row, name in enumerate(dict.fromkeys(p for group in groups for p, _, _ in group))
    }
    counts = np.zeros((len(pictures), len(groups), len(KINDS)))
    for column, group in enumerate(groups):
        for picture, gold, said in group:
            counts[pictures[picture], column, KINDS.index((gold, said))] += 1
    weights = np.random.default_rng(SEED).multinomial(
        len(pictures), np.full(len(pictures), 1 / len(pictures)), size=RESAMPLES // 5
    )
    drawn = np.einsum("rp,pgk->rgk", weights.astype(np.float64), counts)
    values = binary_rates(counts.sum(0), forgiving_recall)
    spreads = binary_rates(drawn, forgiving_recall)
    n = sum(len(group) for group in groups)
    figures = {}
    for name in ("accuracy", "f1"):
        low, high = percentile_interval(spreads[name].mean(-1))
        mean = float(np.mean([_number(v) for v in values[name]]))
        method = "bootstrap over pictures"
        if is_point(low, high):
            method = "wilson over pictures"
            low, high = alike_interval(mean, len(pictures))
        figures[name] = Figure(100 * mean, n, 100 * low, 100 * high, method, protocol=protocol)
    return figures


def _rate(name: str, forgiving_recall: bool) -> Callable[[np.ndarray], np.ndarray]:
    return lambda drawn: binary_rates(drawn, forgiving_recall)[name]


def _count_counted(name: str, counts: np.ndarray, forgiving_recall: bool) -> int:
    """How many answers a rate counts: said yes, gold yes, or either for F1."""
    yes_yes, yes_no, yes_other, no_yes, _, _ = counts.tolist()
    missed = yes_no + (0 if forgiving_recall else yes_other)
    return int(yes_yes + (no_yes if name != "recall" else 0) + (missed if name != "precision" else 0))


def _count(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    return np.array([sum(pair == kind for pair in pairs) for kind in KINDS])


def _number(value: np.ndarray) -> float:
    return 0.0 if math.isnan(float(value)) else float(value)
