"""A time limit for an exchange as a whole: connecting, sending, headers and body together, however they trickle.

httpx2 bounds every single read, so a server that sends a byte now and then holds its client for ever. Here each
operation on the socket gets what is left of the whole exchange.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
import weakref
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
        self._network = self._pool._network_backend = _Network(self._pool._network_backend, self._exchange)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; its answer ends in time or with a `TimeoutException`."""
        self._exchange.ends = request.extensions[ENDS]
        return super().handle_request(request)

    def close(self) -> None:
        """Close all connections; a thread that waits for an answer on one of them gets a `TransportError`."""
        self._network.end()
        super().close()


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
        self._lock, self._streams, self._ended = threading.Lock(), weakref.WeakSet[_Stream](), False

    def end(self) -> None:
        """Let nobody wait on a connection any longer, nor on one that is opened from now on."""
        with self._lock:
            self._ended = True
            for stream in self._streams:
                stream.end()

    def hold(self, stream: _Stream) -> _Stream:
        """Know a connection that is open, and return it."""
        with self._lock:
            self._streams.add(stream)
            if self._ended:
                stream.end()
        return stream

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        left = _left(self._exchange, timeout, httpcore2.ConnectTimeout)
        inner = self._inner.connect_tcp(host, port, left, local_address, socket_options)
        return self.hold(_Stream(inner, self._exchange, self))


class _Stream(httpcore2.NetworkStream):
    """A connection whose every operation gets what is left of the exchange at hand."""

    def __init__(self, inner: httpcore2.NetworkStream, exchange: threading.local, network: _Network) -> None:
        self._inner, self._exchange, self._network = inner, exchange, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(self._exchange, timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for begin in range(0, len(buffer), _SLICE):
            left = _left(self._exchange, timeout, httpcore2.WriteTimeout)
            self._inner.write(buffer[begin : begin + _SLICE], left)

    def close(self) -> None:
        self._inner.close()

    def end(self) -> None:
        """Wake who waits on it: closing a socket alone wakes no thread that reads from it."""
        with contextlib.suppress(OSError):  # it is closed already
            self.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = _left(self._exchange, timeout, httpcore2.ConnectTimeout)
        inner = self._inner.start_tls(ssl_context, server_hostname, left)
        return self._network.hold(_Stream(inner, self._exchange, self._network))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _left(exchange: threading.local, timeout: float | None, late: type[Exception]) -> float:
    """Seconds for the next operation: `timeout`, or what is left of the exchange if that is less."""
    left: float = exchange.ends - time.monotonic()
    if left <= 0:
        raise late("the time for the whole exchange is over")
    return left if timeout is None else min(timeout, left)
