"""Toy losses with a known minimum, for searches without a model."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ellipsoid", "onemax", "sphere"]


def sphere(x: ArrayLike, center: ArrayLike = 0.0) -> NDArray[np.float64]:
    """Return the squared distance of rows `(n, dim)` from a center, `(n,)`; minimum 0."""
    away = np.asarray(x, dtype=np.float64) - np.asarray(center, dtype=np.float64)
    return np.asarray(np.sum(away * away, axis=1), dtype=np.float64)


def ellipsoid(x: ArrayLike, center: ArrayLike = 0.0, condition: float = 1e6) -> NDArray[np.float64]:
    """Return sum_i condition^(i / (dim - 1)) (x_i - center_i)^2 of rows `(n, dim)`, `(n,)`; minimum 0."""
    away = np.asarray(x, dtype=np.float64) - np.asarray(center, dtype=np.float64)
    dim = away.shape[1]
    weights = condition ** (np.arange(dim) / max(dim - 1, 1))
    return np.asarray((away * away) @ weights, dtype=np.float64)


def onemax(x: ArrayLike, target: ArrayLike = 1.0) -> NDArray[np.float64]:
    """Return in how many bits rows `(n, dim)` of 0 and 1 differ from the target, `(n,)`; minimum 0."""
    differs = np.asarray(x, dtype=np.float64) != np.asarray(target, dtype=np.float64)
    return np.asarray(np.count_nonzero(differs, axis=1), dtype=np.float64)
