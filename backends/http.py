"""The oracle of `bbprompt serve`: candidates go out as a few kB, scores come back, everything is checked."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace

import httpx2
import numpy as np
from numpy.typing import NDArray

from bbprompt.backends.calls import Answer, Caller, Policy, plain
from bbprompt.backends.remote import Pieces, read_info, read_size
from bbprompt.errors import BBPromptError, OracleError, TextError, UsageError
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points, check_scores
from bbprompt.wire import (
    CONTENT_TYPE,
    PROTOCOL,
    WireError,
    decode_reply,
    encode_batch,
    encode_request,
    request_for,
)

__all__ = ["HttpOracle"]

_SMALL = 65536  # bytes of an answer that holds no scores
_ROUNDS = 3  # times that texts are registered for one request


class _Forgotten(OracleError):
    """The server does not keep the texts."""


@dataclass(frozen=True, slots=True)
class _Server:
    """What a server says of itself."""

    info: OracleInfo
    points: int
    texts: int
    body: int


class HttpOracle:
    """A frozen model behind `bbprompt serve`.

    A population larger than the server takes at once is cut into pieces of the server's size. The number of workers
    decides how many pieces are under way, not what a piece is: replies do not depend on it.

    Args:
        url: `http://host:port` or `https://host:port`, with a path where a proxy wants one.
        token: The server's token.
        workers: Most requests at once.
        policy: How patient to be.
        transport: Instead of the network.

    Raises:
        UsageError: What is no such URL.
        OracleError: Nobody answers there, the token is wrong, or it speaks another protocol.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        workers: int = 1,
        policy: Policy | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._url, self._policy = _checked(url), policy or Policy()
        self._caller = Caller(self._url, token, self._policy, workers, transport)
        self._pieces = Pieces(self._url, workers, self._policy.total + self._policy.deadline)
        self._registered: set[str] = set()
        self._lock = threading.Lock()
        try:
            self._server = self._caller.call("GET", "/v1/info", self._description, most=_SMALL)
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> OracleInfo:
        """What the server said it is, with the size of a piece."""
        return replace(self._server.info, piece=self._server.points)

    @property
    def most_points(self) -> int:
        """Candidates that one request takes."""
        return self._server.points

    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score every candidate on every text; see `bbprompt.oracle.Oracle`."""
        checked, digest = check_points(points, self.info), batch.digest()
        return self._pieces.score(
            checked,
            self._server.points,
            lambda piece: self._piece(batch, digest, piece, support, longest_answer),
        )

    def close(self) -> None:
        """Close the connections; safe to call twice."""
        self._pieces.close()
        self._caller.close()

    def _piece(
        self,
        batch: TextBatch,
        digest: str,
        points: NDArray[np.float32],
        support: Support,
        longest_answer: int | None,
    ) -> Scores:
        request = request_for(self._server.info, digest, points, support, longest_answer)
        body = self._fits(encode_request(request))
        spans, texts = sum(batch.sizes), len(batch.forms)

        def read(answer: Answer) -> Scores:
            self._expect(answer, 200)
            call_id, scores = decode_reply(answer.body)
            if call_id != request.call_id:
                raise WireError("it belongs to another request")
            try:
                return check_scores(
                    scores, batch, len(points), channels=self.info.channels, answers=longest_answer is not None
                )
            except OracleError as error:
                raise WireError(str(error)) from error

        # Generous: the numbers of every plausible readout, twice.
        most = _SMALL + 64 * len(points) * (spans + 2 * texts)
        for _ in range(_ROUNDS):
            self._register(batch, digest)
            try:
                return self._caller.call("POST", "/v1/score", read, body=body, kind=CONTENT_TYPE, most=most)
            except _Forgotten:
                with self._lock:
                    self._registered.discard(digest)
        raise OracleError(f"{self._url}: the server forgets texts as soon as it has them; raise its --lease")

    def _register(self, batch: TextBatch, digest: str) -> None:
        with self._lock:
            if digest in self._registered:
                return
            if len(batch.forms) > self._server.texts:
                raise OracleError(f"{self._url}: {len(batch.forms)} texts, the server takes {self._server.texts}")
            body = self._fits(encode_batch(batch))

            def read(answer: Answer) -> None:
                self._expect(answer, 201, 204)

            self._caller.call("PUT", f"/v1/batches/{digest}", read, body=body, kind=CONTENT_TYPE, most=_SMALL)
            self._registered.add(digest)

    def _fits(self, body: bytes) -> bytes:
        if len(body) > self._server.body:
            raise OracleError(
                f"{self._url}: a request of {len(body)} bytes, the server takes {self._server.body}; "
                "raise its --max-body"
            )
        return body

    def _description(self, answer: Answer) -> _Server:
        self._expect(answer, 200)
        try:
            value = json.loads(answer.body)
            protocol, model, limits = value["protocol"], value["model"], value["limits"]
            if protocol != PROTOCOL:
                raise OracleError(
                    f"{self._url}: speaks protocol {plain(repr(protocol))}, this version speaks {PROTOCOL}; "
                    "install the same version of bbprompt on both sides"
                )
            return _Server(read_info(model), *(read_size(limits[name]) for name in ("points", "texts", "body")))
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise WireError("it does not describe a model as `bbprompt serve` does") from error

    def _expect(self, answer: Answer, *statuses: int) -> None:
        """Raise what a status means unless it is one of `statuses`."""
        if answer.status in statuses:
            return
        if 200 <= answer.status < 300:
            raise WireError(f"status {answer.status} is not what was expected")
        code, message = _refusal(answer.body)
        raise self._meaning(answer.status, code, message)

    def _meaning(self, status: int, code: str, message: str) -> BBPromptError:
        match status, code:
            case ((401 | 403), _):
                return OracleError(f"{self._url}: missing or wrong token; set BBPROMPT_TOKEN to that of the server")
            case 404, "batch":
                return _Forgotten(message)
            case 404, _:
                return OracleError(f"{self._url}: no bbprompt server of protocol {PROTOCOL} there; correct --backend")
            case 409, _:
                return OracleError(f"{self._url}: {message}; start it with those that the run began with")
            case 422, "data":
                return TextError(message)
        return OracleError(f"{self._url}: refused (status {status}): {message}")


def _checked(url: str) -> str:
    """The URL without a slash at its end; what it may not have is refused."""
    try:
        parts = httpx2.URL(url)
        if not 0 <= (parts.port or 80) <= 65535:
            raise httpx2.InvalidURL("a port is at most 65535")
    except httpx2.InvalidURL as error:
        raise UsageError(f"--backend {plain(url)}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.fragment or parts.userinfo:
        # Not shown: there may be a secret in it.
        raise UsageError(
            "--backend: expected http://HOST:PORT or https://HOST:PORT; the token goes into BBPROMPT_TOKEN"
        )
    return url.rstrip("/")


def _refusal(body: bytes) -> tuple[str, str]:
    """Word and line of a refusal; empty and raw where it is not in our form, as from a proxy."""
    try:
        value = json.loads(body)
        return str(value["error"]), plain(str(value["message"]))
    except (ValueError, TypeError, LookupError, RecursionError):
        return "", plain(body[:400].decode("utf-8", "replace"))
