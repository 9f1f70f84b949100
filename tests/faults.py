"""The faults of a server, each as what becomes of a good answer."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import httpx2
import numpy as np
import oipdouble

from bbprompt import wire

#: Extension of a right answer: the server's answer to the request before this one.
BEFORE = "before"
LENGTH = "inference-header-content-length"
Request, Response = httpx2.Request, httpx2.Response

#: What becomes of a call: it passes by itself, is asked for once more, ends the run, or is answered otherwise.
Course = Literal["transient", "malformed", "final", "lie"]


@dataclass(frozen=True)
class Fault:
    """One way to answer wrongly.

    Attributes:
        kind: The row of the table that it belongs to.
        course: What the client must make of it.
        play: The wrong answer, from the request and the right answer, or an error that it raises; None for the right
            answer means that the request was not carried out.
        executed: Whether the request is carried out before.
    """

    kind: str
    course: Course
    play: Callable[[Request, Any], Response]
    executed: bool = True


def says(status: int, text: str = "no", **headers: str) -> Callable[[Request, Any], Response]:
    """An answer that has nothing to do with the question."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request, good: Response(status, text=text, headers=named)


def breaks(error: type[httpx2.TransportError], message: str, cause: Exception | None = None) -> Callable[..., Response]:
    """No answer."""

    def play(request: Request, good: Any) -> Response:
        raise error(message) from cause

    return play


def body(change: Callable[[bytes], bytes]) -> Callable[[Request, Any], Response]:
    """The right answer with another body."""
    return lambda request, good: Response(200, content=change(good.content), headers=_kept(good))


def again(good: Any) -> Response:
    """The bytes of an answer once more."""
    return Response(200, content=good.content, headers=_kept(good))


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Request, Any], Response]:
    """The right answer with other tensors."""

    def play(request: Request, good: Any) -> Response:
        if "/v2/" in request.url.path:
            return _kserve_with(good, change)
        call_id, scores = wire.decode_reply(good.content)
        found = change({"id": call_id, "logits": scores.logits, "normalizer": scores.normalizer})
        meta = {"call_id": found.pop("id"), "cut": str(scores.cut)}
        return Response(200, content=wire._write("reply", meta, found))

    return play


