"""Checks of constructor arguments that several optimizers share."""

from __future__ import annotations

import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["checked_bounds", "checked_count", "checked_seed"]


def checked_seed(seed: int) -> int:
    """Return the seed as a plain int.

    None is refused: numpy would take it for "draw one from the operating system".

    Raises:
        ValueError: not an integer, or negative.
    """
    try:
        value = operator.index(seed)
    except TypeError:
        raise ValueError(f"seed must be an integer >= 0, not {seed!r}") from None
    if value < 0:
        raise ValueError(f"seed must be an integer >= 0, not {value}")
    return value


def checked_count(name: str, value: int, least: int) -> int:
    """Return a count as a plain int.

    Raises:
        ValueError: not an integer, or below `least`; the message names the argument.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer >= {least}, not {value!r}") from None
    if count < least:
        raise ValueError(f"{name} must be an integer >= {least}, not {count}")
    return count


def checked_bounds(bounds: ArrayLike, *, binary: bool = False) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Split a box into its lower and upper corner.

    Args:
        bounds: `(2, dim)`, finite, lower row below upper row.
        binary: the box must be exactly 0 to 1 in each coordinate.

    Returns:
        Lower and upper corner, `(dim,)` float64 each.

    Raises:
        ValueError: another shape, an empty box, or a box that does not suit `binary`.
    """
    box = np.array(bounds, dtype=np.float64)
    if box.ndim != 2 or box.shape[0] != 2 or box.shape[1] < 1:
        raise ValueError(f"bounds must have shape (2, dim) with dim >= 1, not {box.shape}")
    low, high = box
    with np.errstate(over="ignore", invalid="ignore"):
        width = high - low
    if not np.all(np.isfinite(box)) or not np.all(np.isfinite(width)) or not np.all(width > 0):
        raise ValueError("bounds must be finite, with each lower bound below its upper bound")
    if binary and not (np.all(low == 0.0) and np.all(high == 1.0)):
        raise ValueError("binary=True needs bounds 0 and 1 in each coordinate")
    return low, high
