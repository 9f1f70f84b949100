"""A server on bare sockets, for what only sockets do: trickle, hang up, half-close, and lie about lengths.

Whole requests are answered by an `httpx2` handler, such as `httpfaults.Site`; `TRICKS` say what is done to a reply on
its way. `exchanges` runs a whole search over loopback with one trick at a chosen exchange.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import httpfaults
import httpx2

from bbprompt.backends.calls import Caller, Policy
from bbprompt.backends.http import HttpOracle
from bbprompt.errors import OracleError

DEADLINE = 0.4  # seconds of a whole exchange
STEP = 0.02  # between two bytes that trickle
#: How far from the deadline an exchange may end: a fifth, and later by what the machine took to wake threads meanwhile.
EARLY, LATE = 0.8 * DEADLINE, 1.2 * DEADLINE

_Peer = socket.socket


class Lag:
    """How late this process is: the worst that a thread overslept while the block ran, in seconds."""

    worst = 0.0

    def __enter__(self) -> Lag:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            time.sleep(0.01)
            self.worst = max(self.worst, time.monotonic() - began - 0.01)


def _drip(peer: _Peer, data: bytes) -> None:
    for byte in data:
        peer.sendall(bytes([byte]))
        time.sleep(STEP)


def _until_gone(peer: _Peer, piece: bytes, most: int = 10**9) -> int:
    """Send the same again and again until the client hangs up; how many bytes it took."""
    sent = 0
    with contextlib.suppress(OSError):
        while sent < most:
            sent += peer.send(piece)
    return sent


def _reset(peer: _Peer) -> None:
    """Hang up without a farewell."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def _hear(peer: _Peer) -> None:
    """Say nothing until the client is gone."""
    while peer.recv(65536):
        pass


def _parts(reply: bytes) -> tuple[bytes, bytes]:
    head, _, body = reply.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", body


def _lengthy(reply: bytes, more: int) -> bytes:
    head, body = _parts(reply)
    return head.replace(f"content-length: {len(body)}".encode(), f"content-length: {len(body) + more}".encode()) + body


def _drip_behind(peer: _Peer, head: bytes, body: bytes) -> None:
    peer.sendall(head)
    _drip(peer, body + b"x" * 10**4)


@dataclass(frozen=True)
class Trick:
    """What is done with a reply.

    Attributes:
        play: Sends what it likes of the reply.
        passes: Whether the run goes on after it.
        slow: Whether the client must end it by its deadline.
    """

    play: Callable[[_Peer, bytes], Any]
    passes: bool = True
    slow: bool = False


def _head_then(then: Callable[[_Peer, bytes], Any]) -> Callable[[_Peer, bytes], Any]:
    def play(peer: _Peer, reply: bytes) -> None:
        head, body = _parts(reply)
        peer.sendall(head)
        then(peer, body)

    return play


