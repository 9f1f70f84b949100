"""A question to a fitted Gaussian process, which rows come next; its answer depends on nothing but the question."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from bbprompt.optimizers.acquire import best_in_cube
from bbprompt.optimizers.climb import best_bits
from bbprompt.optimizers.joint import best_together
from bbprompt.optimizers.posterior import Hyperparameters, Posterior

__all__ = ["JOINT_BATCH", "Question"]

JOINT_BATCH = 16
"""Batches of up to so many rows are proposed one row after another (`climb.py`, `acquire.py`), larger ones together
(`joint.py`)."""

_BELIEVED = 128  # rows out to be scored that a large batch keeps away from; they come in the order of their choice


@dataclass(frozen=True, slots=True)
class Question:
    """What a proposal depends on. Rows are in the unit cube, all arrays float64.

    Attributes:
        lengthscale: `(dim,)`, of the process; see `Hyperparameters`.
        numbers: `(3,)`: noise and mean of the process, and kappa, the weight of the deviation.
        integers: `(6,)` int64: rows wanted; two seeds; whether they are proposed together (`joint.py`); whether rows
            are binary; whether the zero row is invalid.
        rows: `(n, dim)`, told.
        targets: `(n,)`, theirs.
        believed: `(b, dim)`, rows that are out, or come before the wanted ones in their batch.
        taken: `(t, dim)`, not to be proposed again.
        incumbents: `(m, dim)`, rows to search around.
    """

    lengthscale: NDArray[np.float64]
    numbers: NDArray[np.float64]
    integers: NDArray[np.int64]
    rows: NDArray[np.float64]
    targets: NDArray[np.float64]
    believed: NDArray[np.float64]
    taken: NDArray[np.float64]
    incumbents: NDArray[np.float64]

    def encode(self) -> bytes:
        """All of it as bytes, equal for equal questions."""
        buffer = io.BytesIO()
        for each in fields(self):
            np.lib.format.write_array(buffer, getattr(self, each.name), allow_pickle=False)
        return buffer.getvalue()

    @classmethod
    def decode(cls, data: bytes) -> Question:
        """What `encode` wrote."""
        buffer = io.BytesIO(data)
        return cls(*(np.lib.format.read_array(buffer, allow_pickle=False) for _ in fields(cls)))

    def answer(self) -> NDArray[np.float64]:
        """Rows that maximise the bound, `(n, dim)`; fewer than wanted only where no more binary rows are left."""
        count, *seed, together, binary, forbid_zero = self.integers.tolist()
        noise, mean, kappa = self.numbers.tolist()
        rng = np.random.default_rng(seed)
        posterior = Posterior.given(Hyperparameters(self.lengthscale, noise, mean), self.rows, self.targets)
        if together:
            posterior = posterior.believing_all(self.believed[:_BELIEVED])
            return best_together(
                posterior,
                kappa,
                count,
                self.taken,
                self.incumbents,
                rng,
                binary=bool(binary),
                forbid_zero=bool(forbid_zero),
            )
        for row in self.believed:
            posterior = posterior.believing(row)
        if binary:
            found = best_bits(posterior, kappa, self.taken, self.incumbents, rng, forbid_zero=bool(forbid_zero))
            return np.array(list(islice(found, count))).reshape(-1, self.taken.shape[1])
        taken = self.taken
        for _ in range(count):
            row = best_in_cube(posterior, kappa, taken, self.incumbents, rng)
            taken, posterior = np.concatenate([taken, row[None]]), posterior.believing(row)
        return taken[len(self.taken) :]
