"""Binary rows: which there are, which are still untold, and drawing some of them.

A row stands for a router: a one keeps a prompt module, a zero leaves it out (MP2, eq. 1). The row without any
one mixes nothing and is no router, hence `forbid_zero`.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

__all__ = ["check_bits", "count_valid", "draw", "enumerate_bits", "keys"]

# Up to here drawing without repetition picks from the list of all rows; beyond it, told rows are so rare
# among the 2**dim that drawing again until a row is new takes next to no extra draws.
_LISTED_DIM = 16


def check_bits(rows: NDArray[np.float64]) -> None:
    """Refuse rows that hold anything but 0 and 1.

    Raises:
        ValueError: they do.
    """
    if not np.all((rows == 0.0) | (rows == 1.0)):
        raise ValueError("x must hold only 0 and 1: the search is binary")


def keys(rows: NDArray[np.float64]) -> list[bytes]:
    """Return one hashable value a row, equal just for equal rows; rows `(n, dim)` of 0 and 1."""
    packed = np.packbits(rows != 0.0, axis=1)
    return [row.tobytes() for row in packed]


def count_valid(dim: int, *, forbid_zero: bool) -> int:
    """Return how many valid rows there are, 2**dim or one fewer."""
    return (1 << dim) - int(forbid_zero)


def enumerate_bits(dim: int, *, forbid_zero: bool = True) -> NDArray[np.float64]:
    """List all valid rows in a fixed order: row i holds the binary digits of i, the lowest first.

    Returns:
        `(2**dim - 1, dim)` float64, or `(2**dim, dim)` with the zero row first if that is allowed.
    """
    codes = np.arange(int(forbid_zero), 2**dim, dtype=np.int64)
    return ((codes[:, None] >> np.arange(dim)) & 1).astype(np.float64)


def draw(
    rng: np.random.Generator, count: int, dim: int, taken: Collection[bytes], *, forbid_zero: bool
) -> NDArray[np.float64]:
    """Draw distinct valid rows, uniformly among those that are not taken.

    Args:
        rng: where the randomness comes from.
        count: how many rows.
        dim: their width.
        taken: `keys` of the rows that must not be drawn.
        forbid_zero: whether the zero row is invalid.

    Returns:
        `(n, dim)` float64; n < count only where fewer rows are left (all of them then, n may be 0).
    """
    if dim <= _LISTED_DIM:
        rows = enumerate_bits(dim, forbid_zero=forbid_zero)
        if taken:
            rows = rows[[key not in taken for key in keys(rows)]]
        return rows[rng.permutation(len(rows))[:count]]
    seen = set(taken)
    if forbid_zero:
        seen.add(keys(np.zeros((1, dim)))[0])
    found: list[NDArray[np.float64]] = []
    while len(found) < count and len(seen) < 2**dim:
        rows = rng.integers(0, 2, size=(count, dim)).astype(np.float64)
        for row, key in zip(rows, keys(rows), strict=True):
            if key not in seen and len(found) < count:
                seen.add(key)
                found.append(row)
    return np.array(found).reshape(len(found), dim)
