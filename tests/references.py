"""Our use of CMA-ES and of Bayesian optimization beside references, on functions that everybody knows.

The bit-for-bit comparison with a bare ``cma`` run under the same generator stands in `test_cmaes`; the comparison here
is with what ``cma`` does by itself, with its own seeding and its own bookkeeping.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from bbprompt.optimizers.cmaes import CMAES
from bbprompt.optimizers.gp import GPUCB
from bbprompt.optimizers.random import RandomSearch

Function = Callable[[np.ndarray], float]


def _rotation(dim: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def _weights(dim: int, condition: float) -> np.ndarray:
    return condition ** np.linspace(0, 1, dim)


DIM = 5
_TURN = _rotation(DIM, 3)

#: Minimum 0 at 0, apart from Rosenbrock's at 1.
FUNCTIONS: dict[str, Function] = {
    "sphere": lambda x: float(x @ x),
    "ellipsoid": lambda x: float(_weights(DIM, 1e6) @ x**2),
    "rotated ellipsoid": lambda x: float(_weights(DIM, 1e6) @ (_TURN @ x) ** 2),
    "cigar": lambda x: float(x[0] ** 2 + 1e6 * x[1:] @ x[1:]),
    "tablet": lambda x: float(1e6 * x[0] ** 2 + x[1:] @ x[1:]),
    "two axes": lambda x: float(1e6 * x[: DIM // 2] @ x[: DIM // 2] + x[DIM // 2 :] @ x[DIM // 2 :]),
    "different powers": lambda x: float(np.sum(np.abs(x) ** (2 + 4 * np.arange(DIM) / (DIM - 1)))),
    "rosenbrock": lambda x: float(np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)),
}
_START = np.full(DIM, 0.5)
_SIGMA = 0.5
_POPSIZE = 8
TARGET = 1e-8
LIMIT = 8_000


def ours(function: Function, seed: int) -> int:
    """Evaluations until `TARGET`, by our wrapper; `LIMIT` if it is not reached."""
    optimizer = CMAES(_START, _SIGMA, seed=seed, popsize=_POPSIZE)
    for done in range(_POPSIZE, LIMIT, _POPSIZE):
        rows = optimizer.ask()
        losses = np.array([function(row) for row in rows])
        if losses.min() < TARGET:
            return done
        optimizer.tell(rows, losses)
    return LIMIT


def theirs(function: Function, seed: int) -> int:
    """The same by ``cma`` alone."""
    import cma

    options = {"seed": seed + 1, "popsize": _POPSIZE, "verbose": -9, "ftarget": TARGET, "maxfevals": LIMIT}
    options |= {"verb_log": 0, "signals_filename": "", "tolfun": 0, "tolfunhist": 0, "tolx": 0, "tolstagnation": LIMIT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = cma.CMAEvolutionStrategy(_START, _SIGMA, options)
    while strategy.countevals < LIMIT and strategy.best.f >= TARGET:
        rows = strategy.ask()
        strategy.tell(rows, [function(row) for row in rows])
    return int(strategy.countevals)


def evolution(seeds: int, names: tuple[str, ...] = tuple(FUNCTIONS), within: float = 0.2) -> dict[str, Any]:
    """Median evaluations of ours and of the reference's; they must be within a share of each other."""
    medians = {}
    for name in names:
        mine, reference = (
            float(np.median([solver(FUNCTIONS[name], seed) for seed in range(seeds)])) for solver in (ours, theirs)
        )
        assert mine < LIMIT, f"{name}: the target was not reached"
        assert abs(mine - reference) <= within * reference, f"{name}: {mine:g} evaluations, {reference:g} by cma"
        medians[name] = f"{mine:g}/{reference:g}"
    return {"seeds": seeds, "ours/cma": medians}


def _branin(x: np.ndarray) -> float:
    a, b = 15 * x[0] - 5, 15 * x[1]
    curve = b - 5.1 / (4 * np.pi**2) * a**2 + 5 / np.pi * a - 6
    return float(curve**2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(a) + 10 - 0.397887)


_CENTERS = np.array([[0.2, 0.7, 0.4, 0.6], [0.8, 0.3, 0.5, 0.1], [0.5, 0.5, 0.9, 0.8]])


#: On the unit box; minimum about 0.
BOX_FUNCTIONS: dict[str, tuple[int, Function]] = {
    "branin": (2, _branin),
    "bowl": (6, lambda x: float(np.sum((x - 0.3) ** 2))),
    "three wells": (4, lambda x: 1.0 - float(np.max(np.exp(-4 * np.sum((x - _CENTERS) ** 2, axis=1)) * [1, 0.8, 0.6]))),
}


def regret(optimizer: Any, function: Function, calls: int) -> float:
    """Best loss after so many calls."""
    for _ in range(calls):
        rows = optimizer.ask()
        optimizer.tell(rows, [function(row) for row in rows])
    return float(optimizer.best[1])


def bayesian(seeds: int, names: tuple[str, ...] = tuple(BOX_FUNCTIONS), calls: int = 35) -> dict[str, Any]:
    """Median best loss of UCB and of random search after as many calls; UCB's must be lower."""
    found = {}
    for name in names:
        dim, function = BOX_FUNCTIONS[name]
        box = [[0.0] * dim, [1.0] * dim]
        guided = np.median([regret(GPUCB(box, seed=s, n_random=8), function, calls) for s in range(seeds)])
        blind = np.median([regret(RandomSearch(box, seed=s), function, calls) for s in range(seeds)])
        assert guided < blind, f"{name}: {guided:g} by UCB, {blind:g} at random"
        found[name] = f"{guided:.3g}/{blind:.3g}"
    return {"seeds": seeds, "calls": calls, "UCB/random": found}
