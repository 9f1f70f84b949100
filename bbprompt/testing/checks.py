"""What the contract suites say when something is not as promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

__all__ = ["equal", "refused", "require"]


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with `message` unless `condition` holds."""
    # Not `assert`: pytest would not rewrite it here, and python -O would drop it.
    if not condition:
        raise AssertionError(message)


def refused(error: type[Exception], action: Callable[[], object]) -> None:
    """Raise AssertionError unless `action` raises `error`."""
    try:
        action()
    except error:
        return
    raise AssertionError(f"expected a {error.__name__}")


def equal(left: NDArray[Any], right: NDArray[Any]) -> bool:
    """Whether two arrays have the same shape and the same bytes."""
    return left.shape == right.shape and left.tobytes() == right.tobytes()
