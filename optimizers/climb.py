"""The binary rows where the upper confidence bound is highest, one after another.

Exact up to `LISTED_DIM` bits; beyond, a climb from several starts to rows that no single flip improves. Deterministic,
given the generator.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bbprompt.optimizers import bits
from bbprompt.optimizers.posterior import MIN_VARIANCE, Posterior, matern, squares

__all__ = ["LISTED_DIM", "best_bits", "climb"]

LISTED_DIM = 12
"""Up to this many bits all rows are scored, so that the maximum is exact."""

_RAW = 1024  # rows drawn uniformly
_STARTS = 6  # of them, how many climb for the first row
_FURTHER = 2  # and for each row after it, beside the ends of the climbs before
_KEPT = 4  # ends of climbs from which the next ones start
_GAIN = 1e-12  # least gain of a step: more than rounding


def best_bits(
    posterior: Posterior,
    kappa: float,
    taken: NDArray[np.float64],
    incumbents: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    forbid_zero: bool,
) -> Iterator[NDArray[np.float64]]:
    """Yield rows that maximise the bound, each believed to get its predicted target once it is out.

    Args:
        posterior: the model.
        kappa: weight of the standard deviation.
        taken: rows not to propose, `(n, dim)` of 0 and 1.
        incumbents: rows to start from, `(m, dim)` of 0 and 1.
        rng: where the randomness comes from.
        forbid_zero: whether the zero row is invalid.

    Yields:
        Valid rows `(dim,)` of 0 and 1, none taken and none twice, for as long as there are any.
    """
    dim = incumbents.shape[1]
    if forbid_zero:
        taken = np.concatenate([taken, np.zeros((1, dim))])
    climbers, starts = incumbents, _STARTS
    while len(drawn := _untaken(rng, taken, dim)):
        pool = _Pool(posterior, drawn)
        while True:
            bounds = pool.bounds(kappa)
            best = int(np.argmax(bounds))
            if bounds[best] == -np.inf:
                break
            row = pool.rows[best]
            if dim > LISTED_DIM:
                tops = pool.rows[np.argsort(-bounds, kind="stable")[:starts]]
                climbers = climb(posterior, kappa, np.concatenate([climbers, tops]), taken)[:_KEPT]
                row, starts = climbers[0], _FURTHER
            yield row
            taken = np.concatenate([taken, row[None]])
            posterior = posterior.believing(row)
            pool.extend(posterior, row)


class _Pool:
    """Rows to choose from; their bounds follow what is chosen and believed.

    Args:
        posterior: the model.
        rows: `(m, dim)`, all different.
    """

    def __init__(self, posterior: Posterior, rows: NDArray[np.float64]) -> None:
        self.rows = rows
        self._scaled = rows / posterior.hyper.lengthscale
        kernel = posterior.kernel(rows)
        self._mean = posterior.hyper.mean + kernel @ posterior.alpha
        self._white = posterior.whiten(kernel)
        self._variance = 1.0 - np.einsum("ij,ij->j", self._white, self._white)

    def bounds(self, kappa: float) -> NDArray[np.float64]:
        """Return the bound of each row, `(m,)`; of those chosen -inf."""
        bounds: NDArray[np.float64] = self._mean + kappa * np.sqrt(np.maximum(self._variance, MIN_VARIANCE))
        return bounds

    def extend(self, posterior: Posterior, row: NDArray[np.float64]) -> None:
        """Take over that `row` was chosen, believed last in `posterior`; that moves no mean."""
        self._mean[(self.rows == row).all(axis=1)] = -np.inf
        kernel = matern(squares(posterior.scaled[-1:], self._scaled))[0]
        white = (kernel - posterior.chol[-1, :-1] @ self._white) / posterior.chol[-1, -1]
        self._white = np.concatenate([self._white, white[None]])
        self._variance = self._variance - white**2


def climb(
    posterior: Posterior, kappa: float, rows: NDArray[np.float64], taken: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Climb from binary rows `(m, dim)` until no flip helps; the different ends, the highest first, `(k, dim)`.

    A step flips the best bit, or several of the best together where that gains more: on the smooth surfaces that many
    dimensions have, half a dozen steps instead of dozens.
    """
    rows = np.unique(rows, axis=0)
    values = np.where(_distances(rows, taken).min(axis=1) == 0, -np.inf, posterior.ucb(rows, kappa))
    active = np.arange(len(rows))
    while len(active) > 0:
        here = rows[active]
        bounds = posterior.ucb_of_flips(here, kappa)
        which, other = np.nonzero(_distances(here, taken) == 1)
        bounds[which, (here[which] != taken[other]).argmax(axis=1)] = -np.inf
        order = np.argsort(-bounds, axis=1, kind="stable")
        improving = (bounds > values[active, None]).sum(axis=1)
        counts = _halvings(int(improving.max(initial=1)))
        places = np.argsort(order, axis=1)  # of each bit in the order
        moved = np.abs(here[:, None] - (places[:, None] < counts[:, None]))
        tops = posterior.ucb(moved.reshape(-1, moved.shape[2]), kappa)
        tops[_distances(moved.reshape(-1, moved.shape[2]), taken).min(axis=1) == 0] = -np.inf
        tops = tops.reshape(moved.shape[:2])
        choice = tops.argmax(axis=1)
        top = tops[np.arange(len(active)), choice]
        # A true gain each time: no climb visits a row twice, hence all of them end.
        better = top > values[active] + _GAIN
        rows[active[better]] = moved[better, choice[better]]
        values[active[better]] = top[better]
        active = active[better]
    ends, first = np.unique(rows, axis=0, return_index=True)
    return ends[np.argsort(-values[first], kind="stable")]


def _halvings(most: int) -> NDArray[np.int64]:
    """1 and `most` halved again and again, in between."""
    counts = [most]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return np.array(counts[::-1])


def _distances(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many bits of rows `(m, dim)` and `(n, dim)` differ, `(m, n)`."""
    distances: NDArray[np.float64] = left.sum(axis=1)[:, None] + right.sum(axis=1) - 2.0 * (left @ right.T)
    return distances


def _untaken(rng: np.random.Generator, taken: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """Rows to choose from: all that are left of up to `LISTED_DIM` bits, else some at random."""
    keys = set(bits.keys(taken))
    if dim > LISTED_DIM:
        return bits.draw(rng, _RAW, dim, keys, forbid_zero=False)
    rows = bits.enumerate_bits(dim, forbid_zero=False)
    return rows[[key not in keys for key in bits.keys(rows)]]
