"""Intervals and tests against values that are known."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from eval.intervals import accuracy_figure, bootstrap_mean, mcnemar_exact, wilson_interval


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


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 9), (9, 1), (5, 5), (3, 17)])
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    n = b + c
    expected = min(1.0, 2 * sum(comb(n, k) for k in range(min(b, c) + 1)) / 2**n)
    assert mcnemar_exact(b, c) == pytest.approx(expected)


def test_mcnemar_survives_many_pairs() -> None:
    assert 0 < mcnemar_exact(4800, 5200) < 1e-4
    assert mcnemar_exact(0, 5000) == 0.0
