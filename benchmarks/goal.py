"""What a benchmark is to show, and whether it did."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["goal"]


def goal(words: str, least: float, found: Sequence[float]) -> str:
    """One line: every ratio found is at least so large, or not."""
    held = "held" if min(found) >= least else "NOT held"
    return f"Goal: {words}, at least {least:g}; {held} (least {min(found):.3f})."