def _half(peer: _Peer, body: bytes) -> None:
    peer.sendall(body[: len(body) // 2])


_CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

TRICKS: dict[str, Trick] = {
    "headers drip": Trick(lambda peer, reply: _drip(peer, b"HTTP/1.1 200 OK\r\n" + b"x: " * 10**4), slow=True),
    "body drips": Trick(lambda peer, reply: _drip_behind(peer, *_parts(_lengthy(reply, 10**4))), slow=True),
    "chunks drip": Trick(lambda peer, reply: (peer.sendall(_CHUNKED), _drip(peer, b"1\r\nx\r\n" * 10**4)), slow=True),
    "silence": Trick(lambda peer, reply: _hear(peer), slow=True),
    "silence in the body": Trick(_head_then(lambda peer, body: (_half(peer, body), _hear(peer))), slow=True),
    "reset before the reply": Trick(lambda peer, reply: _reset(peer)),
    "reset in the headers": Trick(lambda peer, reply: (peer.sendall(reply[:20]), time.sleep(STEP), _reset(peer))),
    "reset in the body": Trick(_head_then(lambda peer, body: (_half(peer, body), time.sleep(STEP), _reset(peer)))),
    "reset after the body": Trick(lambda peer, reply: (peer.sendall(reply), time.sleep(STEP), _reset(peer))),
    "closed before the reply": Trick(lambda peer, reply: peer.close()),
    "half-closed in the body": Trick(
        _head_then(lambda peer, body: (_half(peer, body), peer.shutdown(socket.SHUT_WR), _hear(peer)))
    ),
    "half-closed after the body": Trick(
        lambda peer, reply: (peer.sendall(reply), peer.shutdown(socket.SHUT_WR), _hear(peer))
    ),
    "endless headers": Trick(lambda peer, reply: (peer.sendall(b"HTTP/1.1 200 OK\r\n"), _endless(peer, b"x: y\r\n"))),
    "one endless header": Trick(lambda peer, reply: (peer.sendall(b"HTTP/1.1 200 OK\r\nx: "), _endless(peer, b"y"))),
    "endless body": Trick(
        lambda peer, reply: (peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n"), _endless(peer, b"y")), passes=False
    ),
    "10 GB announced": Trick(
        lambda peer, reply: (peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10737418240\r\n\r\n"), _endless(peer)),
        passes=False,
    ),
    "length too great": Trick(lambda peer, reply: (peer.sendall(_lengthy(reply, 9)), peer.close())),
    "length too small": Trick(lambda peer, reply: (peer.sendall(_lengthy(reply, -1)), peer.close())),
}
#: Answers that are whole before the trick ends them.
WHOLE = ("reset after the body", "half-closed after the body")
#: How often a request that meets a trick for ever is sent at least, where it is not the policy's number of tries: what
#: is malformed twice, what is too long once. On a busy machine an answer may be late as well, which counts as a try.
SENDS = {"length too small": 2, "endless body": 1, "10 GB announced": 1}
MOST_TAKEN = 16 * 2**20  # bytes of an endless reply that a client may take, what the kernel holds included


def _endless(peer: _Peer, piece: bytes = b"y") -> None:
    sent = _until_gone(peer, piece * (65536 // len(piece)), 2 * MOST_TAKEN)
    assert sent < MOST_TAKEN, f"the client took {sent} bytes of an endless reply"


@dataclass
class RawServer:
    """A server in threads.

    Attributes:
        handler: Answers whole requests.
        script: The trick for the exchange with this number (from 1), or None.
        seconds: How long each trick lasted, until its end or the client's: at least, from its beginning, and at most,
            from when the server was ready for the request. On a busy machine a server sees a request late.
        broken: What went wrong in a trick: a promise of the client.
    """

    handler: Callable[[httpx2.Request], httpx2.Response]
    script: Callable[[int], str | None] = lambda number: None
    exchanges: int = 0
    seconds: list[tuple[float, float]] = field(default_factory=list)
    broken: list[BaseException] = field(default_factory=list)

    def answer(self, peer: _Peer) -> None:
        """One connection, to its end."""
        with peer, contextlib.suppress(OSError), peer.makefile("rb") as lines:
            while (ready := time.monotonic()) and (first := lines.readline()):
                method, target, _ = first.decode().split()
                headers = dict(line.decode().strip().split(": ", 1) for line in iter(lines.readline, b"\r\n"))
                headers = {name.lower(): value for name, value in headers.items()}
                body = lines.read(int(headers.get("content-length", 0)))
                self.exchanges += 1
                trick = self.script(self.exchanges)
                try:
                    found = self.handler(httpx2.Request(method, f"http://raw{target}", content=body))
                except AssertionError as error:
                    self.broken.append(error)
                    raise
                more = "".join(f"{name}: {value}\r\n" for name, value in found.headers.items())
                reply = f"HTTP/1.1 {found.status_code} OK\r\n{more}".encode()
                reply += (
                    b"" if "content-length" in found.headers else f"content-length: {len(found.content)}\r\n".encode()
                )
                reply += b"\r\n" + found.content
                if trick is None:
                    peer.sendall(reply)
                    continue
                began = time.monotonic()
                try:
                    TRICKS[trick].play(peer, reply)
                except OSError:
                    pass  # the client has gone
                except AssertionError as error:
                    self.broken.append(error)
                ended = time.monotonic()
                self.seconds.append((ended - began, ended - ready))
                return

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """The URL."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            threads: list[threading.Thread] = []

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        peer, _ = listening.accept()
                        thread = threading.Thread(target=self.answer, args=(peer,), daemon=True)
                        threads.append(thread)
                        thread.start()

            thread = threading.Thread(target=accept, daemon=True)
            thread.start()
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            finally:
                listening.shutdown(socket.SHUT_RDWR)
                thread.join(10)
                for each in threads:
                    each.join(10)
                    assert not each.is_alive(), "a client did not hang up"


#: Where a trick is played, and how often: at first contact, at the texts, at a first and a later call, and for ever.
PLACES = ((1, 1), (2, 1), (3, 1), (5, 1), (3, 99))


@contextlib.contextmanager
def _sends() -> Iterator[list[str]]:
    """The requests that our own loop sends while the block runs."""
    begun: list[str] = []
    send = Caller._send

    def counted(self: Caller, method: str, path: str, *more: Any) -> Any:
        begun.append(path)
        return send(self, method, path, *more)

    with mock.patch.object(Caller, "_send", counted):
        yield begun


def exchange(name: str, at: int, times: int = 1) -> Counter[str]:
    """A run over loopback with a trick at one exchange, or at so many from there on; the counts."""
    trick = TRICKS[name]
    run = httpfaults.crashes.small("joint", 12)
    site = httpfaults.Site(run, run.oracle, "http", httpfaults.FaultDisk())
    server = RawServer(site, lambda number: name if at <= number < at + times else None)
    policy = Policy(attempts=3, deadline=DEADLINE, connect=DEADLINE, pause=0.0, total=10.0)
    ended: OracleError | None = None
    with Lag() as lag, server.running() as url, _sends() as sent:
        oracle = None
        try:
            oracle = HttpOracle(url, policy=policy)
            httpfaults.toyruns.tuned(httpfaults.replace(run, oracle=oracle), httpfaults.RUN, site.disk)
        except OracleError as error:
            ended = error
        finally:
            if oracle is not None:
                oracle.close()
    where = f"{name} at exchange {at}, {times} times"
    assert not server.broken, f"{where}: {server.broken[0]}"
    # What comes whole before the connection breaks is an answer.
    passes = (trick.passes and times == 1) or name in WHOLE
    assert passes == (ended is None), f"{where}: {ended}"
    # Not one more than our loop sends: neither the HTTP library nor anything else repeats beneath it.
    assert server.exchanges <= len(sent), where
    if times > 1 and name not in WHOLE:
        assert SENDS.get(name, policy.attempts) <= len(server.seconds) <= policy.attempts, where
    if trick.slow:
        for least, most in server.seconds:
            said = f"{where}: ended after {least:.2f} to {most:.2f} s, deadline {DEADLINE} s, lag {lag.worst:.2f} s"
            assert most >= EARLY, said
            assert least <= LATE + 3 * lag.worst, said
    if ended is None:
        httpfaults.audit(site.disk.durable(httpfaults.RUN / httpfaults.JOURNAL), 12, site.log, [], doubts=0)
    return Counter({"cases": 1, "tricks": len(server.seconds)})


def exchanges() -> dict[str, Any]:
    """Every trick at every place; the counts."""
    counts: Counter[str] = Counter()
    for name in TRICKS:
        for at, times in PLACES:
            counts += exchange(name, at, times)
    return dict(counts)
