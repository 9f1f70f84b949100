"""One exchange with a server that may be slow, gone or hostile; the only place where anything is repeated.

What may pass by itself (no connection, a time limit, 429, 5xx) is tried again after a random pause that grows, or
after what the server asks for. A malformed answer is asked for once more. Everything else is final. An answer is
read up to a bound, in a bounded time, uncompressed and without following redirects. A client that gets fewer answers
than it asks again runs out of tries for all its requests together: many requests must not hammer a server that is ill.
"""

from __future__ import annotations

import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx2
import tenacity

from bbprompt.backends.deadline import ENDS, DeadlineTransport, proxy_for
from bbprompt.errors import OracleError, UsageError
from bbprompt.wire import WireError

__all__ = ["Answer", "Caller", "Policy", "Retries", "Transient", "plain"]

_A = TypeVar("_A")
_T = TypeVar("_T")
_TOKEN = re.compile(r"[!-~]+")
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_DECLINED = frozenset({408, 425, 429, 503})  # of these: the request was not carried out
_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient a client is; seconds.

    Attributes:
        attempts: Most tries of a request.
        connect: To connect.
        deadline: For one try as a whole.
        total: For all tries of a request; no pause begins that would end later.
        pause: Longest first pause; doubled at every try.
        longest: Longest pause.
        obey: Longest `Retry-After` that is obeyed.
        quota: How many more repetitions than answers there may be, over all requests of a client.
        resend: Whether a request that the server may have carried out is made again. A server that charges for every
            request must not see it: the run ends, and counts the calls as spent when it is resumed.
        sleep: How to pause; None for a pause that ends when the client is closed.
        clock: Seconds, never going back.
    """

    attempts: int = 4
    connect: float = 5.0
    deadline: float = 600.0
    total: float = 1200.0
    pause: float = 0.5
    longest: float = 20.0
    obey: float = 60.0
    quota: int = 50
    resend: bool = True
    sleep: Callable[[float], None] | None = None
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, content type, body and headers (names in lower case) of a final answer."""

    status: int
    type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Transient(OracleError):
    """What may pass by itself.

    Args:
        message: What happened.
        after: Seconds after which the server wants to be asked again.
        done: Whether the request may have been carried out.
    """

    def __init__(self, message: str, after: float | None = None, *, done: bool = True) -> None:
        super().__init__(message)
        self.after, self.done = after, done


class _Quota:
    """Repetitions that are left to all requests of a client together: each takes one, each answer gives one back.

    After the retry quota of AWS's clients: while a server answers more often than not, nothing is noticed of it.
    """

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take one; False if none is left."""
        with self._lock:
            if not self._left:
                return False
            self._left -= 1
            return True

    def give(self) -> None:
        """Give one back."""
        with self._lock:
            self._left = min(self._left + 1, self._most)


class Retries:
    """Sends until there is a final answer.

    Args:
        url: Of the server, for messages.
        policy: How patient to be.
    """

    def __init__(self, url: str, policy: Policy) -> None:
        self._url, self._policy = url, policy
        self._random = random.Random()  # not the global one, which a search may have seeded
        self._quota = _Quota(policy.quota)
        self._ended = threading.Event()

    def end(self) -> None:
        """Send no more and pause no longer: whoever is in `run` leaves it, once nothing is under way."""
        self._ended.set()

    def run(self, send: Callable[[], _A], read: Callable[[_A], _T]) -> _T:
        """What `read` makes of the answer to `send`.

        Args:
            send: Makes one exchange; raises `Transient` for what may pass.
            read: Makes the result of an answer; `WireError` means that the answer is malformed.

        Raises:
            OracleError: There is no answer, or `send` or `read` raises it.
        """
        malformed = 0
        began = self._policy.clock()

        def once() -> _T:
            nonlocal malformed
            if self._ended.is_set():
                raise self._closed()
            try:
                answer = send()
            except Transient as error:
                if self._ended.is_set():
                    raise self._closed() from error
                raise
            try:
                found = read(answer)
                self._quota.give()
                return found
            except WireError as error:
                malformed += 1
                if malformed == 2:
                    raise OracleError(f"{self._url}: the answer is malformed: {error}") from error
                raise Transient(f"the answer is malformed: {error}") from error

        def late(state: tenacity.RetryCallState) -> bool:
            return self._policy.clock() - began + state.upcoming_sleep >= self._policy.total

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, Transient) and (self._policy.resend or not error.done)
            ),
            stop=lambda state: state.attempt_number >= self._policy.attempts or late(state) or not self._quota.take(),
            wait=self._pause,
            sleep=self._policy.sleep or self._wait,
            reraise=True,
        )
        try:
            return retrying(once)
        except Transient as error:
            tried = retrying.statistics["attempt_number"]
            raise OracleError(
                f"{self._url}: {error} (tries: {tried}); check that the server runs; a run that was begun goes on with "
                "`bbprompt resume`"
            ) from error

    def _closed(self) -> OracleError:
        return OracleError(f"{self._url}: closed, while there was no answer yet")

    def _wait(self, seconds: float) -> None:
        self._ended.wait(seconds)

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Full jitter: anything up to a bound that doubles; or what the server asked for."""
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, Transient) and error.after is not None:
            return min(error.after, self._policy.obey)
        most: float = self._policy.pause * 2 ** (state.attempt_number - 1)
        return self._random.uniform(0.0, min(most, self._policy.longest))


