"""Losses of option scores: what a search may minimise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["MARGIN", "hinge"]

#: The margin of BBT (Sun et al. 2022, arXiv:2201.03514), the same for all tasks.
MARGIN = 2.0


def hinge(
    scores: NDArray[np.floating], sizes: Sequence[int], gold: Sequence[int], margin: float = MARGIN
) -> NDArray[np.float64]:
    """Sum over the wrong options j of max(0, score_j - score_right + margin), for each text.

    Args:
        scores: `(n, O)` scores of n candidates for the options of all texts, one text after the other.
        sizes: Number of options of each of the N texts.
        gold: Index of the right option of each text.
        margin: How far the right option has to be ahead.

    Returns:
        `(n, N)`.
    """
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
    values = np.asarray(scores, dtype=np.float64)
    right = np.repeat(values[:, starts + np.asarray(gold)], sizes, axis=1)
    violated = np.maximum(values - right + margin, 0.0)
    total: NDArray[np.float64] = np.add.reduceat(violated, starts, axis=1)
    return total - margin  # the right option itself is `margin` short of being ahead of itself
