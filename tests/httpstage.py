"""A server of ours without a network, whose answers a test may change, and clients of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import httpx2
from clients import BATCH, EAGER, kept

from bbprompt import wire
from bbprompt.backends.calls import Policy
from bbprompt.backends.http import HttpOracle
from bbprompt.oracle import Scores
from bbprompt.testing import ToyOracle


def connect(url: str, *more: Any, **settings: Any) -> HttpOracle:
    """An oracle that is closed when the test ends."""
    return kept(HttpOracle(url, *more, **settings))


class Stage:
    """A transport that plays a good server on a toy model, but for the answers of a script."""

    def __init__(self, script: Callable[[int, httpx2.Request], Any] = lambda number, request: None) -> None:
        self.toy, self.script = ToyOracle(), script
        self.sent: list[str] = []
        self.info = {
            "protocol": 1,
            "version": "0",
            "model": asdict(self.toy.info),
            "limits": {"points": 1024, "texts": 100, "body": 10**6},
        }

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.sent.append(request.url.path)
        if request.url.path == "/v1/score":
            said = self.script(self.sent.count("/v1/score"), request)
            if said is not None:
                return said(request) if callable(said) else said  # type: ignore[no-any-return]
            return self.good(request)
        return httpx2.Response(200, json=self.info) if request.url.path == "/v1/info" else httpx2.Response(201)

    def scores(self, request: httpx2.Request) -> tuple[str, Scores]:
        asked = wire.decode_request(request.read(), layers=3, dim=4, most=100)
        return asked.call_id, self.toy.score(BATCH, asked.points, asked.support, asked.longest_answer)

    def good(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=wire.encode_reply(*self.scores(request)))

    def oracle(self, policy: Policy = EAGER, workers: int = 1) -> HttpOracle:
        return connect("http://test", policy=policy, workers=workers, transport=httpx2.MockTransport(self))
