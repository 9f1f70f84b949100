"""Maximising the bound: near the true maximum, inside the domain, never at a known row."""

from __future__ import annotations

import numpy as np
import pytest

from bbprompt.optimizers.acquire import best_in_cube
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
