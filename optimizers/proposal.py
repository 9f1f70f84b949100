"""A question to a Gaussian process, which rows come next; its answer depends on nothing but the question."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from functools import cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from bbprompt.optimizers.acquire import best_in_cube
from bbprompt.optimizers.climb import best_bits
from bbprompt.optimizers.joint import best_together
from bbprompt.optimizers.posterior import Hyperparameters, Posterior

__all__ = ["JOINT_BATCH", "Fits", "Question"]

JOINT_BATCH = 16
"""Batches of up to so many rows are proposed one row after another (`climb.py`, `acquire.py`), larger ones together
(`joint.py`)."""

_BELIEVED = 128  # rows out to be scored that a large batch keeps away from; they come in the order of their choice


_ROWS = ("fit_rows", "rows", "believed", "taken", "incumbents")


@dataclass(frozen=True, slots=True)
class Question:
    """What a proposal depends on. Rows are in the unit cube, all arrays but `integers` float64.

    Attributes:
        fit_rows: `(f, dim)`, told rows that the hyperparameters are fitted to.
        fit_targets: `(f,)`, theirs.
        kappa: `(1,)`, the weight of the deviation.
        integers: `(7,)` int64: rows wanted; two seeds, of which the first is also that of the fit; whether they are
            proposed together (`joint.py`); whether rows are binary; whether the zero row is invalid; whether each
            dimension has its own lengthscale.
        rows: `(n, dim)`, told.
        targets: `(n,)`, theirs.
        believed: `(b, dim)`, rows that are out, or come before the wanted ones in their batch.
        taken: `(t, dim)`, not to be proposed again.
        incumbents: `(m, dim)`, rows to search around.
    """

    fit_rows: NDArray[np.float64]
    fit_targets: NDArray[np.float64]
    kappa: NDArray[np.float64]
    integers: NDArray[np.int64]
    rows: NDArray[np.float64]
    targets: NDArray[np.float64]
    believed: NDArray[np.float64]
    taken: NDArray[np.float64]
    incumbents: NDArray[np.float64]

    def encode(self) -> bytes:
        """All of it as bytes, equal for equal questions; a binary row takes a byte a coordinate."""
        buffer, binary = io.BytesIO(), bool(self.integers[4])
        for each in fields(self):
            value = getattr(self, each.name)
            np.lib.format.write_array(
                buffer, value.astype(np.uint8) if binary and each.name in _ROWS else value, allow_pickle=False
            )
        return buffer.getvalue()

    @classmethod
    def decode(cls, data: bytes) -> Question:
        """What `encode` wrote."""
        buffer = io.BytesIO(data)
        values = {each.name: np.lib.format.read_array(buffer, allow_pickle=False) for each in fields(cls)}
        return cls(**values | {name: values[name].astype(np.float64) for name in _ROWS})

    def answer(self, fits: Fits) -> NDArray[np.float64]:
        """Rows that maximise the bound, `(n, dim)`; fewer than wanted only where no more binary rows are left."""
        hyper = fits.of(self)
        # Small matrices are slower with several threads, and their number would change the last digits.
        with _libraries().limit(limits=1):
            return self._best(hyper)

    def _best(self, hyper: Hyperparameters) -> NDArray[np.float64]:
        count, *seed, together, binary, forbid_zero, _ = self.integers.tolist()
        kappa, rng = float(self.kappa[0]), np.random.default_rng(seed)
        posterior = Posterior.given(hyper, self.rows, self.targets)
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


class Fits:
    """The hyperparameters that questions ask for; those of the last fit are kept, since most ask for the same."""

    def __init__(self) -> None:
        """Nothing fitted yet."""
        self._last: tuple[bytes, Hyperparameters] | None = None

    def known(self, question: Question) -> Hyperparameters | None:
        """The hyperparameters of a question if they are those of the last fit."""
        return self._last[1] if self._last is not None and self._last[0] == _key(question) else None

    def keep(self, question: Question, hyper: Hyperparameters) -> None:
        """Take the hyperparameters of a question from who has fitted them."""
        self._last = _key(question), hyper

    def of(self, question: Question) -> Hyperparameters:
        """The hyperparameters of a question; fits them where the last question had others."""
        hyper = self.known(question)
        if hyper is None:
            from bbprompt.optimizers import fitting

            seed, ard = int(question.integers[1]), bool(question.integers[6])
            hyper = fitting.fit(question.fit_rows, question.fit_targets, ard=ard, seed=seed)
            self.keep(question, hyper)
        return hyper


def _key(question: Question) -> bytes:
    """What a fit depends on."""
    rows = (np.ascontiguousarray(question.fit_rows), question.fit_targets)
    return b"".join(each.tobytes() for each in (question.integers[[1, 6]], *rows))


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
