"""The process around the application: socket, TLS, deadline of headers, and an orderly end on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bbprompt.errors import UsageError
from bbprompt.oracle import Oracle
from bbprompt.serve.app import build_app
from bbprompt.serve.guard import MOST_HEADERS, Guard
from bbprompt.serve.scorer import Scorer
from bbprompt.serve.settings import ServeSettings

__all__ = ["Server", "build_server", "is_loopback", "listen"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_FAREWELL = 1  # seconds in which clients read what they are told at the end of the drain


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UsageError: Others could reach it and there is no token, or the address cannot be had.
    """
    if token is None and not is_loopback(host):
        raise UsageError(f"--host {host}: others could use this server; set BBPROMPT_TOKEN to a secret first")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, the protocol is what makes asyncio set TCP_NODELAY. Without it the body of an answer waits until the other
    # side has acknowledged its head, which takes 40 ms.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(128)
    except OSError as error:
        found.close()
        raise UsageError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error
    return found


def build_server(
    oracle: Oracle,
    settings: ServeSettings,
    *,
    tls: ssl.SSLContext | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Server:
    """A server whose `run(sockets=[...])` answers until SIGTERM or SIGINT, finishes what is at hand and returns.

    Args:
        oracle: The model.
        settings: What is allowed.
        tls: Certificate and key, to answer over https.
        ready: Called once requests are answered.
    """
    app, scorer = build_app(oracle, settings)
    config = uvicorn.Config(
        app,
        http=_protocol(settings.receive),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MOST_HEADERS,
        limit_concurrency=4 * settings.at_once,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=math.ceil(settings.drain) + _FAREWELL,
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
    )
    return Server(config, ready, app, scorer)


class Server(uvicorn.Server):
    """Says when it is ready, and ends with exit code 0 when it was asked to end.

    Attributes:
        idle: After `run`: whether the model has come to rest. Where it has not, Python waits for it at its end.
    """

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], guard: Guard, scorer: Scorer) -> None:
        super().__init__(config)
        self._ready, self._guard, self._scorer = ready, guard, scorer
        self.idle = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and say so."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is at hand, for as long as the drain allows, and let go of the model."""
        self._guard.drain()
        await super().shutdown(sockets)
        self.idle = self._scorer.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End in order on a signal while inside."""
        if threading.current_thread() is not threading.main_thread():
            yield  # whoever started the thread ends it by `should_exit`
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)


def _protocol(seconds: float) -> type[H11Protocol]:
    """HTTP/1.1 in which the headers of a request must be complete `seconds` after its first byte."""

    class Protocol(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._late = self.loop.call_later(seconds, self._give_up)

        def data_received(self, data: bytes) -> None:
            if self._between and self._late is None:
                self._late = self.loop.call_later(seconds, self._give_up)
            super().data_received(data)
            if not self._between:
                self._in_time()

        def connection_lost(self, exc: Exception | None) -> None:
            self._in_time()
            super().connection_lost(exc)

        @property
        def _between(self) -> bool:
            """Whether no request is being answered: none came, or its headers are not complete."""
            return self.cycle is None or self.cycle.response_complete

        def _in_time(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _give_up(self) -> None:
            self._late = None
            if self._between:
                self.transport.abort()

    return Protocol
