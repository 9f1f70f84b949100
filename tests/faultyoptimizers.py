"""Random search with one fault each, to show that the optimizer contract sees it."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bbprompt.optimizers.random import RandomSearch

Floats = NDArray[np.float64]


class Sound:
    """Three rows an ask in [-1, 1]^2, without a fault; the others change one thing."""

    def __init__(self) -> None:
        self.inner = RandomSearch([[-1.0, -1.0], [1.0, 1.0]], seed=0, batch=3)

    def ask(self) -> Floats:
        return self.inner.ask()

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        self.inner.tell(x, loss)

    @property
    def best(self) -> tuple[Floats, float]:
        return self.inner.best

    @property
    def stop(self) -> str | None:
        return self.inner.stop


class FlatRow(Sound):
    def ask(self) -> Floats:
        return super().ask()[0]


class SinglePrecision(Sound):
    def ask(self) -> Floats:
        return super().ask().astype(np.float32)


class Unseeded(Sound):
    def ask(self) -> Floats:
        return super().ask() + np.random.default_rng().random((3, 2))


class HashSeeded(Sound):
    def ask(self) -> Floats:
        return super().ask() + hash("salted")


class CountsAsks(Sound):
    """Depends on how often it was asked, so that a replay of the tells alone goes another way."""

    asks = 0

    def ask(self) -> Floats:
        self.asks += 1
        return super().ask() + self.asks


class AsksTwice(Sound):
    def ask(self) -> Floats:
        self.inner._history.waiting = False
        return super().ask()


class TakesNan(Sound):
    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        super().tell(x, np.nan_to_num(loss))


class RefusesTooLate(Sound):
    """Counts a tell before it looks at it."""

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        self.inner._history.tells += 1
        super().tell(x, loss)


class ReadsNumpy(Sound):
    def ask(self) -> Floats:
        return super().ask() + np.random.random()


class SeedsNumpy(Sound):
    def ask(self) -> Floats:
        np.random.seed(0)
        return super().ask()


class ReadsRandom(Sound):
    def ask(self) -> Floats:
        return super().ask() + random.random()


class RefusesInf(Sound):
    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        if not np.all(np.isfinite(loss)):
            raise ValueError("not finite")
        super().tell(x, loss)


class StopsWhenFlat(Sound):
    flat = False

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        self.flat = float(np.ptp(np.asarray(loss))) == 0.0
        super().tell(x, loss)

    @property
    def stop(self) -> str | None:
        return "flat" if self.flat else None


class LatestIsBest(Sound):
    latest: tuple[Floats, float] | None = None

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        super().tell(x, loss)
        self.latest = np.array(x)[-1], float(np.asarray(loss)[-1])

    @property
    def best(self) -> tuple[Floats, float]:
        return self.latest or super().best


class ForgetsForeign(Sound):
    """Takes only rows that it asked for."""

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        if self.inner._history.waiting:
            super().tell(x, loss)


class KeepsReferences(Sound):
    kept: tuple[Floats, float] | None = None

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        super().tell(x, loss)
        if isinstance(x, np.ndarray) and (self.kept is None or super().best[1] < self.kept[1]):
            self.kept = x[int(np.argmin(loss))], super().best[1]

    @property
    def best(self) -> tuple[Floats, float]:
        return self.kept or super().best


class GivesItsOwnArray(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.shared = np.zeros((3, 2))

    def ask(self) -> Floats:
        super().ask()
        return self.shared
