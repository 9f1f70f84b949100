"""Units of a request: candidates that run through a model together, and how their scores are put together again.

Scores may depend in their last bits on what is computed together. So a request is cut into units by its own size
alone, the same units whether one process computes them all or many processes share them: the result is the same
bits for any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bbprompt.oracle import Scores

__all__ = ["Unit", "best_batch_tokens", "join", "plan_units"]

#: Tokens that run at once fastest. More make a CPU slower: a state no longer fits its caches.
_BEST = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True, slots=True)
class Unit:
    """Candidates `first` to `last` (exclusive) of a request, on all its texts."""

    first: int
    last: int


def best_batch_tokens(device: str) -> int:
    """Tokens that run through a model at once fastest, on "cpu" or "cuda"."""
    return _BEST[device]


def plan_units(candidates: int, at_once: int) -> tuple[Unit, ...]:
    """Cut a request into units of at most `at_once` candidates, in order."""
    return tuple(Unit(first, min(first + at_once, candidates)) for first in range(0, candidates, at_once))


def join(parts: Sequence[Scores]) -> Scores:
    """Put the scores of all units of a request together, in the order of the units; at least one."""
    best = [part.best for part in parts if part.best is not None]
    return Scores(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.normalizer for part in parts]),
        np.concatenate(best) if best else None,
        parts[0].cut,
    )
