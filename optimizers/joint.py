"""A large batch of rows proposed together: a pool bred towards high bounds, then a greedy choice from it.

One row after another, as `acquire.py` and `climb.py` find them, costs a search of its own for each row. Here the rows
of a batch share one search. What is left of the search for each is the choice, and that is kriging believer as there
(Ginsbourger et al., 2010): a chosen row is believed to get its predicted target, which moves no mean and lowers the
deviations around it. Deterministic, given the generator, and never a row that is taken.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from bbprompt.optimizers import bits
from bbprompt.optimizers.acquire import best_in_cube
from bbprompt.optimizers.climb import LISTED_DIM, climb
from bbprompt.optimizers.posterior import MIN_VARIANCE, Posterior, matern, squares

__all__ = ["best_together"]

_POOL = 512  # rows drawn, bred a generation, and kept; or one and a half batches if that is more
_STARTS = 4  # of those drawn, how many climb, beside the incumbents
_GENERATIONS = 4
_FLIPS = (1.0, 2.0, 4.0, 8.0)  # coordinates that a child changes, on average
_NEAR = 96  # rows whose joint distribution is followed exactly while some of them are chosen
_SAME = 1e-6  # rows nearer than this in each coordinate of the unit cube count as one


def best_together(
    posterior: Posterior,
    kappa: float,
    count: int,
    taken: NDArray[np.float64],
    incumbents: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    binary: bool,
    forbid_zero: bool,
) -> NDArray[np.float64]:
    """Choose rows of high mean + kappa * deviation, in the order of the choice.

    Args:
        posterior: the model.
        kappa: weight of the standard deviation.
        count: rows wanted.
        taken: rows not to propose, `(n, dim)` in the unit cube.
        incumbents: rows to breed from at first, `(m, dim)`, m >= 1.
        rng: where the randomness comes from.
        binary: rows hold only 0 and 1.
        forbid_zero: whether the zero row is invalid, if binary.

    Returns:
        `(n, dim)`, all different, none taken; n < count only where no more binary rows are left.
    """
    dim = incumbents.shape[1]
    if binary and forbid_zero:
        taken = np.concatenate([taken, np.zeros((1, dim))])
    size = max(_POOL, count + count // 2)
    pool = _drawn(rng, size, taken, binary=binary)
    if len(pool) and (dim > LISTED_DIM or not binary):
        seen, values = set(_keys(np.concatenate([taken, pool]))), posterior.ucb(pool, kappa)
        if binary:
            starts = np.concatenate([incumbents, pool[np.argsort(-values, kind="stable")[:_STARTS]]])
            parents = climb(posterior, kappa, starts, taken)
        else:
            parents = np.concatenate([best_in_cube(posterior, kappa, taken, incumbents, rng)[None], incumbents])
        for generation in range(_GENERATIONS):
            children = _children(rng, parents, size, binary=binary)
            new = _unseen(children if generation else np.concatenate([parents, children]), seen)
            pool, values = np.concatenate([pool, new]), np.concatenate([values, posterior.ucb(new, kappa)])
            kept = np.argsort(-values, kind="stable")[:size]
            pool, values = pool[kept], values[kept]
            parents = pool[: size // 4]
    return pool[_greedy(posterior, kappa, pool, count)]


def _drawn(rng: np.random.Generator, size: int, taken: NDArray[np.float64], *, binary: bool) -> NDArray[np.float64]:
    """Random rows that are not taken; all that are left of up to `LISTED_DIM` bits."""
    dim = taken.shape[1]
    if not binary:
        return rng.random((size, dim))
    return bits.draw(rng, 2**dim if dim <= LISTED_DIM else size, dim, set(bits.keys(taken)), forbid_zero=False)


def _unseen(rows: NDArray[np.float64], seen: set[bytes]) -> NDArray[np.float64]:
    """Those of the rows that were not seen before, each once; they are seen from then on."""
    new = []
    for number, key in enumerate(_keys(rows)):
        if key not in seen:
            seen.add(key)
            new.append(number)
    return rows[new]


def _children(
    rng: np.random.Generator, parents: NDArray[np.float64], count: int, *, binary: bool
) -> NDArray[np.float64]:
    """Breed rows: every second one takes each coordinate from either of two parents, then some are changed."""
    dim = parents.shape[1]
    one, other = parents[rng.integers(0, len(parents), count)], parents[rng.integers(0, len(parents), count)]
    crossed = (rng.random((count, 1)) < 0.5) & (rng.random((count, dim)) < 0.5)
    children: NDArray[np.float64] = np.where(crossed, other, one)
    changed = rng.random((count, dim)) < rng.choice(_FLIPS, (count, 1)) / dim
    if binary:
        children = np.abs(children - changed)
    else:
        steps = 10.0 ** rng.uniform(-3.0, -0.5, (count, 1)) * rng.standard_normal((count, dim))
        children = np.clip(children + changed * steps, 0.0, 1.0)
    return children


def _greedy(posterior: Posterior, kappa: float, pool: NDArray[np.float64], count: int) -> list[int]:
    """Choose from the pool one after another, each believed once it is chosen.

    Beliefs only lower bounds. So the next choice is the best of the `_NEAR` rows of the highest bounds, as long as its
    bound, followed exactly, stays above all bounds outside as they last were (lazy greedy, Minoux, 1978). Then the
    whole pool is brought up to date at once.
    """
    scaled = pool / posterior.hyper.lengthscale
    kernel = posterior.kernel(pool)
    mean = posterior.hyper.mean + kernel @ posterior.alpha
    known = kernel.shape[1]
    white = np.empty((known + count, len(pool)))
    white[:known] = posterior.whiten(kernel)
    variance = 1.0 - np.einsum("ij,ij->j", white[:known], white[:known])
    chosen: list[int] = []
    bounds = _bounds(mean, variance, kappa)
    while len(chosen) < min(count, len(pool)):
        ranked = np.argsort(-bounds, kind="stable")[: _NEAR + 1]
        near, outside = ranked[:_NEAR], bounds[ranked[_NEAR]] if len(ranked) > _NEAR else -np.inf
        held = white[:known]
        covariance = matern(squares(scaled[near], scaled[near])) - held[:, near].T @ held[:, near]
        picks = _followed(mean[near], covariance, kappa, posterior.nugget, outside, count - len(chosen))
        new = near[picks]
        factor = scipy.linalg.cholesky(
            covariance[np.ix_(picks, picks)] + posterior.nugget * np.eye(len(picks)), lower=True, check_finite=False
        )
        cross = matern(squares(scaled[new], scaled)) - held[:, new].T @ held
        added = scipy.linalg.solve_triangular(factor, cross, lower=True, overwrite_b=True, check_finite=False)
        white[known : known + len(new)] = added
        known += len(new)
        variance -= np.einsum("ij,ij->j", added, added)
        chosen += new.tolist()
        bounds = _bounds(mean, variance, kappa)
        bounds[chosen] = -np.inf
    return chosen


def _followed(
    mean: NDArray[np.float64],
    covariance: NDArray[np.float64],
    kappa: float,
    nugget: float,
    outside: float,
    most: int,
) -> list[int]:
    """Which of a few rows are chosen, in order: at least one, and at most `most` of them."""
    picks: list[int] = []
    covariance = covariance.copy()
    bounds = _bounds(mean, np.diagonal(covariance), kappa)
    while len(picks) < min(most, len(mean)):
        best = int(np.argmax(bounds))
        if picks and bounds[best] < outside:
            break
        picks.append(best)
        column = covariance[:, best] / (max(covariance[best, best], MIN_VARIANCE) + nugget) ** 0.5
        covariance -= np.outer(column, column)
        bounds = _bounds(mean, np.diagonal(covariance), kappa)
        bounds[picks] = -np.inf
    return picks


def _bounds(mean: NDArray[np.float64], variance: NDArray[np.float64], kappa: float) -> NDArray[np.float64]:
    bounds: NDArray[np.float64] = mean + kappa * np.sqrt(np.maximum(variance, MIN_VARIANCE))
    return bounds


def _keys(rows: NDArray[np.float64]) -> list[bytes]:
    """One hashable value a row of the unit cube, equal for rows that count as one."""
    return [row.tobytes() for row in np.rint(rows / _SAME).astype(np.int32)]
