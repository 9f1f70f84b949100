"""The hinge loss against its formula, written as loops; the readout that uses it."""

from __future__ import annotations

import numpy as np
import pytest
import toyruns
from hypothesis import given
from hypothesis import strategies as st

from bbprompt.losses import MARGIN, hinge
from bbprompt.readout import Readout
from bbprompt.testing import ToyOracle


def by_hand(scores: np.ndarray, sizes: list[int], gold: list[int]) -> np.ndarray:
    rows = []
    for candidate in scores:
        row, first = [], 0
        for size, right in zip(sizes, gold, strict=True):
            own = candidate[first : first + size]
            row.append(sum(max(0.0, own[j] - own[right] + 2.0) for j in range(size) if j != right))
            first += size
        rows.append(row)
    return np.array(rows)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=6), st.integers(0, 99))
def test_hinge_is_its_formula(shapes: list[tuple[int, int]], seed: int) -> None:
    sizes = [size for size, _ in shapes]
    gold = [right % size for size, right in shapes]
    scores = np.random.default_rng(seed).normal(0, 3, (3, sum(sizes)))
    np.testing.assert_allclose(hinge(scores, sizes, gold), by_hand(scores, sizes, gold), atol=1e-12)


def test_the_margin() -> None:
    assert MARGIN == 2.0
    assert hinge(np.array([[2.0, 0.0]]), [2], [0])[0, 0] == 0.0
    assert hinge(np.array([[1.5, 0.0]]), [2], [0])[0, 0] == pytest.approx(0.5)
    assert hinge(np.array([[0.0, 0.0]]), [2], [0], margin=3.0)[0, 0] == 3.0


def test_the_readout_takes_either_loss() -> None:
    data, oracle = toyruns.data(6, 0), ToyOracle()
    scores = oracle.score(data.batch, np.random.default_rng(1).normal(size=(2, 3, 4)))
    readout = Readout(loss="hinge")
    expected = hinge(readout.option_scores(scores), data.batch.sizes, data.gold)
    np.testing.assert_array_equal(readout.losses(scores, data.batch, data.gold), expected)
    assert not np.allclose(expected, Readout().losses(scores, data.batch, data.gold))
