"""Random search: the baseline that every other optimizer has to beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bbprompt.optimizers import bits
from bbprompt.optimizers.checks import checked_bounds, checked_count, checked_seed
from bbprompt.optimizers.history import History

__all__ = ["RandomSearch"]


class RandomSearch:
    """Independent uniform rows in a box, or distinct random binary rows.

    The rows of an ask depend on the seed, the number of tells so far and, for binary rows, on which rows were
    told: those and the zero row are not proposed.
    """

    def __init__(self, bounds: ArrayLike, seed: int, batch: int = 1, binary: bool = False) -> None:
        """Set up the search.

        Args:
            bounds: `(2, dim)`, lower and upper corner; 0 and 1 if `binary`.
            seed: integer >= 0.
            batch: rows an ask.
            binary: search {0, 1}^dim without the zero row instead of the box.

        Raises:
            ValueError: an argument is out of range.
        """
        self._low, self._high = checked_bounds(bounds, binary=binary)
        self._seed = checked_seed(seed)
        self._batch = checked_count("batch", batch, 1)
        self._binary = binary
        self._history = History(len(self._low))
        self._taken: set[bytes] = set()

    def ask(self) -> NDArray[np.float64]:
        """Draw `batch` rows (fewer where no more binary rows are left); see `Optimizer.ask`."""
        if self.stop is not None:
            raise RuntimeError("every binary row was told: nothing is left to ask for")
        history = self._history
        history.begin()
        rng = np.random.default_rng([self._seed, history.tells])
        if self._binary:
            return bits.draw(rng, self._batch, history.dim, self._taken, forbid_zero=True)
        return rng.uniform(self._low, self._high, size=(self._batch, history.dim))

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        """Record losses; see `Optimizer.tell`. In a binary search rows must hold only 0 and 1."""
        rows, losses = self._history.check(x, loss)
        if self._binary:
            bits.check_bits(rows)
            self._taken.update(bits.keys(rows[rows.any(axis=1)]))
        self._history.record(rows, losses)

    @property
    def best(self) -> tuple[NDArray[np.float64], float]:
        """Best told row and its loss; see `Optimizer.best`."""
        return self._history.best

    @property
    def stop(self) -> str | None:
        """``"exhausted"`` once every non-zero binary row was told, else None."""
        if self._binary and len(self._taken) == bits.count_valid(self._history.dim, forbid_zero=True):
            return "exhausted"
        return None
