"""Intervals and tests against values that are known."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from eval.compare import compare_groups
from eval.intervals import accuracy_figure, bootstrap_mean, grouped_figure, mcnemar_exact, wilson_interval


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
    assert (made.low, made.high) == (100 * low, 100 * high)
    assert made.high - made.low > 15
    # No difference between two runs is another thing.
    same = compare_groups([right] * 40, [right] * 40, [n // 2 for n in range(40)])
    assert (same.low, same.difference, same.high) == (0, 0, 0)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 9), (9, 1), (5, 5), (3, 17)])
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    n = b + c
    expected = min(1.0, 2 * sum(comb(n, k) for k in range(min(b, c) + 1)) / 2**n)
    assert mcnemar_exact(b, c) == pytest.approx(expected)


def test_mcnemar_survives_many_pairs() -> None:
    assert 0 < mcnemar_exact(4800, 5200) < 1e-4
    assert mcnemar_exact(0, 5000) == 0.0