class Caller:
    """Sends requests to one server.

    Args:
        url: Where it is, without a slash at the end.
        token: What it wants to see; None for nothing.
        policy: How patient to be.
        workers: Most requests at once.
        transport: Instead of the network.

    Raises:
        UsageError: The token holds what no header may.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        policy: Policy,
        workers: int,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        if token and not _TOKEN.fullmatch(token):
            raise UsageError("the token of the server: ASCII letters, digits or signs without spaces are expected")
        self._url, self._policy = url, policy
        self._retries = Retries(url, policy)
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {})
        limits = httpx2.Limits(max_connections=workers, max_keepalive_connections=workers)
        self._client = httpx2.Client(
            base_url=url,
            headers=headers,
            timeout=httpx2.Timeout(policy.deadline, connect=policy.connect),
            trust_env=False,  # what the environment says of proxies is in the transport
            follow_redirects=False,
            transport=transport or DeadlineTransport(limits, proxy_for(httpx2.URL(url))),
        )

    def call(
        self,
        method: str,
        path: str,
        read: Callable[[Answer], _T],
        *,
        body: bytes = b"",
        kind: str | None = None,
        most: int,
        headers: Mapping[str, str] | None = None,
    ) -> _T:
        """Send a request until there is a final answer.

        Args:
            method: GET, PUT or POST.
            path: From the server's URL.
            read: Makes the result of the answer; `WireError` means that it is malformed.
            body: What to send.
            kind: Its content type.
            most: Most bytes of an answer.
            headers: More headers.

        Raises:
            OracleError: There is no answer, or `read` raises it.
        """
        return self._retries.run(lambda: self._send(method, path, body, kind, most, headers or {}), read)

    def close(self) -> None:
        """Close the connections; requests that are under way end with an error."""
        self._retries.end()
        self._client.close()

    def _send(
        self, method: str, path: str, body: bytes, kind: str | None, most: int, more: Mapping[str, str]
    ) -> Answer:
        ends = self._policy.clock() + self._policy.deadline
        headers = ({"content-type": kind} if kind else {}) | dict(more)
        extensions = {ENDS: time.monotonic() + self._policy.deadline}
        try:
            with self._client.stream(
                method, path, content=body or None, headers=headers, extensions=extensions
            ) as response:
                if "content-encoding" in response.headers:
                    raise OracleError(f"{self._url}: the answer is compressed although that was not asked for")
                pieces, size = [], 0
                for piece in response.iter_bytes():
                    size += len(piece)
                    if size > most:
                        raise OracleError(f"{self._url}: the answer is longer than {most} bytes")
                    if self._policy.clock() > ends:
                        raise self._late()
                    pieces.append(piece)
                status, answered = response.status_code, b"".join(pieces)
                said = response.headers
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise OracleError(f"{self._url}: {plain(str(error))}; correct --backend") from error
        if status in _TRANSIENT:
            message = f"status {status}: {plain(answered.decode('utf-8', 'replace'))}"
            raise Transient(message, _seconds(said.get("retry-after", "")), done=status not in _DECLINED)
        if 300 <= status < 400:
            raise OracleError(f"{self._url}: redirects elsewhere, which is not followed; give the final URL")
        return Answer(status, said.get("content-type", ""), answered, dict(said))

    def _late(self) -> Transient:
        return Transient(f"no whole answer within {self._policy.deadline:g} s")

    def _unreachable(self, error: httpx2.TransportError) -> OracleError:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return OracleError(f"{self._url}: its certificate is not trusted; set SSL_CERT_FILE to its authority")
            if isinstance(cause, ssl.SSLError):
                return OracleError(f"{self._url}: no TLS there; is it http:// rather than https://?")
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout):
            return self._late()
        if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
            return OracleError(f"{self._url}: {plain(str(error))}; correct --backend")
        message = f"cannot be reached ({type(error).__name__}: {plain(str(error))})"
        return Transient(message, done=not isinstance(error, _UNSENT))


def plain(text: str) -> str:
    """What a server said, fit for one line of a terminal or log."""
    short = text if len(text) <= 200 else text[:200] + "…"
    return "".join(char if char.isprintable() else " " for char in short).strip()


def _seconds(text: str) -> float | None:
    """`Retry-After`, a number or a date, in seconds from now; None for anything else."""
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        when = parsedate_to_datetime(text)
        return max((when - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError):  # no date, or one without a zone
        return None
