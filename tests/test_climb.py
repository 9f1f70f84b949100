"""Maximising the bound over bits: the whole list's maximum, a local one beyond, beliefs in a batch, nothing taken."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from bbprompt.optimizers import bits
from bbprompt.optimizers.climb import LISTED_DIM, best_bits
from bbprompt.optimizers.posterior import Hyperparameters, Posterior


def model(rows: np.ndarray, targets: np.ndarray, scale: float) -> Posterior:
    hyper = Hyperparameters(lengthscale=np.full(rows.shape[1], scale), noise=1e-4, mean=0.0)
    return Posterior.given(hyper, rows, (targets - targets.mean()) / targets.std())


def untaken(taken: np.ndarray) -> np.ndarray:
    """All valid rows that are not taken."""
    everything, keys = bits.enumerate_bits(taken.shape[1]), set(bits.keys(taken))
    return everything[[key not in keys for key in bits.keys(everything)]]


@pytest.mark.parametrize(("dim", "better"), [(8, 0), (LISTED_DIM, 0), (LISTED_DIM + 3, 16)])
@pytest.mark.parametrize("seed", range(4))
def test_each_row_of_a_batch_is_the_maximum_of_the_whole_list(dim: int, better: int, seed: int) -> None:
    """Or, where rows climb, among the best 0.2 % of it."""
    rng = np.random.default_rng(seed)
    taken = bits.draw(rng, 40, dim, set(), forbid_zero=True)
    weights = rng.standard_normal(dim)
    posterior = model(taken, taken @ weights + taken[:, 0] * taken[:, 1], dim**0.5)
    for row in islice(best_bits(posterior, 2.0, taken, taken[:3], rng, forbid_zero=True), 4):
        left = untaken(taken)
        assert np.sum(posterior.ucb(left, 2.0) > posterior.ucb(row[None], 2.0) + 1e-10) <= better
        taken, posterior = np.concatenate([taken, row[None]]), posterior.believing(row)


@pytest.mark.parametrize("dim", [24, 96])
@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
def test_beyond_it_is_a_local_maximum_among_the_untaken(dim: int, scale: float) -> None:
    rng = np.random.default_rng(8)
    rows = bits.draw(rng, 50, dim, set(), forbid_zero=True)
    posterior, taken = model(rows, rows @ rng.standard_normal(dim), scale * dim**0.5), rows
    for row in islice(best_bits(posterior, 2.0, rows, rows[:3], rng, forbid_zero=True), 6):
        keys = set(bits.keys(taken))
        assert bits.keys(row[None])[0] not in keys
        flipped = np.abs(row - np.eye(dim))
        flipped = flipped[[key not in keys for key in bits.keys(flipped)]]
        assert posterior.ucb(row[None], 2.0)[0] >= posterior.ucb(flipped, 2.0).max() - 1e-10
        taken, posterior = np.concatenate([taken, row[None]]), posterior.believing(row)


def test_it_beats_a_hundred_times_as_many_random_rows() -> None:
    rng = np.random.default_rng(3)
    rows = bits.draw(rng, 60, 96, set(), forbid_zero=True)
    posterior = model(rows, rows @ rng.standard_normal(96), 96**0.5)
    row = next(best_bits(posterior, 2.0, rows, rows[:3], rng, forbid_zero=True))
    drawn = bits.draw(rng, 100_000, 96, set(), forbid_zero=True)
    assert posterior.ucb(row[None], 2.0)[0] > posterior.ucb(drawn, 2.0).max()


@pytest.mark.parametrize("dim", [6, 13])
@pytest.mark.parametrize("forbid_zero", [True, False])
def test_the_zero_row_is_proposed_only_where_allowed(dim: int, forbid_zero: bool) -> None:
    rows = bits.enumerate_bits(dim)[: 2 * dim]
    posterior = model(rows, -rows.sum(axis=1), dim**0.5)
    found = next(best_bits(posterior, 0.0, rows, rows[:1], np.random.default_rng(0), forbid_zero=forbid_zero))
    assert bool(found.any()) is forbid_zero


@pytest.mark.parametrize("dim", [3, LISTED_DIM + 1])
def test_the_last_untaken_rows_are_found_and_then_none(dim: int) -> None:
    rows = bits.enumerate_bits(dim)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(rows))
    posterior = model(rows[:50], rows[:50].sum(axis=1), dim**0.5)
    found = list(best_bits(posterior, 2.0, rows[order[3:]], rows[order[3:5]], rng, forbid_zero=True))
    assert sorted(bits.keys(np.array(found))) == sorted(bits.keys(rows[order[:3]]))


def test_a_second_pool_is_drawn_where_the_first_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bbprompt.optimizers.climb._RAW", 4)
    dim = LISTED_DIM + 1
    rows = bits.enumerate_bits(dim)
    posterior = model(rows[:50], rows[:50].sum(axis=1), dim**0.5)
    found = list(best_bits(posterior, 2.0, rows[:-30], rows[:2], np.random.default_rng(0), forbid_zero=True))
    assert len(set(bits.keys(np.array(found)))) == len(found) == 30
