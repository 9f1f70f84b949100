"""A server's application without sockets, and a toy model behind it that waits or fails when it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import httpx2
import numpy as np
from servers import TOKEN
from tiny_prompt import batch_of

from bbprompt import wire
from bbprompt.oracle import Scores
from bbprompt.serve.app import build_app
from bbprompt.serve.settings import ServeSettings
from bbprompt.testing import ToyOracle

BATCH = batch_of("pair", 3)
DIGEST = BATCH.digest()
POINTS = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
TEXTS = wire.encode_batch(BATCH)
TYPE = {"content-type": wire.CONTENT_TYPE}
AUTH = {"authorization": f"Bearer {TOKEN}"}


class Counting(ToyOracle):
    """Counts what it scores, and can be made to wait or to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.gate, self.error = 0, threading.Event(), None  # type: ignore[var-annotated]
        self.gate.set()

    def score(self, *request: Any) -> Scores:
        self.calls += 1
        self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return super().score(*request)


def request(points: np.ndarray = POINTS, **changes: Any) -> bytes:
    asked = wire.request_for(ToyOracle().info, DIGEST, points, "candidates", None)
    values = {name: getattr(asked, name) for name in asked.__slots__}
    return wire.encode_request(wire.ScoreRequest(**(values | changes)))


class Client:
    """Requests to the application itself, without sockets."""

    def __init__(self, oracle: ToyOracle, **settings: Any) -> None:
        self.app, _ = build_app(oracle, ServeSettings(**settings))

    def send(self, *requests: tuple[Any, ...]) -> list[httpx2.Response]:
        async def all_of_them() -> list[httpx2.Response]:
            transport = httpx2.ASGITransport(app=self.app)  # type: ignore[arg-type]
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                sent = (
                    client.request(method, path, content=body, headers=headers)
                    for method, path, body, headers in requests
                )
                return list(await asyncio.gather(*sent))

        return asyncio.run(all_of_them())

    def one(self, method: str, path: str, body: Any = None, headers: Any = TYPE) -> httpx2.Response:
        return self.send((method, path, body, headers))[0]

    def keep(self, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        assert self.one("PUT", f"/v1/batches/{DIGEST}", TEXTS, {**TYPE, **headers}).status_code == 201
