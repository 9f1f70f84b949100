"""Binary rows: listing, keys, and drawing without repetition beyond what can be listed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbprompt.optimizers import bits


@pytest.mark.parametrize("dim", [1, 3, 9])
@pytest.mark.parametrize("forbid_zero", [True, False])
def test_listing(dim: int, forbid_zero: bool) -> None:
    rows = bits.enumerate_bits(dim, forbid_zero=forbid_zero)
    assert rows.shape == (bits.count_valid(dim, forbid_zero=forbid_zero), dim)
    assert len(set(bits.keys(rows))) == len(rows)
    assert bool(rows.any(axis=1).all()) is forbid_zero


@given(st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=2, max_size=6))
def test_keys_are_equal_just_for_equal_rows(table: list[list[bool]]) -> None:
    rows = np.array(table, dtype=np.float64)
    found = bits.keys(rows)
    for i, left in enumerate(rows):
        for j, right in enumerate(rows):
            assert (found[i] == found[j]) == np.array_equal(left, right)


@pytest.mark.parametrize("dim", [4, 16, 17, 192])
def test_draws_are_distinct_valid_and_untaken(dim: int) -> None:
    rng = np.random.default_rng(0)
    first = bits.draw(rng, 7, dim, set(), forbid_zero=True)
    taken = set(bits.keys(first))
    second = bits.draw(rng, 8, dim, taken, forbid_zero=True)
    rows = np.concatenate([first, second])
    assert rows.shape == (15, dim)
    assert len(set(bits.keys(rows))) == 15
    assert rows.any(axis=1).all()
    assert bits.draw(rng, 0, dim, taken, forbid_zero=True).shape == (0, dim)


def test_drawing_ends_when_nothing_is_left() -> None:
    rows = bits.enumerate_bits(3)
    taken = set(bits.keys(rows[:5]))
    drawn = bits.draw(np.random.default_rng(0), 10, 3, taken, forbid_zero=True)
    assert sorted(bits.keys(drawn)) == sorted(bits.keys(rows[5:]))
    assert len(bits.draw(np.random.default_rng(0), 10, 3, set(bits.keys(rows)), forbid_zero=True)) == 0
    assert len(bits.draw(np.random.default_rng(0), 10, 3, set(), forbid_zero=False)) == 8


@pytest.mark.parametrize("bad", [0.5, -1.0, 2.0, 1e-300])
def test_other_values_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="only 0 and 1"):
        bits.check_bits(np.array([[1.0, bad]]))
