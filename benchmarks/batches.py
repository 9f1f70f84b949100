"""What large batches of router proposals find and cost: made-up losses over 96 bits, several seeds.

"pairs": random weights of the bits and of neighbouring pairs, less the lowest possible value. "mixtures": twelve layers
of eight modules, each layer's loss the distance of the mean of its chosen random modules from a random aim, as routers
mix prompts. Calls are the same in all rows, the first 64 of them random. "after": best loss after so many calls, mean
and standard deviation over the seeds, which draw the loss as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from bbprompt.optimizers import gp
from bbprompt.optimizers.random import RandomSearch

__all__ = ["batches"]

_LAYERS, _MODULES = 12, 8
_DIM = _LAYERS * _MODULES
_RANDOM = 64
_Loss = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def pairs(seed: int) -> _Loss:
    """Weights of bits and of neighbours; the lowest value is 0."""
    rng = np.random.default_rng(seed)
    weights, neighbours = rng.standard_normal(_DIM), rng.standard_normal(_DIM - 1)
    zero, one = 0.0, weights[0]  # lowest values of rows so far that end in that bit
    for weight, pair in zip(weights[1:], neighbours, strict=True):
        zero, one = min(zero, one), weight + min(zero, one + pair)
    least = min(zero, one)
    return lambda rows: rows @ weights + (rows[:, 1:] * rows[:, :-1]) @ neighbours - least


def mixtures(seed: int) -> _Loss:
    """Distances of mixed modules from what is aimed at."""
    rng = np.random.default_rng(seed)
    modules, aims = rng.standard_normal((_LAYERS, _MODULES, 16)), rng.standard_normal((_LAYERS, 16)) / 2

    def loss(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        routers = rows.reshape(-1, _LAYERS, _MODULES)
        weights = routers / np.maximum(routers.sum(axis=2, keepdims=True), 1.0)
        far = np.linalg.norm(np.einsum("nlk,lkd->nld", weights, modules) - aims, axis=2)
        total: NDArray[np.float64] = far.sum(axis=1)
        return total

    return loss


def searched(loss: _Loss, seed: int, batch: int, calls: int, ahead: bool) -> tuple[list[float], float]:
    """Best loss after half and all of the calls, and CPU seconds of this process for asks and tells."""
    box = [[0.0] * _DIM, [1.0] * _DIM]
    search = gp.GPUCB(box, seed, batch=batch, n_random=_RANDOM, binary=True, ahead=ahead)
    told: list[float] = []
    seconds = 0.0
    while len(told) < calls:
        began = time.process_time()
        rows = search.ask()
        losses = loss(rows)
        search.tell(rows, losses)
        seconds += time.process_time() - began
        told += losses.tolist()
    return [min(told[: calls // 2]), min(told[:calls])], seconds


def batches(seeds: int, batch: int = 64, calls: int = 320) -> list[str]:
    """Batches proposed one row after another, together, and together ahead."""
    lines = [
        f"| loss | proposals | after {calls // 2} | after {calls} | CPU ms a call |",
        "|---|---|---|---|---|",
    ]
    for name, make in (("pairs", pairs), ("mixtures", mixtures)):
        ways = {"one after another, batch 4": [searched(make(seed), seed, 4, calls, False) for seed in range(seeds)]}
        with patch.object(gp, "JOINT_BATCH", 10**9):
            found = [searched(make(seed), seed, batch, calls, False) for seed in range(seeds)]
            ways[f"one after another, batch {batch}"] = found
        for words, ahead in (("together", False), ("together and ahead", True)):
            found = [searched(make(seed), seed, batch, calls, ahead) for seed in range(seeds)]
            ways[f"{words}, batch {batch}"] = found
        ways["at random"] = [(blind(make(seed), seed, calls), 0.0) for seed in range(seeds)]
        for words, found in ways.items():
            best = np.array([each for each, _ in found])
            cells = " | ".join(f"{m:.2f} ({s:.2f})" for m, s in zip(best.mean(0), best.std(0, ddof=1), strict=True))
            spent = 1e3 * sum(seconds for _, seconds in found) / (seeds * calls)
            lines.append(f"| {name} | {words} | {cells} | {spent:.2f} |")
    return [*lines, "", f"{seeds} seeds. Ahead, most of the work is another process's, which is not counted here."]


def blind(loss: _Loss, seed: int, calls: int) -> list[float]:
    """What random rows find."""
    search = RandomSearch([[0.0] * _DIM, [1.0] * _DIM], seed=seed, batch=calls, binary=True)
    losses = loss(search.ask())
    return [float(losses[: calls // 2].min()), float(losses.min())]