def _kserve_with(good: Response, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Response:
    length = int(good.headers[LENGTH])
    head, tail = json.loads(good.content[:length]), good.content[length:]
    arrays: dict[str, Any] = {}
    for entry in head["outputs"]:
        size = entry["parameters"]["binary_data_size"]
        arrays[entry["name"]] = np.frombuffer(tail[:size], oipdouble.TYPES[entry["datatype"]]).reshape(entry["shape"])
        tail = tail[size:]
    said = json.loads(arrays.pop("reply").tobytes())
    found = change({"id": said["call_id"], **arrays})
    reply = json.dumps(said | {"call_id": found.pop("id")}).encode()
    outputs, blob = [], b""
    for name, array in {"reply": np.frombuffer(reply, "u1"), **found}.items():
        entry = {"name": name, "datatype": oipdouble.OUTPUTS[name][0], "shape": list(array.shape)}
        outputs.append(entry | {"parameters": {"binary_data_size": array.nbytes}})
        blob += array.tobytes()
    text = json.dumps(head | {"outputs": outputs}).encode()
    return Response(200, content=text + blob, headers={LENGTH: str(len(text))})


def _kept(good: Response) -> dict[str, str]:
    return {name: good.headers[name] for name in (LENGTH,) if name in good.headers}


def _number(value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(found: dict[str, Any]) -> dict[str, Any]:
        logits = found["logits"].copy()
        logits[-1, -1, 0] = value
        return found | {"logits": logits}

    return change


def _on(name: str, change: Callable[[Any], Any]) -> Callable[[Request, Any], Response]:
    return tensors(lambda found: found | {name: np.ascontiguousarray(change(found[name]))})


def _bomb(request: Request, good: Any) -> Response:
    # Not decoded by anybody: the declared encoding alone ends it. A real bomb would have to be unpacked to be one.
    return Response(200, headers={"content-encoding": "gzip"}, stream=httpx2.ByteStream(b"\x1f\x8b" + b"\0" * 1000))


_CERT = ssl.SSLCertVerificationError("self-signed certificate")
_DRIP = "the time for the whole exchange is over"

#: The 24 kinds of the table, most of them in several forms.
FAULTS: dict[str, Fault] = {
    **{str(n): Fault("5xx", "transient", says(n), False) for n in (500, 502, 503, 504)},
    "429": Fault("429", "transient", says(429), False),
    "429 retry-after": Fault("429", "transient", says(429, retry_after="7"), False),
    "429 absurd retry-after": Fault("429", "transient", says(429, retry_after="86400000"), False),
    "408": Fault("408", "transient", says(408), False),
    **{str(n): Fault("4xx", "final", says(n), False) for n in (400, 401, 403, 404, 413, 422)},
    "301": Fault("301 to another host", "final", says(301, location="http://elsewhere/v1/score"), False),
    "refused": Fault("refused", "transient", breaks(httpx2.ConnectError, "[Errno 111] Connection refused"), False),
    "no such host": Fault(
        "DNS", "transient", breaks(httpx2.ConnectError, "Name not known", socket.gaierror(-2, "Name not known")), False
    ),
    "certificate": Fault("TLS", "final", breaks(httpx2.ConnectError, "verify failed", _CERT), False),
    "reset before": Fault("reset", "transient", breaks(httpx2.WriteError, "[Errno 104] Connection reset"), False),
    "reset during": Fault("reset", "transient", breaks(httpx2.ReadError, "[Errno 104] Connection reset")),
    "reset after": Fault("reset", "transient", breaks(httpx2.RemoteProtocolError, "Server disconnected")),
    "read timeout": Fault("read timeout", "transient", breaks(httpx2.ReadTimeout, "timed out")),
    "drip": Fault("drip", "transient", breaks(httpx2.ReadTimeout, _DRIP)),
    "endless headers": Fault("endless headers", "transient", breaks(httpx2.RemoteProtocolError, "too much data")),
    "truncated": Fault("truncated body", "transient", breaks(httpx2.RemoteProtocolError, "incomplete message body")),
    "cut without notice": Fault("truncated body", "malformed", body(lambda data: data[:-8])),
    "longer": Fault("longer than its length", "malformed", body(lambda data: data + b"\0" * 8)),
    "no UTF-8": Fault("invalid", "malformed", body(lambda data: b"\xff\xfe" + data)),
    "no JSON": Fault("invalid", "malformed", body(lambda data: data[:8] + b"}" + data[9:])),
    "noise": Fault("invalid", "malformed", body(lambda data: bytes(range(256)))),
    "bomb": Fault("gzip bomb", "final", _bomb),
    "empty 200": Fault("empty 200", "malformed", body(lambda data: b"")),
    "HTML 200": Fault("HTML 200", "malformed", body(lambda data: b"<html><body>Welcome to nginx!</body></html>")),
    "one candidate fewer": Fault("shape", "malformed", _on("logits", lambda a: a[:-1])),
    "one candidate more": Fault("shape", "malformed", _on("logits", lambda a: np.concatenate([a, a[:1]]))),
    "one span fewer": Fault("shape", "malformed", _on("logits", lambda a: a[:, :-1])),
    "one span more": Fault("shape", "malformed", _on("logits", lambda a: np.concatenate([a, a[:, :1]], axis=1))),
    "one text more": Fault("shape", "malformed", _on("normalizer", lambda a: np.concatenate([a, a[:, :1]], axis=1))),
    "transposed": Fault("shape", "malformed", _on("logits", lambda a: a.transpose(2, 0, 1))),
    "0-d": Fault("shape", "malformed", _on("normalizer", lambda a: a[0, 0, 0].reshape(()))),
    "dtype": Fault("dtype", "malformed", _on("logits", lambda a: a.astype("<f8"))),
    "nan": Fault("not finite", "malformed", tensors(_number(float("nan")))),
    "inf": Fault("not finite", "malformed", tensors(_number(float("inf")))),
    "-inf": Fault("not finite", "malformed", tensors(_number(-float("inf")))),
    "swapped": Fault("other call id", "malformed", lambda request, good: again(good.extensions[BEFORE])),
    "another's": Fault("other call id", "malformed", tensors(lambda found: found | {"id": "f" * 64})),
    "twice": Fault("duplicate reply", "malformed", body(lambda data: data * 2)),
    "lie": Fault("same id answered differently", "lie", breaks(httpx2.ReadError, "[Errno 104] Connection reset")),
}
ONE_OF_EACH = tuple({fault.kind: name for name, fault in FAULTS.items()}.values())
