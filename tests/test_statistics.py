"""Paired statistics against scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from bbprompt.compare.statistics import holm, interval, mean_sd, paired, signed_rank, step_values


def test_mean_and_sd() -> None:
    assert mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3)))
    mean, sd = mean_sd([0.5])
    assert mean == 0.5
    assert math.isnan(sd)


def test_one_group_has_scipys_bca_interval() -> None:
    values = [0.02, 0.05, -0.01, 0.03, 0.08, 0.01, 0.04]
    rng = np.random.default_rng(20221014)
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=10_000, method="BCa", rng=rng).confidence_interval
    assert interval([values]) == (expected.low, expected.high)
    assert interval([values]) == interval([values])


def test_one_value_has_no_interval_and_equal_values_a_point() -> None:
    assert all(math.isnan(end) for end in interval([[0.3]]))
    assert interval([[0.25, 0.25, 0.25]]) == (0.25, 0.25)


def test_several_groups_draw_groups_then_values() -> None:
    # Without spread inside, the mean over two drawn groups of four is one of ten known values.
    groups = [[0.0] * 3, [1.0] * 5, [2.0], [3.0] * 2]
    low, high = interval(groups)
    sums = np.add.outer(np.add.outer(np.arange(4), np.arange(4)), np.add.outer(np.arange(4), np.arange(4))) / 4
    exact = np.quantile(sums, [0.025, 0.975])
    assert (low, high) == pytest.approx(exact, abs=0.26)
    # Spread inside the groups widens it.
    wider = interval([[value - 1, value + 1] for value in (0.0, 1.0, 2.0, 3.0)])
    assert wider[1] - wider[0] > high - low


def test_groups_of_different_size_count_alike() -> None:
    many, few = [0.0] * 50, [1.0]
    assert paired([many, few]).mean == 0.5
    low, high = interval([many, few])
    assert (low, high) == (0.0, 1.0)


def test_the_interval_covers() -> None:
    """Of 95 % intervals over 8 tasks with 5 seeds each, most hold the truth."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(60):
        truth = rng.normal(0.02, 0.03, 8)
        low, high = interval([(task + rng.normal(0, 0.02, 5)).tolist() for task in truth])
        held += low <= 0.02 <= high
    assert held >= 50


def test_signed_rank_is_wilcoxons() -> None:
    values = [0.5, -0.1, 0.3, 0.2, 0.0, 0.7, -0.4, 0.6]
    expected = scipy.stats.wilcoxon([value for value in values if value]).pvalue
    assert signed_rank(values) == expected
    assert signed_rank([0.0, 0.0]) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_and_keeps_the_order(values: list[float]) -> None:
    corrected = holm(values)
    assert all(value <= now <= 1 for value, now in zip(values, corrected, strict=True))
    order = np.argsort(values, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()


def test_paired() -> None:
    found = paired([[0.1, 0.2], [-0.3, 0.0]])
    assert (found.pairs, found.tasks, found.better, found.worse) == (4, 2, 2, 1)
    assert found.mean == pytest.approx(0.0)
    assert found.low < 0 < found.high


def test_steps() -> None:
    found = step_values([2, 10, 20], [0.5, 0.6, 0.4], [1, 2, 9, 10, 19, 20, 500])
    np.testing.assert_array_equal(found, [np.nan, 0.5, 0.5, 0.6, 0.6, 0.4, 0.4])
