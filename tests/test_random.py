"""Random search: the contract, its ranges, and binary rows without repetition."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from bbprompt.optimizers.random import RandomSearch
from bbprompt.testing import OptimizerContract, onemax


class TestBoxContract(OptimizerContract):
    target = "bbprompt.optimizers.random:RandomSearch"
    arguments: ClassVar = {"bounds": [[-5.0, -1.0, 0.0], [5.0, 1.0, 1e-3]], "seed": 11, "batch": 3}
    dim = 3


class TestBinaryContract(OptimizerContract):
    target = "bbprompt.optimizers.random:RandomSearch"
    arguments: ClassVar = {"bounds": [[0.0] * 24, [1.0] * 24], "seed": 11, "batch": 2, "binary": True}
    dim = 24
    binary = True


def test_rows_fill_the_box() -> None:
    low, high = np.array([-5.0, 2.0]), np.array([5.0, 2.5])
    rows = RandomSearch([low, high], seed=3, batch=4000).ask()
    assert np.all((rows >= low) & (rows <= high))
    np.testing.assert_allclose(rows.mean(axis=0), (low + high) / 2, atol=0.02 * (high - low).max())
    np.testing.assert_allclose(rows.std(axis=0), (high - low) / 12**0.5, rtol=0.05)


def test_seeds_differ() -> None:
    bounds = [[0.0] * 4, [1.0] * 4]
    assert not np.array_equal(RandomSearch(bounds, seed=0).ask(), RandomSearch(bounds, seed=1).ask())


@pytest.mark.parametrize(("dim", "batch"), [(1, 1), (2, 2), (5, 7), (8, 20)])
def test_every_binary_row_comes_once_then_it_stops(dim: int, batch: int) -> None:
    optimizer = RandomSearch([[0.0] * dim, [1.0] * dim], seed=5, batch=batch, binary=True)
    seen: list[bytes] = []
    while optimizer.stop is None:
        rows = optimizer.ask()
        assert rows.any(axis=1).all()
        seen += [row.tobytes() for row in rows]
        optimizer.tell(rows, onemax(rows))
    assert len(seen) == len(set(seen)) == 2**dim - 1
    assert optimizer.stop == "exhausted"
    with pytest.raises(RuntimeError, match="nothing is left"):
        optimizer.ask()
    np.testing.assert_array_equal(optimizer.best[0], np.ones(dim))


def test_told_rows_are_not_drawn_and_the_zero_row_does_not_count() -> None:
    optimizer = RandomSearch([[0.0] * 2, [1.0] * 2], seed=0, batch=3, binary=True)
    optimizer.tell([[0.0, 0.0], [1.0, 0.0]], [1.0, 2.0])
    assert optimizer.stop is None
    assert {tuple(row) for row in optimizer.ask()} == {(0.0, 1.0), (1.0, 1.0)}
    assert optimizer.best[1] == 1.0


def test_binary_tells_hold_bits() -> None:
    optimizer = RandomSearch([[0.0] * 2, [1.0] * 2], seed=0, binary=True)
    with pytest.raises(ValueError, match="only 0 and 1"):
        optimizer.tell([[0.5, 1.0]], [1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounds": [[0.0], [0.0]]}, "below"),
        ({"bounds": [[0.0], [np.inf]]}, "finite"),
        ({"bounds": [[-1e308], [1e308]]}, "finite"),
        ({"bounds": [[np.nan], [1.0]]}, "finite"),
        ({"bounds": [[], []]}, "shape"),
        ({"bounds": [0.0, 1.0]}, "shape"),
        ({"bounds": [[0.0], [1.0], [2.0]]}, "shape"),
        ({"bounds": [[-1.0], [1.0]], "binary": True}, "0 and 1"),
        ({"seed": None}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"batch": 0}, "batch"),
        ({"batch": 2.0}, "batch"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomSearch(**{"bounds": [[0.0], [1.0]], "seed": 0, **arguments})
