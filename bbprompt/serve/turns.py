"""Requests that wait for the model, and which of them one forward may answer.

A request waits for its turn. Where a server is told to (`--together`), requests on the same texts are scored as one
population when their turn comes: a forward of many candidates fills a GPU that one of few leaves idle.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bbprompt.oracle import Scores, TextBatch
from bbprompt.wire import ScoreRequest

__all__ = ["Turn", "shares", "take"]


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A request that waits.

    Attributes:
        request: What is asked.
        batch: Its texts.
        reply: Where the answer goes.
    """

    request: ScoreRequest
    batch: TextBatch
    reply: asyncio.Future[bytes]


def take(waiting: deque[Turn], most: int) -> list[Turn]:
    """Remove the request whose turn it is, and those that are scored with it, in the order in which they came.

    Those are on the same texts, ask for the same, have `most` candidates at most all together, and cost no more
    together than apart: a population whose candidates are alike in the lower layers runs through these once, which
    company of another kind would undo.

    Args:
        waiting: At least one request.
        most: Candidates in a forward of several requests; 0 for a forward each.
    """
    first = waiting.popleft()
    taken, count, points = [first], len(first.request.points), first.request.points
    for turn in list(waiting) if most else ():
        more = turn.request.points
        if _asks(turn) != _asks(first) or count + len(more) > most:
            continue
        joined = np.concatenate([points, more])
        if _cost(joined) > _cost(points) + _cost(more):
            continue
        waiting.remove(turn)
        taken.append(turn)
        count, points = len(joined), joined
    return taken


def shares(scores: Scores, turns: list[Turn]) -> list[Scores]:
    """What each of several requests gets of the scores of all their candidates."""
    found, begin = [], 0
    for turn in turns:
        at = slice(begin, begin := begin + len(turn.request.points))
        best = None if scores.best is None else scores.best[at]
        found.append(Scores(scores.logits[at], scores.normalizer[at], best, scores.cut))
    return found


def _asks(turn: Turn) -> tuple[object, ...]:
    return turn.request.batch, turn.request.support, turn.request.longest_answer


def _cost(points: NDArray[np.float32]) -> int:
    """Layers to be computed, those once for all in which, from the lowest on, all candidates are alike."""
    count, layers, _ = points.shape
    differs = (points != points[:1]).any(axis=(0, 2))
    alike = int(differs.argmax()) if differs.any() else layers
    return int(alike + count * (layers - alike))
