"""Statistics of paired runs: means and deviations, bootstrap intervals, signed ranks.

Differences are paired: same task, same seed, so the same few-shot examples and the same test examples. They come in
groups, one a task, for a method that suits a task suits it with every seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Paired", "holm", "interval", "mean_sd", "paired", "signed_rank", "step_values"]

_RESAMPLES = 10_000
_SEED = 20221014  # of the bootstrap: the same runs give the same interval


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the deviation of a single value is NaN."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def interval(groups: Sequence[Sequence[float]], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap confidence interval of the mean over groups of their means.

    With several groups it is a percentile interval that draws groups and then values within each, both with
    replacement, so it speaks of other tasks like these. With a single group the values are drawn and the interval is
    BCa (Efron 1987), as `scipy.stats.bootstrap` has it. The draws are seeded.

    Args:
        groups: Differences by task; no group is empty.
        level: Share of the intervals that hold the true mean.

    Returns:
        Its ends; NaN where a single value says nothing about the spread.
    """
    if len(groups) == 1:
        return _bca(np.asarray(groups[0], dtype=np.float64), level)
    rng = np.random.default_rng(_SEED)
    # All values behind one another: a draw is a group, then places within it.
    values = np.concatenate([np.asarray(group, dtype=np.float64) for group in groups])
    sizes = np.array([len(group) for group in groups])
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    drawn = rng.integers(0, len(groups), (_RESAMPLES, len(groups)))
    widest = int(sizes.max())
    places = (rng.random((_RESAMPLES, len(groups), widest)) * sizes[drawn][..., None]).astype(np.int64)
    taken = values[starts[drawn][..., None] + places]
    used = np.arange(widest) < sizes[drawn][..., None]
    means = ((taken * used).sum(axis=2) / sizes[drawn]).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _bca(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,),
        np.mean,
        confidence_level=level,
        n_resamples=_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def signed_rank(differences: Sequence[float]) -> float:
    """P value of the two-sided Wilcoxon signed-rank test; zeros are left out, and 1 if nothing remains."""
    array = np.asarray(differences, dtype=np.float64)
    array = array[array != 0]
    if not len(array):
        return 1.0
    from scipy.stats import wilcoxon

    return float(wilcoxon(array).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979): any of them below a bound is wrong with that probability."""
    order = np.argsort(values, kind="stable")
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


@dataclass(frozen=True, slots=True)
class Paired:
    """What paired differences say.

    Attributes:
        pairs: Their number.
        tasks: Number of groups.
        mean: Mean over tasks of the mean over seeds.
        low: Lower end of the 95 % interval.
        high: Its upper end.
        p: Wilcoxon's p value over all pairs.
        better: Pairs with a positive difference.
        worse: Pairs with a negative one.
    """

    pairs: int
    tasks: int
    mean: float
    low: float
    high: float
    p: float
    better: int
    worse: int


def paired(groups: Sequence[Sequence[float]]) -> Paired:
    """Summarise differences by task; no group is empty, and there is at least one."""
    every = list(itertools.chain.from_iterable(groups))
    low, high = interval(groups)
    return Paired(
        pairs=len(every),
        tasks=len(groups),
        mean=float(np.mean([np.mean(group) for group in groups])),
        low=low,
        high=high,
        p=signed_rank(every),
        better=sum(value > 0 for value in every),
        worse=sum(value < 0 for value in every),
    )


def step_values(
    calls: Sequence[float], values: Sequence[float], at: Sequence[float] | NDArray[np.float64]
) -> NDArray[np.float64]:
    """A curve that holds its value until the next row, read at given numbers of calls; NaN before its first row."""
    places = np.searchsorted(np.asarray(calls, dtype=np.float64), np.asarray(at, dtype=np.float64), side="right") - 1
    array = np.asarray(values, dtype=np.float64)
    found: NDArray[np.float64] = np.where(places >= 0, array[np.maximum(places, 0)], np.nan)
    return found
