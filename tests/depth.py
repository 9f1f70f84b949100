"""How many examples property tests draw: more of them at night, few where only the lines they reach count."""

from __future__ import annotations

import os

__all__ = ["VARIABLE", "deep"]

VARIABLE = "BBPROMPT_TEST_DEPTH"


def deep(count: int) -> int:
    """So many times `count` as the environment asks for, perhaps a part of it; once where it says nothing."""
    return max(round(count * float(os.environ.get(VARIABLE, "1"))), 1)
