"""Where the upper confidence bound of a posterior is highest in the unit cube.

Not exact; deterministic, given the generator, and never a row that is known already.
"""

from __future__ import annotations

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from bbprompt.optimizers.posterior import Posterior

__all__ = ["best_in_cube"]

_RAW = 1024  # rows drawn uniformly
_LOCAL = 128  # rows drawn around each incumbent
_REFINED = 4  # rows from which the gradient is followed
_STEPS = 20  # L-BFGS iterations, enough for the digits that matter in a proposal
_SAME = 1e-6  # rows nearer than this in each coordinate of the unit cube count as one


def best_in_cube(
    posterior: Posterior,
    kappa: float,
    known: NDArray[np.float64],
    incumbents: NDArray[np.float64],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Maximise the bound over the unit cube.

    Scores uniform rows and rows that change some coordinates of an incumbent (about 20 at most: in many
    dimensions a row changed everywhere is no neighbour), then follows the gradient from the best few.

    Args:
        posterior: the model.
        kappa: weight of the standard deviation.
        known: rows not to propose again, `(n, dim)`.
        incumbents: rows to search around, `(m, dim)`, m >= 1.
        rng: where the randomness comes from.

    Returns:
        A row `(dim,)` in the unit cube that is not known.
    """
    dim = known.shape[1]
    pool = np.concatenate([rng.random((_RAW, dim)), *(_neighbours(row, rng) for row in incumbents)])
    pool = pool[_unknown(pool, known)]
    # The uniform rows differ from the known ones with probability one, so the pool is never empty.
    ranked = pool[np.argsort(-posterior.ucb(pool, kappa), kind="stable")]

    def negative(row: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value, gradient = posterior.ucb_gradient(row, kappa)
        return -value, -gradient

    refined = [
        scipy.optimize.minimize(
            negative,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=[(0.0, 1.0)] * dim,
            options={"maxiter": _STEPS},
        ).x
        for start in ranked[:_REFINED]
    ]
    final = np.clip(np.concatenate([np.array(refined), ranked[:1]]), 0.0, 1.0)
    final = final[_unknown(final, known)]
    best: NDArray[np.float64] = final[int(np.argmax(posterior.ucb(final, kappa)))]
    return best


def _neighbours(row: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    dim = len(row)
    scale = 10.0 ** rng.uniform(-3.0, -0.5, size=(_LOCAL, 1))
    changed = rng.random((_LOCAL, dim)) < min(1.0, 20.0 / dim)
    changed[np.arange(_LOCAL), rng.integers(0, dim, size=_LOCAL)] = True
    return np.clip(row + changed * scale * rng.standard_normal((_LOCAL, dim)), 0.0, 1.0)


def _unknown(rows: NDArray[np.float64], known: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rows `(m, dim)` are not among the known `(n, dim)`."""
    fresh = np.ones(len(rows), dtype=bool)
    # The first coordinate alone rules out nearly every pair, cheaply.
    near = np.abs(rows[:, :1] - known[:, 0]) < _SAME
    for i, j in zip(*np.nonzero(near), strict=True):
        if fresh[i] and np.all(np.abs(rows[i] - known[j]) < _SAME):
            fresh[i] = False
    return fresh
