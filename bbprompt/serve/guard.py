"""What a request must pass before any of it is used: token, room, headers, size, time.

Wraps the whole application, so that a new route cannot forget it. Everything that can be decided from the headers
is decided before a byte of the body is read; the body is bounded in bytes and in time while it arrives.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from bbprompt.serve.metrics import NOWHERE, Metrics
from bbprompt.serve.settings import ServeSettings
from bbprompt.wire import PROTOCOL

__all__ = ["MOST_HEADERS", "Guard", "problem"]

MOST_HEADERS = 16384  # bytes
#: What supervisors ask for: answered at any time, for a server that is busy is not one that fails.
_WATCHED = ("/healthz", "/metrics")
_AWAY = "10"  # seconds after which a server that stops may be back
_BODIES = 4  # bodies of the greatest size that may be in memory at once

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


def problem(code: str, message: str) -> bytes:
    """The body of every refusal."""
    return json.dumps({"error": code, "message": message, "protocol": PROTOCOL}).encode("ascii")


class _Refused(Exception):
    """A request that ends here."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.body = status, problem(code, message)
        self.headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]


class Guard:
    """An ASGI application around another one.

    Args:
        app: The application.
        settings: Its limits.
        metrics: Where requests and refusals are counted.
    """

    def __init__(self, app: _App, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._token = None if settings.token is None else b"Bearer " + settings.token.encode("ascii")
        self._inside = self._bytes = 0
        self._times: set[asyncio.Timeout] = set()
        self._ends: float | None = None  # on the clock of the loop

    def drain(self) -> None:
        """Give the requests at hand `settings.drain` seconds; those that remain then are asked to come again later."""
        self._ends = asyncio.get_running_loop().time() + self._settings.drain
        for time_ in self._times:
            if (when := time_.when()) is not None and when > self._ends:
                time_.reschedule(self._ends)

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Handle one request; see the ASGI specification."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return  # no web sockets here: the server closes the connection
        began = time.monotonic()

        async def counted(message: _Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._metrics.refused.labels(str(message["status"])).inc()
            await send(message)

        try:
            await self._answer(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", NOWHERE)  # set by the router
            self._metrics.requests.labels(route).observe(time.monotonic() - began)

    async def _answer(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        started, cut = False, asyncio.Event()

        async def watched(message: _Message) -> None:
            nonlocal started
            if cut.is_set() and not started:
                return  # what the application makes of a body that was cut off, a 500; the refusal is told below
            started = True
            await send(message)

        try:
            size = self._check(scope)
            takes_a_place = scope["path"] not in _WATCHED
            self._inside += takes_a_place
            self._bytes += size
            try:
                async with self._timed():
                    await self._app(scope, self._bounded(receive, size, cut), watched)
            except TimeoutError:
                raise self._late() from None
            finally:
                self._inside -= takes_a_place
                self._bytes -= size
        except _Refused as refused:
            if started:
                raise
            # What is left of the body is not read: the connection cannot be used again.
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(refused.body)).encode())]
            headers += [(b"connection", b"close"), *refused.headers]
            await send({"type": "http.response.start", "status": refused.status, "headers": headers})
            await send({"type": "http.response.body", "body": refused.body})

    @contextlib.asynccontextmanager
    async def _timed(self) -> AsyncIterator[None]:
        """Bound what is done inside by the deadline, and by the end of the drain when it comes first."""
        when = asyncio.get_running_loop().time() + self._settings.deadline
        async with asyncio.timeout_at(when if self._ends is None else min(when, self._ends)) as time_:
            self._times.add(time_)
            try:
                yield
            finally:
                self._times.remove(time_)

    def _late(self) -> _Refused:
        if self._ends is not None and asyncio.get_running_loop().time() >= self._ends:
            return _Refused(503, "stopping", "this server is stopping; ask again for it later", Retry_After=_AWAY)
        message = f"no answer within {self._settings.deadline:g} s; ask again for it"
        return _Refused(503, "deadline", message, Retry_After="1")

    def _check(self, scope: _Scope) -> int:
        """Bytes that the body will have."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADERS:
            raise _Refused(431, "headers", f"the headers have more than {MOST_HEADERS} bytes")
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        if self._token is not None:
            given = headers.get(b"authorization", [])
            if not hmac.compare_digest(given[0] if len(given) == 1 else b"", self._token):
                raise _Refused(401, "token", "missing or wrong token", WWW_Authenticate="Bearer")
        if scope["path"] not in _WATCHED and self._inside >= self._settings.at_once:
            raise _Refused(503, "busy", f"{self._inside} requests are being worked on", Retry_After="1")
        if headers.keys() & {b"content-encoding", b"transfer-encoding"}:
            raise _Refused(415, "encoding", "bodies are neither compressed nor chunked here")
        length = headers.get(b"content-length", [b"0"])
        if len(length) != 1 or not length[0].isdigit() or len(length[0]) > 15:
            raise _Refused(400, "length", "one content-length is expected")
        size = int(length[0])
        most = 0 if scope["method"] in ("GET", "HEAD") else self._settings.body
        if size > most:
            raise _Refused(413, "size", f"a body of {size} bytes, {most} are allowed")
        if self._bytes + size > _BODIES * self._settings.body:
            raise _Refused(503, "busy", f"requests of {self._bytes} bytes are being worked on", Retry_After="1")
        return size

    def _bounded(self, receive: _Receive, size: int, cut: asyncio.Event) -> _Receive:
        """`receive` that sets `cut` and gives up when the body is late or longer than was said."""
        ends = asyncio.get_running_loop().time() + self._settings.receive
        got, done = 0, False

        async def bounded() -> _Message:
            nonlocal got, done
            if done:
                return await receive()  # waits for the client to leave; bounded by the deadline alone
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError:
                cut.set()
                raise _Refused(408, "slow", f"the body took more than {self._settings.receive:g} s") from None
            got += len(message.get("body", b""))
            done = not message.get("more_body", False)
            if got > size:
                cut.set()
                raise _Refused(413, "size", "the body is longer than its content-length")
            return message

        return bounded
