"""How many examples property tests draw: more of them at night."""

from __future__ import annotations

import os

__all__ = ["VARIABLE", "deep"]

VARIABLE = "BBPROMPT_TEST_DEPTH"


def deep(count: int) -> int:
    """So many times `count` as the environment asks for; once where it says nothing."""
    return count * int(os.environ.get(VARIABLE, "1"))
