"""What an optimizer was told: order, best row, turn-taking, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbprompt.optimizers.history import History

LOSSES = st.lists(st.lists(st.sampled_from([0.0, 1.0, -2.5, 1e300, -1e300, 5e-324, np.inf]), min_size=1))


@given(LOSSES)
def test_best_is_the_first_minimum(batches: list[list[float]]) -> None:
    history = History(1)
    told: list[float] = []
    for losses in batches:
        rows = np.arange(len(told), len(told) + len(losses), dtype=np.float64)[:, None]
        history.record(*history.check(rows, losses))
        told += losses
        row, loss = history.best
        assert loss == min(told)
        assert row[0] == told.index(min(told))
    assert len(history) == len(told)
    assert history.tells == len(batches)
    np.testing.assert_array_equal(history.losses, told)


def test_turns() -> None:
    history = History(2)
    history.begin()
    with pytest.raises(RuntimeError, match="twice"):
        history.begin()
    history.record(*history.check([[0.0, 1.0]], [1.0]))
    history.begin()


def test_best_needs_a_tell() -> None:
    with pytest.raises(RuntimeError, match="before anything"):
        _ = History(2).best


@pytest.mark.parametrize(
    ("x", "loss", "message"),
    [
        ([[0.0, 1.0]], [np.nan], "NaN"),
        ([[0.0, 1.0]], [-np.inf], "-inf"),
        ([[0.0, np.inf]], [1.0], "not finite"),
        ([[0.0, np.nan]], [1.0], "not finite"),
        ([[0.0]], [1.0], r"\(n, 2\)"),
        ([0.0, 1.0], [1.0], r"\(n, 2\)"),
        (np.empty((0, 2)), [], "n >= 1"),
        ([[0.0, 1.0]], 1.0, r"\(1,\)"),
        ([[0.0, 1.0]], [[1.0]], r"\(1,\)"),
        ([[0.0, 1.0]], [1.0, 2.0], r"\(1,\)"),
    ],
)
def test_bad_tells_are_refused(x: object, loss: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        History(2).check(x, loss)
