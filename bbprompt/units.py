"""Units of a request: the pieces that run through a model together, and how their scores are put together again.

Scores may depend in their last bits on what is computed together. So a request is cut into units by its own size
alone, the same units whether one process computes them all or many processes share them: the result is the same
bits for any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bbprompt.oracle import Scores

__all__ = ["Section", "Unit", "join", "plan_units"]


@dataclass(frozen=True, slots=True)
class Section:
    """Consecutive texts of a batch that run through the model together.

    Attributes:
        texts: How many.
        candidates: How many candidates run at once on them.
    """

    texts: int
    candidates: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Candidates `first` to `last` (exclusive) on the texts of one section."""

    section: int
    first: int
    last: int


def plan_units(sections: Sequence[Section], candidates: int) -> tuple[Unit, ...]:
    """Cut a request into units: section by section, candidates in order."""
    return tuple(
        Unit(number, first, min(first + section.candidates, candidates))
        for number, section in enumerate(sections)
        for first in range(0, candidates, section.candidates)
    )


def join(parts: Sequence[Scores], units: Sequence[Unit]) -> Scores:
    """Put the scores of all units of a request together.

    Args:
        parts: Scores of each unit, in the order of `units`.
        units: As `plan_units` gives them.
    """
    sections: dict[int, list[Scores]] = {}
    for part, unit in zip(parts, units, strict=True):
        sections.setdefault(unit.section, []).append(part)
    rows = list(sections.values())
    best = None
    if all(part.best is not None for part in parts):
        best = np.concatenate([np.concatenate([p.best for p in row if p.best is not None]) for row in rows], axis=1)
    return Scores(
        np.concatenate([np.concatenate([part.logits for part in row]) for row in rows], axis=1),
        np.concatenate([np.concatenate([part.normalizer for part in row]) for row in rows], axis=1),
        best,
        sum(row[0].cut for row in rows),
    )
