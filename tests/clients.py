"""Clients of servers in tests: what they ask, and that they are closed at the end of a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import httpx2
import numpy as np
from tiny_prompt import batch_of

from bbprompt.backends.calls import Policy
from bbprompt.oracle import Scores

BATCH = batch_of("pair", 3)
POINTS = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
EAGER = Policy(pause=0.0)

_Client = TypeVar("_Client")
_OPENED: list[Any] = []


def kept(client: _Client) -> _Client:
    """A client that `close_all` will close."""
    _OPENED.append(client)
    return client


def opened() -> bool:
    """Whether a client is open."""
    return bool(_OPENED)


def close_all() -> None:
    """Close what was kept."""
    while _OPENED:
        _OPENED.pop().close()


def same(one: Scores, other: Scores) -> bool:
    """Whether two answers are the same bits."""
    return (
        np.array_equal(one.logits, other.logits)
        and np.array_equal(one.normalizer, other.normalizer)
        and one.cut == other.cut
    )


def failing(error: type[httpx2.TransportError]) -> Callable[[httpx2.Request], httpx2.Response]:
    """Answers with an error of the transport."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        raise error("broken", request=request)

    return answer
