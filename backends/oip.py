"""The oracle of a model server that speaks the Open Inference Protocol (KServe v2): Triton, MLServer and others.

The model behind it is ours, as `bbprompt export-server` writes it: prompts that act on every layer are no model's
standard input, but the protocol carries any tensors. What is in them says `bbprompt.oip`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import httpx2
import numpy as np
from numpy.typing import NDArray

from bbprompt.backends.calls import Policy, plain
from bbprompt.backends.oip_http import HttpTransport
from bbprompt.backends.remote import Pieces, read_info, read_size
from bbprompt.errors import OracleError, TextError, UsageError
from bbprompt.oip import INPUTS, OUTPUTS, Tensors, ask_description, ask_scores, read_reply
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points, check_scores
from bbprompt.wire import PROTOCOL, WireError, request_for

__all__ = ["SCHEMES", "OipOracle"]

_T = TypeVar("_T")

#: Beginnings of a URL, and what is spoken there.
SCHEMES = {"kserve": "http", "kserve+https": "https", "kserve+grpc": "grpc", "kserve+grpcs": "grpcs"}
_URL = re.compile(r"(?P<scheme>[a-z+]+)://(?P<place>[^/?#@\s]+(?:/[^?#@\s]+)?)/(?P<model>[A-Za-z0-9._-]{1,128})/?")
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})")
_DESCRIPTION = "describe"


class _Forgotten(OracleError):
    """The model does not have the texts."""


class Transport(Protocol):
    """One model of a server, over HTTP or gRPC."""

    def signature(self) -> tuple[dict[str, str], dict[str, str]]:
        """Types of the model's inputs and outputs, by name."""

    def infer(self, name: str, tensors: Tensors, read: Callable[[Tensors], _T], *, numbers: int) -> _T:
        """What `read` makes of the outputs, at most so many numbers."""

    def close(self) -> None:
        """Close the connections."""


class OipOracle:
    """A frozen model behind a server of the Open Inference Protocol.

    Args:
        url: `kserve://HOST:PORT/MODEL` (HTTP), `kserve+https://`, `kserve+grpc://` or `kserve+grpcs://`; over HTTP
            there may be a path before the model.
        token: Of a gateway in front of the server.
        workers: Most requests at once.
        policy: How patient to be.
        transport: Instead of the network, over HTTP.

    Raises:
        UsageError: What is no such URL, or gRPC is not installed.
        OracleError: Nobody answers there, there is no such model, or it is none of ours.
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
        self._url, chosen = url, policy or Policy()
        self._transport = _connect(url, token, chosen, workers, transport)
        self._pieces = Pieces(url, workers, 2 * (chosen.total + chosen.deadline))
        self._sent: set[str] = set()
        self._lock = threading.Lock()
        try:
            inputs, outputs = self._transport.signature()
            if not (inputs.items() >= INPUTS.items() and outputs.items() >= OUTPUTS.items()):
                raise OracleError(f"{plain(url)}: that model is none of `bbprompt export-server`; correct --backend")
            described = self._transport.infer(_DESCRIPTION, ask_description(), self._describe, numbers=65536)
        except BaseException:
            self.close()
            raise
        self._info, self._points, self._texts = described

    @property
    def info(self) -> OracleInfo:
        """What the model said it is, with the size of a piece."""
        return replace(self._info, piece=self._points)

    @property
    def most_points(self) -> int:
        """Candidates that one request takes."""
        return self._points

    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score every candidate on every text; see `bbprompt.oracle.Oracle`."""
        checked, digest = check_points(points, self._info), batch.digest()
        if len(batch.forms) > self._texts:
            raise OracleError(f"{self._url}: {len(batch.forms)} texts, the model takes {self._texts}")
        return self._pieces.score(
            checked, self._points, lambda piece: self._piece(batch, digest, piece, support, longest_answer)
        )

    def close(self) -> None:
        """Close the connections; safe to call twice."""
        self._pieces.close()
        self._transport.close()

    def _piece(
        self,
        batch: TextBatch,
        digest: str,
        points: NDArray[np.float32],
        support: Support,
        longest_answer: int | None,
    ) -> Scores:
        request = request_for(self._info, digest, points, support, longest_answer)
        spans, texts = sum(batch.sizes), len(batch.forms)

        def read(tensors: Tensors) -> Scores:
            said, scores = read_reply(tensors)
            self._refused(said)
            if scores is None or said["call_id"] != request.call_id:
                raise WireError("it belongs to another request")
            answers, channels = longest_answer is not None, self._info.channels
            try:
                return check_scores(scores, batch, len(points), answers=answers, channels=channels)
            except OracleError as error:
                raise WireError(str(error)) from error

        with self._lock:
            known = digest in self._sent
        # Where a replica does not have the texts, the second request brings them: one more is never needed.
        for along in (None, batch) if known else (batch,):
            tensors = ask_scores(request, along)
            try:
                scores = self._transport.infer(
                    request.call_id, tensors, read, numbers=len(points) * (4 * spans + 8 * texts)
                )
            except _Forgotten:
                continue
            with self._lock:
                self._sent.add(digest)
            return scores
        raise OracleError(f"{self._url}: the model asks for texts that came with the request")

    def _describe(self, tensors: Tensors) -> tuple[OracleInfo, int, int]:
        said, _ = read_reply(tensors)
        if said.get("protocol") != PROTOCOL:
            raise OracleError(
                f"{self._url}: speaks protocol {plain(repr(said.get('protocol')))}, this version speaks {PROTOCOL}; "
                "install the same version of bbprompt on both sides"
            )
        self._refused(said)
        try:
            limits = said["limits"]
            return read_info(said["model"]), read_size(limits["points"]), read_size(limits["texts"])
        except (ValueError, TypeError, LookupError) as error:
            raise WireError("it does not describe a model as `bbprompt export-server` does") from error

    def _refused(self, said: dict[str, Any]) -> None:
        """Raise what a refusal means, if it is one."""
        if "error" not in said:
            return
        message = plain(str(said.get("message")))
        match said["error"]:
            case "texts":
                raise _Forgotten(message)
            case "model":
                raise OracleError(f"{self._url}: {message}; start it with those that the run began with")
            case "data":
                raise TextError(message)
        raise OracleError(f"{self._url}: refused: {message}")


def _connect(
    url: str, token: str | None, policy: Policy, workers: int, transport: httpx2.BaseTransport | None
) -> Transport:
    found = _URL.fullmatch(url)
    host, _, path = found["place"].partition("/") if found else ("", "", "")
    port = _HOST.fullmatch(host)
    if found is None or found["scheme"] not in SCHEMES or port is None or not 1 <= int(port[2]) <= 65535:
        # Not shown: there may be a secret in it.
        raise UsageError(
            "--backend: expected kserve://HOST:PORT/MODEL or kserve+grpc://HOST:PORT/MODEL; "
            "a token goes into BBPROMPT_TOKEN"
        )
    spoken = SCHEMES[found["scheme"]]
    if spoken.startswith("http"):
        return HttpTransport(f"{spoken}://{found['place']}", found["model"], token, policy, workers, transport)
    if path:
        raise UsageError(f"--backend {url}: gRPC knows no path; give kserve+grpc://HOST:PORT/MODEL")
    try:
        from bbprompt.backends.oip_grpc import GrpcTransport
    except ModuleNotFoundError as error:
        raise UsageError(f"--backend {url}: {error.name} is not installed; pip install 'bbprompt[kserve]'") from error
    return GrpcTransport(host, found["model"], token, policy, tls=spoken == "grpcs")
