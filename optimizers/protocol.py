"""The interface that every optimizer has: ask for rows, tell their losses."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Optimizer"]


class Optimizer(Protocol):
    """A minimiser over rows of a fixed width, driven from outside.

    An ask is a pure function of the constructor's arguments, the seed and the sequence of tells so far.
    Hence telling the same batches again, with or without the asks in between, restores an optimizer bit for
    bit: a run is resumed by replay, and there is nothing to dump or load. Generators are the optimizer's own:
    the global ones of numpy, random and torch are neither read nor changed.
    """

    def ask(self) -> NDArray[np.float64]:
        """Propose rows to evaluate next.

        Returns:
            `(n, dim)` float64 with n >= 1; a fresh array that the caller may change.

        Raises:
            RuntimeError: an ask is still waiting for its tell, or nothing is left to propose.
        """
        ...

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        """Report losses; this settles the ask that is waiting, if any.

        Args:
            x: `(n, dim)`, n >= 1. The rows asked for, or rows found elsewhere (a warm start).
            loss: `(n,)`, lower is better; +inf marks an infeasible row.

        Raises:
            ValueError: wrong shape, a row that is not finite or not admissible, a loss that is NaN or -inf.
                The optimizer is then unchanged.
        """
        ...

    @property
    def best(self) -> tuple[NDArray[np.float64], float]:
        """The told row `(dim,)` of the lowest loss, and that loss; the earliest one if there are several.

        Raises:
            RuntimeError: nothing was told yet.
        """
        ...

    @property
    def stop(self) -> str | None:
        """Why going on is pointless, or None."""
        ...
