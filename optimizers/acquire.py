"""Where the upper confidence bound of a posterior is highest: in the unit cube, or over binary rows.

Nothing here is exact except the binary search up to `LISTED_DIM` modules; all of it is deterministic, given
the generator, and never proposes a row that is known already.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from bbprompt.optimizers import bits
from bbprompt.optimizers.posterior import Posterior

__all__ = ["LISTED_DIM", "best_bits", "best_in_cube"]

LISTED_DIM = 10
"""Up to this many modules all binary rows are scored, so that the maximum is exact."""

_RAW = 1024  # rows drawn uniformly
_LOCAL = 128  # rows drawn around each incumbent
_REFINED = 4  # rows from which the gradient is followed
_STEPS = 20  # L-BFGS iterations, enough for the digits that matter in a proposal
_STARTS = 6  # random starts of the bit-flip climb, beside the incumbents
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


def best_bits(
    posterior: Posterior,
    kappa: float,
    taken: Collection[bytes],
    incumbents: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    forbid_zero: bool,
) -> NDArray[np.float64]:
    """Maximise the bound over binary rows that are not taken.

    Up to `LISTED_DIM` modules all rows are scored; beyond, random rows and the incumbents climb by the best
    of all single flips until none helps.

    Args:
        posterior: the model.
        kappa: weight of the standard deviation.
        taken: `bits.keys` of the rows not to propose; at least one valid row is left.
        incumbents: rows to start from, `(m, dim)` of 0 and 1.
        rng: where the randomness comes from.
        forbid_zero: whether the zero row is invalid.

    Returns:
        A row `(dim,)` of 0 and 1 that is valid and not taken.
    """
    dim = incumbents.shape[1]
    if dim <= LISTED_DIM:
        rows = bits.enumerate_bits(dim, forbid_zero=forbid_zero)
        rows = rows[[key not in taken for key in bits.keys(rows)]]
        exact: NDArray[np.float64] = rows[int(np.argmax(posterior.ucb(rows, kappa)))]
        return exact
    excluded = set(taken)
    if forbid_zero:
        excluded.add(bits.keys(np.zeros((1, dim)))[0])
    fresh = bits.draw(rng, _RAW, dim, excluded, forbid_zero=forbid_zero)
    order = np.argsort(-posterior.ucb(fresh, kappa), kind="stable")[:_STARTS]
    rows = np.concatenate([fresh[order], incumbents])
    values = _bound_or_minus_infinity(posterior, kappa, rows, excluded)
    flips = np.eye(dim, dtype=bool)
    active = np.arange(len(rows))
    while len(active) > 0:
        neighbours = (rows[active, None, :].astype(bool) ^ flips).astype(np.float64)
        bounds = _bound_or_minus_infinity(posterior, kappa, neighbours.reshape(-1, dim), excluded)
        bounds = bounds.reshape(len(active), dim)
        choice = np.argmax(bounds, axis=1)
        top = bounds[np.arange(len(active)), choice]
        # A strict gain each time: no climb visits a row twice, hence all of them end.
        better = top > values[active]
        rows[active[better]] = neighbours[better, choice[better]]
        values[active[better]] = top[better]
        active = active[better]
    # `fresh` starts are untaken and climbs only move to untaken rows, so the best value is finite.
    best: NDArray[np.float64] = rows[int(np.argmax(values))]
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


def _bound_or_minus_infinity(
    posterior: Posterior, kappa: float, rows: NDArray[np.float64], excluded: Collection[bytes]
) -> NDArray[np.float64]:
    bounds = posterior.ucb(rows, kappa)
    bounds[[key in excluded for key in bits.keys(rows)]] = -np.inf
    return bounds
