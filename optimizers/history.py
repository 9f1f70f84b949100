"""What an optimizer was told: checked, in order, with the best row and the ask that waits."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["History"]


class History:
    """The told rows and losses of one optimizer, and its turn-taking.

    Attributes:
        dim: width of a row.
        before: how many rows were told before the last tell.
        tells: how many tells were recorded; together with the seed it seeds an ask.
        waiting: whether an ask was made that no tell has settled yet.
    """

    def __init__(self, dim: int) -> None:
        """Start with nothing told."""
        self.dim = dim
        self.before = self.tells = 0
        self.waiting = False
        self._rows: NDArray[np.float64] = np.empty((0, dim))
        self._losses: NDArray[np.float64] = np.empty(0)
        self._best = -1

    def __len__(self) -> int:
        """Return how many rows were told."""
        return len(self._losses)

    @property
    def rows(self) -> NDArray[np.float64]:
        """All told rows in order, `(n, dim)`; not to be changed."""
        return self._rows

    @property
    def losses(self) -> NDArray[np.float64]:
        """All told losses in order, `(n,)`, finite or +inf; not to be changed."""
        return self._losses

    @property
    def best(self) -> tuple[NDArray[np.float64], float]:
        """Copy of the told row with the lowest loss (the earliest such row), and that loss.

        Raises:
            RuntimeError: nothing was told yet.
        """
        if self._best < 0:
            raise RuntimeError("best asked before anything was told")
        return self._rows[self._best].copy(), float(self._losses[self._best])

    def begin(self) -> None:
        """Mark an ask as waiting.

        Raises:
            RuntimeError: one is waiting already.
        """
        if self.waiting:
            raise RuntimeError("ask called twice without a tell in between")
        self.waiting = True

    def check(self, x: ArrayLike, loss: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return checked copies of what is about to be told, recording nothing.

        Raises:
            ValueError: wrong shape, a row that is not finite, a loss that is NaN or -inf.
        """
        rows = np.array(x, dtype=np.float64)
        losses = np.array(loss, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.dim or len(rows) < 1:
            raise ValueError(f"x must have shape (n, {self.dim}) with n >= 1, not {rows.shape}")
        if losses.shape != (len(rows),):
            raise ValueError(f"loss must have shape ({len(rows)},) like the rows of x, not {losses.shape}")
        if not np.all(np.isfinite(rows)):
            raise ValueError("x holds values that are not finite")
        if np.any(np.isnan(losses)) or np.any(losses == -np.inf):
            raise ValueError("loss holds NaN or -inf; only finite values and +inf (infeasible) can be told")
        return rows, losses

    def record(self, rows: NDArray[np.float64], losses: NDArray[np.float64]) -> None:
        """Append what `check` returned and settle the ask that waits."""
        start = len(self._losses)
        self._rows = np.concatenate([self._rows, rows])
        self._losses = np.concatenate([self._losses, losses])
        first = start + int(np.argmin(losses))
        if self._best < 0 or self._losses[first] < self._losses[self._best]:
            self._best = first
        self.before = start
        self.tells += 1
        self.waiting = False
