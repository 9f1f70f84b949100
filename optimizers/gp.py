"""Bayesian optimization: a Gaussian process and its upper confidence bound (UCB).

botorch and gpytorch fit the hyperparameters (`fitting.py`). The posterior of the fitted process is then evaluated
directly (`posterior.py`): the same numbers as botorch's to rounding, many times faster, since an acquisition function
of botorch treats every candidate as a batch of its own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bbprompt.optimizers import bits
from bbprompt.optimizers.aside import Aside
from bbprompt.optimizers.checks import checked_bounds, checked_count, checked_seed
from bbprompt.optimizers.history import History
from bbprompt.optimizers.proposal import JOINT_BATCH, Fits, Question

__all__ = ["ARD_DIM", "GPUCB"]

ARD_DIM = 20
"""Up to this many dimensions each has its own lengthscale, beyond they share one."""

_INCUMBENTS = 3  # best told rows that the acquisition starts from, beside random rows
_GROWTH = 1.2  # at 1.5 searches over 96 bits end 2 % worse

# A large batch leaves no time for more: hyperparameters of the first _FITTED rows, a process given _MODEL rows.
_FITTED = 256
_MODEL = 256


class GPUCB:
    """Gaussian process with UCB, in a box or over binary rows (MP2 tunes its router so, with kappa = 2).

    The model. Rows are scaled to the unit cube and minus the losses standardised; a +inf loss counts as the
    worst finite one. Kernel Matérn-5/2 of unit variance, lengthscale prior LogNormal(sqrt(2) + log(dim)/2,
    sqrt(3)), which expects longer scales in more dimensions (Hvarfner et al., arXiv:2402.02229), noise prior
    LogNormal(-4, 1). Up to `ARD_DIM` dimensions each has a lengthscale of its own. Beyond, the hundred or so
    calls of a router search do not identify them: where the loss depends on all dimensions alike, one shared
    lengthscale predicts better and fits 20 to 40 times faster; where it depends on a dozen of them, separate
    ones do, so `ard` can say otherwise.

    The proposals. While fewer than `n_random` rows were told, by whatever means: the `initial` rows, then a
    scrambled Sobol sequence (random distinct rows if binary). From then on the rows with the highest
    mean + kappa * deviation (`acquire.py`, `climb.py`); within a batch each chosen row is believed to get its
    predicted loss, so that the next one goes elsewhere (kriging believer, Ginsbourger et al., 2010). Told rows
    are never proposed again. Batches of more than `JOINT_BATCH` rows are found by one search (`joint.py`), from the
    best and the latest 128 told rows and hyperparameters of the first 256 at most: a fraction of a millisecond a row.

    With `ahead` an ask believes the rows of the last tell to have got their predicted losses. So the rows after next
    can be worked out while the next ones are scored, fits included, in a process of its own (`aside.py`), and nobody
    waits for either. The price is that each batch learns from the last but one.

    The refits. Hyperparameters are those of the first m told rows, with m = `n_random` grown by a fifth as
    often as it stays below the number told: a dozen fits up to 200 rows, where each is independent of those
    before. `refit_every` sets equal steps instead. An ask thus depends on nothing but arguments and tells.
    """

    def __init__(
        self,
        bounds: ArrayLike,
        seed: int,
        kappa: float = 2.0,
        batch: int = 1,
        initial: ArrayLike | None = None,
        n_random: int = 20,
        binary: bool = False,
        refit_every: int | None = None,
        forbid_zero: bool = True,
        ard: bool | None = None,
        ahead: bool = False,
        aside: Aside | None = None,
    ) -> None:
        """Set up the search.

        Args:
            bounds: `(2, dim)`, lower and upper corner; 0 and 1 if `binary`.
            seed: integer >= 0.
            kappa: standard deviations in the bound, >= 0; botorch calls kappa squared beta.
            batch: rows an ask.
            initial: `(n, dim)` rows to try first, in order, or None.
            n_random: told rows from which on the model proposes, >= 1.
            binary: search {0, 1}^dim instead of the box.
            refit_every: rows between two fits of the hyperparameters, or None for growing steps.
            forbid_zero: in a binary search, never propose the row without any one.
            ard: a lengthscale for each dimension; None for the rule above.
            ahead: make every ask as if the losses of the last tell were not known yet.
            aside: the process that then proposes, where it was started before; None for one of its own.

        Raises:
            ValueError: an argument is out of range.
        """
        self._low, self._high = checked_bounds(bounds, binary=binary)
        dim = len(self._low)
        self._seed = checked_seed(seed)
        if not (math.isfinite(kappa) and kappa >= 0):
            raise ValueError(f"kappa must be finite and >= 0, not {kappa!r}")
        self._kappa = float(kappa)
        self._batch = checked_count("batch", batch, 1)
        self._n_random = checked_count("n_random", n_random, 1)
        self._refit_every = None if refit_every is None else checked_count("refit_every", refit_every, 1)
        self._binary = binary
        self._forbid_zero = forbid_zero
        self._ard = dim <= ARD_DIM if ard is None else ard
        self._initial = {row.tobytes(): row for row in self._checked_initial(initial)}
        self._history = History(dim)
        self._taken: set[bytes] = set()
        self._ahead, self._fits = ahead, Fits()
        self._aside = (aside or Aside()) if ahead else None
        if self._aside is not None:
            self._aside.start()
        from bbprompt.optimizers import fitting  # noqa: F401  what it loads is no part of the first fit

    def ask(self) -> NDArray[np.float64]:
        """Propose `batch` rows (fewer where no more binary rows are left); see `Optimizer.ask`."""
        if self.stop is not None:
            raise RuntimeError("every valid binary row was told: nothing is left to ask for")
        history = self._history
        history.begin()
        rows = self._untold_initial()
        known = history.before if self._ahead else len(history)
        if len(rows) < self._batch:
            if known < self._n_random:
                rng = np.random.default_rng([self._seed, history.tells])
                rows = np.concatenate([rows, self._random(rng, self._batch - len(rows), rows)])
            else:
                question = self._question(known, history.tells, rows, history.rows[known:])
                rows = np.concatenate([rows, self._boxed(self._answered(question))])
        if self._aside is not None and len(history) >= self._n_random:
            self._aside.begin(self._question(len(history), history.tells + 1, rows[:0], rows))
        return rows

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        """Record losses; see `Optimizer.tell`. In a binary search rows must hold only 0 and 1."""
        rows, losses = self._history.check(x, loss)
        if self._binary:
            bits.check_bits(rows)
            valid = rows.any(axis=1) if self._forbid_zero else np.ones(len(rows), dtype=bool)
            self._taken.update(bits.keys(rows[valid]))
        if self._initial:
            for row in rows + 0.0:
                self._initial.pop(row.tobytes(), None)
        self._history.record(rows, losses)

    @property
    def best(self) -> tuple[NDArray[np.float64], float]:
        """Best told row and its loss; see `Optimizer.best`."""
        return self._history.best

    @property
    def stop(self) -> str | None:
        """``"exhausted"`` once every valid binary row was told, else None."""
        total = bits.count_valid(self._history.dim, forbid_zero=self._forbid_zero)
        return "exhausted" if self._binary and len(self._taken) == total else None

    def _checked_initial(self, initial: ArrayLike | None) -> NDArray[np.float64]:
        dim = len(self._low)
        rows = np.empty((0, dim)) if initial is None else np.array(initial, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != dim:
            raise ValueError(f"initial must have shape (n, {dim}), not {rows.shape}")
        if not np.all((rows >= self._low) & (rows <= self._high)):
            raise ValueError("initial holds rows outside the bounds")
        if self._binary:
            if not np.all((rows == 0.0) | (rows == 1.0)):
                raise ValueError("initial must hold only 0 and 1: the search is binary")
            if self._forbid_zero and not rows.any(axis=1).all():
                raise ValueError("initial holds the row without any one, which forbid_zero excludes")
        return rows + 0.0  # turns -0.0 into 0.0

    def _untold_initial(self) -> NDArray[np.float64]:
        """Return the next initial rows, at most a batch, `(n, dim)`."""
        return np.array(list(self._initial.values())[: self._batch]).reshape(-1, self._history.dim)

    def _random(self, rng: np.random.Generator, count: int, chosen: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return rows of the random phase, `(count, dim)`."""
        dim = self._history.dim
        if self._binary:
            taken = self._taken.union(bits.keys(chosen))
            return bits.draw(rng, count, dim, taken, forbid_zero=self._forbid_zero)
        from torch import float64  # which loads for a second, and binary searches do without
        from torch.quasirandom import SobolEngine

        # The sequence's own generator is used, not the global one; rows told so far are its position.
        engine: Any = SobolEngine  # which torch leaves without annotations
        sobol = engine(dim, scramble=True, seed=self._seed)
        if len(self._history) > 0:
            sobol.fast_forward(len(self._history))
        unit = sobol.draw(count, dtype=float64).numpy()
        return np.asarray(self._low + unit * (self._high - self._low), dtype=np.float64)

    def _question(self, known: int, asks: int, first: NDArray[np.float64], out: NDArray[np.float64]) -> Question:
        """What is to be proposed.

        Args:
            known: rows, of those told, whose losses may be used.
            asks: number of tells before the ask, which seeds it.
            first: rows that come first in its batch, `(n, dim)`.
            out: rows that are out to be scored then, or were and are not known yet, `(m, dim)`.
        """
        told, losses = self._history.rows, self._history.losses[:known]
        targets, together = _targets(losses), self._batch > JOINT_BATCH
        size = _fit_size(known, self._n_random, self._refit_every)
        if together:
            size = min(size, _FITTED)
        used = _model_rows(losses) if together else np.arange(known)
        believed = self._unit(np.concatenate([first, out]))
        return Question(
            fit_rows=self._unit(told[:size]),
            fit_targets=_targets(losses[:size]),
            kappa=np.array([self._kappa]),
            integers=np.array(
                [
                    self._batch - len(first),
                    self._seed,
                    asks,
                    together,
                    self._binary,
                    self._forbid_zero,
                    self._ard,
                ],
                dtype=np.int64,
            ),
            rows=self._unit(told[used]),
            targets=targets[used],
            believed=believed,
            taken=np.concatenate([self._unit(told[:known]), believed]),
            incumbents=self._unit(told[np.argsort(losses, kind="stable")[:_INCUMBENTS]]),
        )

    def _answered(self, question: Question) -> NDArray[np.float64]:
        """Rows of the unit cube, `(n, dim)`."""
        return question.answer(self._fits) if self._aside is None else self._aside.answer(question)

    def _boxed(self, unit: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rows of the unit cube as rows of the box."""
        return unit if self._binary else np.clip(self._low + unit * (self._high - self._low), self._low, self._high)

    def _unit(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rows of the box as rows of the unit cube."""
        return rows if self._binary else (rows - self._low) / (self._high - self._low)


def _fit_size(told: int, first: int, every: int | None) -> int:
    """Return how many rows, of those told, the hyperparameters are fitted to."""
    if every is not None:
        return first + (told - first) // every * every
    size = first
    while (larger := max(size + 1, int(size * _GROWTH))) <= told:
        size = larger
    return size


def _model_rows(losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return which told rows, in order, a large batch is proposed from: the best and the latest, half each."""
    latest = np.arange(len(losses))[-(_MODEL // 2) :]
    order = np.argsort(losses, kind="stable")
    best = order[~np.isin(order, latest)][: _MODEL - len(latest)]
    return np.sort(np.concatenate([best, latest]))


def _targets(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn losses `(n,)` into targets to maximise, of mean 0 and variance 1 (all 0 if all are equal)."""
    finite = losses[np.isfinite(losses)]
    if len(finite) == 0:
        return np.zeros(len(losses))
    values = np.minimum(losses, finite.max())
    # The range comes first: it keeps squares of huge or tiny losses within what floats can hold.
    with np.errstate(over="ignore"):
        spread = values.max() - values.min()
    if not np.isfinite(spread):
        values, spread = values / 4.0, values.max() / 4.0 - values.min() / 4.0
    if spread < np.finfo(np.float64).tiny:
        return np.zeros(len(losses))
    scaled = (values - values.min()) / spread
    standard: NDArray[np.float64] = (scaled.mean() - scaled) / scaled.std(ddof=1)
    return standard
