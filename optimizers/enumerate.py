"""Enumeration of all binary routers: exact where there are few modules.

A shallow router of K = 8 modules has only 2^8 - 1 = 255 states. Trying them all costs about as many calls as
the 200 that MP2 gives Bayesian optimization there, and the result is the optimum by construction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bbprompt.optimizers import bits
from bbprompt.optimizers.checks import checked_count
from bbprompt.optimizers.history import History

__all__ = ["Enumeration"]

_MAX_DIM = 20


class Enumeration:
    """Every non-zero binary row once, in a fixed order; rows told from elsewhere are left out.

    The order is that of `bits.enumerate_bits`: row i holds the binary digits of i, the lowest first.
    """

    def __init__(self, dim: int, batch: int = 1) -> None:
        """List the rows.

        Args:
            dim: width of a row, 1 to 20.
            batch: rows an ask (the last one may hold fewer).

        Raises:
            ValueError: an argument is out of range.
        """
        dim = checked_count("dim", dim, 1)
        if dim > _MAX_DIM:
            raise ValueError(f"dim must be at most {_MAX_DIM}, not {dim}: 2**dim rows would be evaluated")
        self._batch = checked_count("batch", batch, 1)
        self._history = History(dim)
        rows = bits.enumerate_bits(dim)
        # Insertion order is the order of asking; telling a row removes it.
        self._left = dict(zip(bits.keys(rows), rows, strict=True))

    def ask(self) -> NDArray[np.float64]:
        """Return the next `batch` untold rows; see `Optimizer.ask`."""
        if not self._left:
            raise RuntimeError("every binary row was told: nothing is left to ask for")
        self._history.begin()
        rows = [row for row, _ in zip(self._left.values(), range(self._batch), strict=False)]
        return np.array(rows)

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        """Record losses of binary rows; see `Optimizer.tell`."""
        rows, losses = self._history.check(x, loss)
        bits.check_bits(rows)
        for key in bits.keys(rows):
            self._left.pop(key, None)
        self._history.record(rows, losses)

    @property
    def best(self) -> tuple[NDArray[np.float64], float]:
        """Best told row and its loss; see `Optimizer.best`."""
        return self._history.best

    @property
    def stop(self) -> str | None:
        """``"exhausted"`` once every non-zero row was told, else None."""
        return None if self._left else "exhausted"
