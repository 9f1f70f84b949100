"""Maximising the bound: near the true maximum, inside the domain, never at a known row."""

from __future__ import annotations

import numpy as np
import pytest

from bbprompt.optimizers import bits
from bbprompt.optimizers.acquire import LISTED_DIM, best_bits, best_in_cube
from bbprompt.optimizers.posterior import Hyperparameters, Posterior


def model(rows: np.ndarray, targets: np.ndarray, scale: float) -> Posterior:
    hyper = Hyperparameters(lengthscale=np.full(rows.shape[1], scale), noise=1e-4, mean=0.0)
    return Posterior.given(hyper, rows, (targets - targets.mean()) / targets.std())


@pytest.mark.parametrize("dim", [1, 2])
def test_cube_maximum_equals_that_of_a_fine_grid(dim: int) -> None:
    rng = np.random.default_rng(1)
    rows = rng.random((6 * dim, dim))
    posterior = model(rows, -((rows - 0.3) ** 2).sum(axis=1), 0.4)
    axis = np.linspace(0, 1, 301)
    grid = np.stack(np.meshgrid(*[axis] * dim), axis=-1).reshape(-1, dim)
    found = best_in_cube(posterior, 1.0, rows, rows[:2], rng)
    assert posterior.ucb(found[None], 1.0)[0] >= posterior.ucb(grid, 1.0).max() - 1e-6


@pytest.mark.parametrize("dim", [8, 96])
def test_cube_maximum_beats_all_it_sampled(dim: int) -> None:
    rows = np.random.default_rng(2).random((30, dim))
    posterior = model(rows, -((rows - 0.4) ** 2).sum(axis=1), dim**0.5 / 2)
    found = best_in_cube(posterior, 2.0, rows, rows[:3], np.random.default_rng(3))
    assert np.all((found >= 0) & (found <= 1))
    sampled = np.random.default_rng(4).random((20_000, dim))
    assert posterior.ucb(found[None], 2.0)[0] > posterior.ucb(sampled, 2.0).max()


def test_known_corner_is_not_proposed_again() -> None:
    corner = np.ones(3)
    rows = np.concatenate([corner[None], np.random.default_rng(0).random((12, 3)) * 0.8])
    posterior = model(rows, rows.sum(axis=1), 2.0)
    known = rows
    for turn in range(5):
        found = best_in_cube(posterior, 0.0, known, known[:1], np.random.default_rng(turn))
        assert np.abs(known - found).max(axis=1).min() >= 1e-6
        known = np.concatenate([known, found[None]])


@pytest.mark.parametrize("dim", [LISTED_DIM, LISTED_DIM + 2])
def test_bits_maximum_is_that_of_the_whole_list(dim: int) -> None:
    rng = np.random.default_rng(7)
    rows = bits.draw(rng, 40, dim, set(), forbid_zero=True)
    weights = rng.standard_normal(dim)
    posterior = model(rows, rows @ weights + rows[:, 0] * rows[:, 1], dim**0.5)
    taken = set(bits.keys(rows))
    everything = bits.enumerate_bits(dim)
    untaken = everything[[key not in taken for key in bits.keys(everything)]]
    found = best_bits(posterior, 2.0, taken, rows[:3], rng, forbid_zero=True)
    assert posterior.ucb(found[None], 2.0)[0] == pytest.approx(posterior.ucb(untaken, 2.0).max(), abs=1e-12)


@pytest.mark.parametrize("dim", [24, 96])
def test_bits_are_a_local_maximum_among_the_untaken(dim: int) -> None:
    rng = np.random.default_rng(8)
    rows = bits.draw(rng, 50, dim, set(), forbid_zero=True)
    posterior = model(rows, rows @ rng.standard_normal(dim), dim**0.5)
    taken = set(bits.keys(rows))
    for _ in range(4):
        found = best_bits(posterior, 2.0, taken, rows[:3], rng, forbid_zero=True)
        assert bits.keys(found[None])[0] not in taken
        flipped = np.abs(found - np.eye(dim))
        flipped = flipped[[key not in taken for key in bits.keys(flipped)]]
        assert posterior.ucb(found[None], 2.0)[0] >= posterior.ucb(flipped, 2.0).max() - 1e-12
        taken.add(bits.keys(found[None])[0])


@pytest.mark.parametrize("dim", [6, 13])
@pytest.mark.parametrize("forbid_zero", [True, False])
def test_the_zero_row_is_proposed_only_where_allowed(dim: int, forbid_zero: bool) -> None:
    rows = bits.enumerate_bits(dim)[: 2 * dim]
    posterior = model(rows, -rows.sum(axis=1), dim**0.5)
    found = best_bits(posterior, 0.0, set(bits.keys(rows)), rows[:1], np.random.default_rng(0), forbid_zero=forbid_zero)
    assert bool(found.any()) is forbid_zero


def test_the_last_untaken_rows_are_found() -> None:
    dim = LISTED_DIM + 1
    rows = bits.enumerate_bits(dim)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(rows))
    posterior = model(rows[:50], rows[:50].sum(axis=1), dim**0.5)
    taken = set(bits.keys(rows[order[3:]]))
    for _ in range(3):
        found = best_bits(posterior, 2.0, taken, rows[order[3:5]], rng, forbid_zero=True)
        key = bits.keys(found[None])[0]
        assert key not in taken
        taken.add(key)
    assert len(taken) == 2**dim - 1
