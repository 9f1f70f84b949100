"""A time limit for an exchange as a whole: connecting, sending, headers and body together, however they trickle.

httpx2 bounds every single read, so a server that sends a byte now and then holds its client for ever. Here each
operation on the socket gets what is left of the whole exchange.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

__all__ = ["ENDS", "DeadlineTransport", "proxy_for"]

#: Extension of a request: the instant, on the monotonic clock, at which its answer must be complete.
ENDS = "bbprompt.ends"

_SLICE = 65536  # bytes written under one look at the clock


class DeadlineTransport(httpx2.HTTPTransport):
    """The network, with `request.extensions[ENDS]` obeyed.

    The answer must be read in the thread that sent the request.

    Args:
        limits: Most connections.
        proxy: URL of a proxy, or None.
    """

    def __init__(self, limits: httpx2.Limits, proxy: str | None = None) -> None:
        super().__init__(limits=limits, proxy=proxy)
        self._exchange = threading.local()
        # The one way in: httpx2 builds its pool itself and offers no argument for what the pool reads through.
        self._pool._network_backend = _Network(self._pool._network_backend, self._exchange)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; its answer ends in time or with a `TimeoutException`."""
        self._exchange.ends = request.extensions[ENDS]
        return super().handle_request(request)


def proxy_for(url: httpx2.URL) -> str | None:
    """The proxy that the environment wants between us and a URL; None for a server on this machine."""
    if url.host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(url.host):
        return None
    known = getproxies()
    found = known.get(url.scheme) or known.get("all")
    return found if not found or "://" in found else f"http://{found}"


class _Network(httpcore2.NetworkBackend):
    """Opens connections that end in time."""

    def __init__(self, inner: httpcore2.NetworkBackend, exchange: threading.local) -> None:
        self._inner, self._exchange = inner, exchange

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        left = _left(self._exchange, timeout, httpcore2.ConnectTimeout)
        return _Stream(self._inner.connect_tcp(host, port, left, local_address, socket_options), self._exchange)


class _Stream(httpcore2.NetworkStream):
    """A connection whose every operation gets what is left of the exchange at hand."""

    def __init__(self, inner: httpcore2.NetworkStream, exchange: threading.local) -> None:
        self._inner, self._exchange = inner, exchange

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(self._exchange, timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for begin in range(0, len(buffer), _SLICE):
            left = _left(self._exchange, timeout, httpcore2.WriteTimeout)
            self._inner.write(buffer[begin : begin + _SLICE], left)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = _left(self._exchange, timeout, httpcore2.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._exchange)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _left(exchange: threading.local, timeout: float | None, late: type[Exception]) -> float:
    """Seconds for the next operation: `timeout`, or what is left of the exchange if that is less."""
    left: float = exchange.ends - time.monotonic()
    if left <= 0:
        raise late("the time for the whole exchange is over")
    return left if timeout is None else min(timeout, left)
