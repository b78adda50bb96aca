"""Intervals and tests against values that are known."""

from __future__ import annotations

import math
from math import comb

import numpy as np
import pytest

from eval.compare import compare_groups
from eval.intervals import (
    accuracy_figure,
    add_intervals,
    alike_interval,
    bootstrap_mean,
    grouped_figure,
    is_point,
    mcnemar_exact,
    wilson_interval,
)


def test_wilson_interval_of_a_textbook_case() -> None:
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0


def test_bootstrap_is_seeded_and_as_wide_as_theory_says() -> None:
    scores = [0.0, 0.3, 0.6, 0.9, 1.0] * 400
    low, high = bootstrap_mean(scores)
    assert (low, high) == bootstrap_mean(scores)
    assert (low, high) != bootstrap_mean(scores, seed=1)
    assert high - low == pytest.approx(2 * 1.96 * np.std(scores) / np.sqrt(len(scores)), rel=0.05)


def test_accuracy_chooses_its_interval_by_the_scores() -> None:
    assert accuracy_figure([0.0, 1.0, 1.0]).method == "wilson"
    assert accuracy_figure([0.0, 0.3, 1.0]).method == "bootstrap"
    assert accuracy_figure([0.0, 1.0, 1.0]).value == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="at least one"):
        accuracy_figure([])


def test_groups_of_one_question_are_questions() -> None:
    assert grouped_figure([1, 1, 0], [5, 6, 7], "rule") == accuracy_figure([1, 1, 0], "rule")


@pytest.mark.parametrize("right", [0, 1])
def test_groups_that_are_all_right_or_all_wrong_are_no_certainty(right: int) -> None:
    made = grouped_figure([right] * 40, [n // 2 for n in range(40)])
    low, high = wilson_interval(20 * right, 20)
    assert (made.value, made.n, made.method) == (100 * right, 40, "wilson over pictures")
    assert (made.low, made.high) == (pytest.approx(100 * low), pytest.approx(100 * high))
    assert made.high - made.low > 15
    # No difference between two runs is another thing.
    same = compare_groups([right] * 40, [right] * 40, [n // 2 for n in range(40)])
    assert (same.low, same.difference, same.high) == (0, 0, 0)


def test_groups_with_one_mean_are_no_certainty_either() -> None:
    """Each picture has one of two right, as of a model that always says "yes"."""
    made = grouped_figure([1, 0] * 20, [n // 2 for n in range(40)])
    assert (made.value, made.method) == (50.0, "wilson over pictures")
    share = 1.96**2 / (20 + 1.96**2)
    assert (made.low, made.high) == pytest.approx((50 - 50 * share, 50 + 50 * share), abs=0.01)
    assert grouped_figure([1, 1, 1, 0], [0, 0, 1, 1]).method == "bootstrap over pictures"


def test_soft_scores_that_are_all_the_same_are_no_certainty() -> None:
    made = accuracy_figure([0.3] * 25)
    assert made.method == "wilson"
    assert (made.low, made.high) == pytest.approx((30 - 30 * 0.1332, 30 + 70 * 0.1332), abs=0.01)
    assert accuracy_figure([0.3] * 24 + [0.6]).method == "bootstrap"


@pytest.mark.parametrize("n", [1, 20, 5000])
def test_units_that_are_all_alike_have_wilsons_interval(n: int) -> None:
    assert alike_interval(0.0, n) == pytest.approx(wilson_interval(0, n))
    assert alike_interval(1.0, n) == pytest.approx(wilson_interval(n, n))
    # In other units, and of a difference, which may go either way.
    low, high = alike_interval(0.0, n, -100.0, 100.0)
    assert (low, high) == pytest.approx((-high, 100 * wilson_interval(0, n)[1]))


def test_a_point_is_what_rounding_leaves() -> None:
    assert is_point(1 / 3, 1 / 3 + 1e-16)
    assert is_point(1999.9999999, 1999.9999999 + 1e-9)
    assert not is_point(0.0, 1e-6)
    assert not is_point(math.nan, math.nan)


def test_a_sum_adds_the_squares_of_its_parts_distances() -> None:
    assert add_intervals([(10, 7, 14), (20, 16, 23)]) == (30 - 5, 30 + 5)
    # A percentile interval may miss its value by a rounding error.
    assert add_intervals([(10, 10.1, 14)]) == (10, 14)
    # Independent means: as wide as the sum's own bootstrap.
    rng = np.random.default_rng(3)
    first, second = rng.random(400), 5 * rng.random(90)
    parts = [(float(scores.mean()), *bootstrap_mean(list(scores))) for scores in (first, second)]
    low, high = add_intervals(parts)
    both = np.hypot(first.std() / 20, second.std() / np.sqrt(90))
    assert high - low == pytest.approx(2 * 1.96 * both, rel=0.05)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 9), (9, 1), (5, 5), (3, 17)])
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    n = b + c
    expected = min(1.0, 2 * sum(comb(n, k) for k in range(min(b, c) + 1)) / 2**n)
    assert mcnemar_exact(b, c) == pytest.approx(expected)


def test_mcnemar_survives_many_pairs() -> None:
    assert 0 < mcnemar_exact(4800, 5200) < 1e-4
    assert mcnemar_exact(0, 5000) == 0.0
