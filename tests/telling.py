"""Optimizers of random sizes under random and extreme losses: asked, told, replayed.

What they give out is finite and inside the bounds, steps stay within reason or a reason to stop is named, NaN is
refused without a trace, and another optimizer that is told the same goes the same way.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np

from bbprompt.optimizers.cmaes import CMAES
from bbprompt.optimizers.gp import GPUCB

EXTREMES = (0.0, -0.0, 1.0, 1.0, 5e-324, 1e-300, 1e300, -1e300, 1.7e308, -1.7e308, float("inf"))


def cmaes(random_: random.Random) -> CMAES:
    """Of any size, scale and rule, with bounds or without."""
    dim, popsize = random_.choice([1, 2, 3, 7, 40, 300]), random_.choice([2, 3, 5, 20, 60])
    sigma, bounded = 10 ** random_.uniform(-20, 20), random_.random() < 0.3
    bounds = np.outer([-2.0 * sigma, 3.0 * sigma], np.ones(dim)) if bounded else None
    return CMAES(np.zeros(dim), sigma, seed=random_.randrange(2**31), popsize=popsize, bounds=bounds)


def gp(random_: random.Random) -> GPUCB:
    """In a box of any size, or over bits."""
    dim, size, binary = random_.choice([1, 2, 5, 12]), 10 ** random_.uniform(-8, 8), random_.random() < 0.3
    box = np.outer([0.0, 1.0] if binary else [-size, 2.0 * size], np.ones(dim))
    seed, rounds = random_.randrange(2**31), random_.choice([1, 3])
    return GPUCB(box, seed=seed, n_random=random_.choice([1, 4]), binary=binary, refit_every=rounds)


def losses(rows: np.ndarray, scale: float, random_: random.Random) -> np.ndarray:
    """A bowl in any unit, noise, ties, or extremes."""
    bowl = np.sum((rows / scale) ** 2, axis=1)
    match random_.randrange(5):
        case 0:
            return bowl * 10 ** random_.uniform(-300, 290)
        case 1:
            return np.array([random_.choice(EXTREMES) for _ in rows])
        case 2:
            return np.full(len(rows), random_.choice(EXTREMES))
        case 3:
            return np.round(bowl, 1)
    return np.where(np.arange(len(rows)) % 3 == 0, random_.choice(EXTREMES), bowl)


def walk(make: Any, seed: str, rounds: int) -> Counter[str]:
    """One optimizer and its replay, for so many rounds or until it stops."""
    random_ = random.Random(seed)
    drawn = random_.getstate()
    optimizer = make(random_)
    random_.setstate(drawn)
    twin = make(random_)
    told, scale = Counter[str](), 0.0
    for turn in range(rounds):
        if optimizer.stop is not None:
            told["stopped"] += 1
            break
        rows = optimizer.ask()
        assert np.isfinite(rows).all(), "a row that is not finite"
        scale = scale or float(np.abs(rows).max()) or 1.0
        values = losses(rows, scale, random_)
        if turn == 1:
            for bad in (np.full(len(rows), np.nan), np.full(len(rows), -np.inf)):
                try:
                    optimizer.tell(rows, bad)
                except ValueError:
                    told["refused"] += 1
                else:
                    raise AssertionError(f"{bad[0]} was taken for a loss")
        optimizer.tell(rows, values)
        twin.tell(rows, values)  # never asked: as a resumed run replays its journal
        told["rounds"] += 1
        assert optimizer.best[1] == twin.best[1], "a replay ends elsewhere"
        if isinstance(optimizer, CMAES):
            assert np.isfinite(optimizer.mean).all(), "a mean that is not finite"
            assert 1e-45 < optimizer.sigma < 1e45 or optimizer.stop, f"sigma {optimizer.sigma} without a reason to stop"
    if optimizer.stop is None:
        assert np.array_equal(optimizer.ask(), twin.ask()), "a replay goes another way"
    return told


def walks(evolution: int, bayes: int, seed: int) -> dict[str, Any]:
    """So many of either kind; the counts."""
    counts: Counter[str] = Counter()
    for make, number, rounds in ((cmaes, evolution, 30), (gp, bayes, 8)):
        for turn in range(number):
            name = f"{seed} {make.__name__} {turn}"
            try:
                counts += walk(make, name, rounds)
            except Exception as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    return {"seed": seed, "CMA-ES": evolution, "GP": bayes, **counts}
