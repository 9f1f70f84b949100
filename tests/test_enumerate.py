"""Enumeration: the contract, and every non-zero row exactly once."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from bbprompt.optimizers.enumerate import Enumeration
from bbprompt.testing import OptimizerContract, onemax


class TestContract(OptimizerContract):
    target = "bbprompt.optimizers.enumerate:Enumeration"
    arguments: ClassVar = {"dim": 8, "batch": 5}
    dim = 8
    binary = True


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 2, 20, 1000])
def test_all_rows_in_order(dim: int, batch: int) -> None:
    optimizer = Enumeration(dim, batch)
    codes: list[int] = []
    while optimizer.stop is None:
        rows = optimizer.ask()
        assert len(rows) == min(batch, 2**dim - 1 - len(codes))
        codes += [int(row @ 2.0 ** np.arange(dim)) for row in rows]
        optimizer.tell(rows, onemax(rows, np.arange(dim) % 2))
    assert codes == list(range(1, 2**dim))
    with pytest.raises(RuntimeError, match="nothing is left"):
        optimizer.ask()


def test_the_optimum_is_exact() -> None:
    weights = np.random.default_rng(4).normal(size=8)
    optimizer = Enumeration(8, batch=16)
    while optimizer.stop is None:
        rows = optimizer.ask()
        optimizer.tell(rows, rows @ weights)
    row, loss = optimizer.best
    np.testing.assert_array_equal(row, weights < 0)
    assert loss == pytest.approx(weights[weights < 0].sum())


def test_rows_told_from_elsewhere_are_left_out() -> None:
    optimizer = Enumeration(3, batch=10)
    optimizer.tell([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [3.0, 2.0, 1.0])
    codes = [int(row @ [1, 2, 4]) for row in optimizer.ask()]
    assert codes == [2, 3, 4, 5, 7]


def test_an_ask_answered_in_part_comes_again() -> None:
    optimizer = Enumeration(3, batch=4)
    rows = optimizer.ask()
    optimizer.tell(rows[:1], [0.0])
    np.testing.assert_array_equal(optimizer.ask()[:3], rows[1:])


@pytest.mark.parametrize(("dim", "batch"), [(0, 1), (21, 1), (2.0, 1), (2, 0)])
def test_bad_arguments_are_refused(dim: int, batch: int) -> None:
    with pytest.raises(ValueError, match=r"dim|batch"):
        Enumeration(dim, batch)
