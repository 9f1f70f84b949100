"""Batches proposed together: greedy beliefs, nothing taken, as high as one row after another, to the last row."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from bbprompt.optimizers import bits
from bbprompt.optimizers.climb import LISTED_DIM, best_bits
from bbprompt.optimizers.joint import best_together
from bbprompt.optimizers.posterior import Hyperparameters, Posterior


def model(rows: np.ndarray, targets: np.ndarray, scale: float) -> Posterior:
    hyper = Hyperparameters(lengthscale=np.full(rows.shape[1], scale), noise=1e-3, mean=0.0)
    return Posterior.given(hyper, rows, (targets - targets.mean()) / targets.std())


def together(
    posterior: Posterior, count: int, taken: np.ndarray, *, binary: bool = True, forbid_zero: bool = True
) -> np.ndarray:
    rng = np.random.default_rng(0)
    return best_together(posterior, 2.0, count, taken, taken[:3], rng, binary=binary, forbid_zero=forbid_zero)


@pytest.mark.parametrize("seed", range(3))
def test_of_listed_bits_each_row_is_the_maximum_under_the_beliefs_before_it(seed: int) -> None:
    """The choice follows beliefs lazily; here it is checked against all rows anew each time."""
    rng = np.random.default_rng(seed)
    taken = bits.draw(rng, 40, 9, set(), forbid_zero=True)
    posterior = model(taken, taken @ rng.standard_normal(9) + taken[:, 0] * taken[:, 1], 3.0)
    everything = bits.enumerate_bits(9)
    for row in together(posterior, 120, taken):
        keys = set(bits.keys(taken))
        left = everything[[key not in keys for key in bits.keys(everything)]]
        assert posterior.ucb(row[None], 2.0)[0] >= posterior.ucb(left, 2.0).max() - 1e-9
        taken, posterior = np.concatenate([taken, row[None]]), posterior.believing(row)


@pytest.mark.parametrize("seed", range(2))
def test_a_batch_of_64_is_worth_nearly_as_much_as_one_row_after_another(seed: int) -> None:
    """By the sum of bounds under the beliefs before each, over 96 bits."""
    rng = np.random.default_rng(seed)
    rows = bits.draw(rng, 120, 96, set(), forbid_zero=True)
    first = model(rows, rows @ rng.standard_normal(96) + (rows[:, 1:] * rows[:, :-1]) @ rng.standard_normal(95), 5.0)
    apart = np.array(list(islice(best_bits(first, 2.0, rows, rows[:3], rng, forbid_zero=True), 64)))
    worth = []
    for batch in (apart, together(first, 64, rows)):
        posterior, total = first, 0.0
        for row in batch:
            total += posterior.ucb(row[None], 2.0)[0]
            posterior = posterior.believing(row)
        worth.append(total)
    assert worth[1] > 0.95 * worth[0]


@pytest.mark.parametrize("binary", [True, False])
def test_rows_are_valid_different_and_not_taken(binary: bool) -> None:
    rng = np.random.default_rng(4)
    rows = bits.draw(rng, 80, 30, set(), forbid_zero=True) if binary else rng.random((80, 30))
    found = together(model(rows, rows.sum(axis=1), 5.0), 200, rows, binary=binary)
    assert found.shape == (200, 30)
    assert np.all((found >= 0) & (found <= 1))
    assert not binary or set(np.unique(found)) == {0.0, 1.0}
    assert len(np.unique(np.concatenate([found, rows]), axis=0)) == 280
    assert found.any(axis=1).all()


def test_in_a_box_a_batch_beats_as_many_random_rows() -> None:
    rng = np.random.default_rng(5)
    rows = rng.random((60, 6))
    posterior = model(rows, -((rows - 0.3) ** 2).sum(axis=1), 1.0)
    found = together(posterior, 32, rows, binary=False)
    bound = posterior.ucb(rng.random((20_000, 6)), 2.0)
    assert posterior.ucb(found[:1], 2.0)[0] > bound.max()
    assert posterior.ucb(found, 2.0).mean() > np.sort(bound)[-100]


@pytest.mark.parametrize("forbid_zero", [True, False])
@pytest.mark.parametrize("dim", [6, LISTED_DIM + 1])
def test_the_last_untaken_rows_are_found_and_no_more(dim: int, forbid_zero: bool) -> None:
    rows = bits.enumerate_bits(dim, forbid_zero=forbid_zero)
    order = np.random.default_rng(0).permutation(len(rows))
    posterior = model(rows[:50], rows[:50].sum(axis=1), dim**0.5)
    found = together(posterior, 40, rows[order[20:]], forbid_zero=forbid_zero)
    assert sorted(bits.keys(found)) == sorted(bits.keys(rows[order[:20]]))


def test_the_same_generator_gives_the_same_rows() -> None:
    rows = bits.draw(np.random.default_rng(1), 50, 40, set(), forbid_zero=True)
    posterior = model(rows, rows.sum(axis=1), 5.0)
    np.testing.assert_array_equal(together(posterior, 30, rows), together(posterior, 30, rows))
