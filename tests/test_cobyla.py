"""COBYLA behind ask and tell: the contract, convergence, and no thread left behind."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from scipy.optimize import minimize

from bbprompt.optimizers.cobyla import COBYLA
from bbprompt.testing import OptimizerContract
from bbprompt.testing.losses import sphere


class TestContract(OptimizerContract):
    target = "bbprompt.optimizers.cobyla:COBYLA"
    arguments = {"x0": [0.0, 0.0, 0.0], "step": 0.5}  # noqa: RUF012
    dim = 3
    rounds = 7


def run(search: COBYLA, center: np.ndarray, calls: int) -> int:
    for done in range(calls):
        if search.stop is not None:
            return done
        rows = search.ask()
        search.tell(rows, sphere(rows, center))
    return calls


def test_it_is_scipys_search() -> None:
    center = np.array([0.3, -0.2, 0.7, 0.1])
    asked: list[np.ndarray] = []

    def loss(row: np.ndarray) -> float:
        asked.append(row.copy())
        return float(sphere(row[None], center)[0])

    minimize(loss, np.zeros(4), method="COBYLA", options={"rhobeg": 0.5, "tol": 0.5 * 1e-4, "maxiter": 10**6})
    search = COBYLA(np.zeros(4), 0.5)
    ours = []
    while search.stop is None:
        rows = search.ask()
        ours.append(rows[0])
        search.tell(rows, sphere(rows, center))
    np.testing.assert_array_equal(ours, asked[: len(ours)])
    assert len(asked) == len(ours)
    np.testing.assert_allclose(search.best[0], center, atol=1e-3)
    with pytest.raises(RuntimeError, match="converged"):
        search.ask()


def test_the_first_rows_are_a_simplex() -> None:
    search = COBYLA(np.full(3, 2.0), 0.25)
    rows = []
    for _ in range(4):
        rows.append(search.ask())
        search.tell(rows[-1], [1.0])
    away = np.concatenate(rows)[1:] - 2.0
    np.testing.assert_allclose(np.abs(away), 0.25 * np.eye(3))


def test_foreign_rows_leave_the_simplex_alone() -> None:
    one, other = COBYLA(np.zeros(2), 0.5), COBYLA(np.zeros(2), 0.5)
    other.tell([[3.0, 3.0], [4.0, 4.0]], [-2.0, -1.0])
    center = np.array([0.4, 0.4])
    for _ in range(6):
        rows = one.ask()
        np.testing.assert_array_equal(other.ask(), rows)
        one.tell(rows, sphere(rows, center))
        other.tell(rows, sphere(rows, center))
    assert other.best[1] == -2.0


def test_no_thread_is_left_behind() -> None:
    before = {thread.ident for thread in threading.enumerate()}
    search = COBYLA(np.zeros(3), 0.5)
    run(search, np.ones(3), 5)
    mine = [thread for thread in threading.enumerate() if thread.ident not in before]
    assert [thread.name for thread in mine] == ["cobyla"]
    del search
    gc.collect()
    mine[0].join(5.0)
    assert not mine[0].is_alive()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x0": [[0.0]], "step": 1.0}, "shape"),
        ({"x0": [], "step": 1.0}, "shape"),
        ({"x0": [np.nan], "step": 1.0}, "finite"),
        ({"x0": [0.0], "step": 0.0}, "step"),
        ({"x0": [0.0], "step": np.inf}, "step"),
        ({"x0": [0.0], "step": 1.0, "tolerance": 1.0}, "tolerance"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COBYLA(**arguments)  # type: ignore[arg-type]
