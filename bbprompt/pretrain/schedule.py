"""What a step sees, and how fast it learns: plain functions of seed and step, so a resumed training does the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["epoch_order", "positions", "rate_factor", "visits"]


def visits(seed: int, step: int, per_step: int, copies: Sequence[int]) -> list[tuple[int, int]]:
    """Tasks of a step and how often each was drawn before.

    Tasks are visited in rounds, each as often in a round as `copies` says, in an order drawn for the round.
    """
    # What a round goes through: (task, how often it stands in a round, which of these times it is).
    around = [(index, times, copy) for index, times in enumerate(copies) for copy in range(times)]
    drawn = []
    for position in range(step * per_step, (step + 1) * per_step):
        number, place = divmod(position, len(around))
        order = np.random.default_rng((seed, 1, number)).permutation(len(around))
        index, times, copy = around[int(order[place])]
        drawn.append((index, number * times + copy))
    return drawn


def epoch_order(seed: int, task: int, epoch: int, lengths: NDArray[np.integer], size: int, bucket: int) -> NDArray:  # type: ignore[type-arg]
    """Order in which an epoch goes through a task's examples, each once.

    Args:
        seed: Of the training.
        task: Index of the task.
        epoch: From 0.
        lengths: Tokens of each example.
        size: Examples of a visit.
        bucket: With more than 1, `bucket * size` examples at a time are sorted by length and cut into visits, whose
            order is drawn again: texts of a visit are then of similar length.
    """
    rng = np.random.default_rng((seed, 2, task, epoch))
    order = rng.permutation(len(lengths))
    if bucket > 1:
        groups: list[NDArray[np.int64]] = []
        for begin in range(0, len(order), bucket * size):
            chunk = order[begin : begin + bucket * size]
            chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
            groups += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        whole = [group for group in groups if len(group) == size]
        rest = [group for group in groups if len(group) < size]
        order = np.concatenate([*(whole[i] for i in rng.permutation(len(whole))), *rest])
    return order


def positions(
    seed: int, task: int, visit: int, lengths: NDArray[np.integer], size: int, bucket: int = 1
) -> list[int]:  # fmt: skip
    """Examples (indices) of the `visit`-th visit to a task, `size` of them, epoch after epoch."""
    chosen = []
    orders: dict[int, NDArray[np.int64]] = {}
    for position in range(visit * size, (visit + 1) * size):
        epoch, place = divmod(position, len(lengths))
        if epoch not in orders:
            orders[epoch] = epoch_order(seed, task, epoch, lengths, size, bucket)
        chosen.append(int(orders[epoch][place]))
    return chosen


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """What the learning rates are multiplied by in `step` (from 0) of `steps`.

    Linear warm-up over the share `warmup` of the steps, then half a cosine down to a twentieth.
    """
    progress = (step + 1) / steps
    if progress < warmup:
        return progress / warmup
    rest = (progress - warmup) / (1 - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * rest))
