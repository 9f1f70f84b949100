"""What a server is asked by those who mean it harm."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import canaries
import numpy as np
from servers import TOKEN
from tiny_prompt import batch_of

from bbprompt import wire
from bbprompt.serve.app import routes
from bbprompt.serve.metrics import Metrics
from bbprompt.serve.scorer import Scorer
from bbprompt.serve.settings import ServeSettings
from bbprompt.testing import ToyOracle

CANARY = Path("/tmp/bbprompt-was-here")
MOST_GROWTH = 50 * 2**20  # bytes
SETTINGS = ServeSettings(token=TOKEN, points=64, texts=32, body=2**20, receive=0.5)
BATCH = batch_of("pair", 3)
TEXTS, DIGEST = wire.encode_batch(BATCH), BATCH.digest()
ASKED = wire.request_for(ToyOracle().info, DIGEST, np.random.default_rng(0).normal(size=(2, 3, 4)), "candidates", None)
SCORE = wire.encode_request(ASKED)
#: What a request of any bytes may end in: a refusal of the client, or a closed connection.
REFUSED = frozenset({0, *range(400, 500)})


@dataclass(frozen=True)
class Attack:
    """Bytes for the server, and the statuses that may answer them; 0 is a connection closed without an answer."""

    name: str
    raw: bytes
    allowed: frozenset[int]


def http(
    method: str, path: str, body: bytes = b"", *, token: str | None = TOKEN, length: Any = None, more: str = ""
) -> bytes:
    """A request, as a client would write it but for what is wanted otherwise."""
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: {wire.CONTENT_TYPE}\r\n"
    head += f"Authorization: Bearer {token}\r\n" if token is not None else ""
    head += f"Content-Length: {len(body) if length is None else length}\r\n" if length != "" else ""
    return (head + more + "\r\n").encode("utf-8") + body


def tensor_file(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors message of any header, well formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def paths() -> list[str]:
    """Names that lead elsewhere where somebody builds a path from them."""
    up = ["..", "../..", "..\\..", "....//", ".%00.", "%2e%2e", "%252e%252e", "..%2f", "..%5c", "%c0%ae%c0%ae", "..;"]
    ends = ["/etc/passwd", str(CANARY), "%2fetc%2fpasswd", ""]
    odd = [
        "/etc/passwd",
        "C:\\Windows",
        "\\\\host\\share",
        "CON",
        "NUL.txt",
        "a" * 300,
        "‮txt.exe",
        "a\0b",
        "~",
        "-rf",
        "*",
    ]
    odd += [
        "$(id)",
        "`id`",
        "|id",
        ";id",
        "{{7*7}}",
        "%n%s",
        "<script>",
        "' or 1=1--",
        "\u2024\u2024/",
        "０" * 64,
        "é" * 32,
    ]
    return [a + b for a, b in product(up, ends)] + odd


def attacks() -> Iterator[Attack]:
    """Everything that is sent by name."""
    info, home = ToyOracle().info, "/v1/score"
    known = [
        (method, route.path.replace("{digest}", DIGEST))
        for route in routes(Scorer(ToyOracle(), SETTINGS, Metrics()), SETTINGS, Metrics()).routes
        for method in route.methods  # type: ignore[attr-defined]
    ]
    denied = frozenset({401})
    for method, path in [*known, ("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/admin")]:
        for token in (None, "", "x", TOKEN.upper(), TOKEN[:-1], TOKEN + "x", f" {TOKEN}", f"{TOKEN}\t{TOKEN}"):
            yield Attack(f"{method} {path} with token {token!r}", http(method, path, token=token), denied)
        yield Attack(f"{method} {path} token in query", http(method, f"{path}?token={TOKEN}", token=None), denied)
        twice = f"Authorization: Bearer {TOKEN}\r\n"
        yield Attack(f"{method} {path} two tokens", http(method, path, more=twice), denied)
    for length in (
        2**20 + 1,
        2**31,
        2**63,
        2**64,
        10**30,
        "9" * 5000,
        "-1",
        "+5",
        "1.0",
        "1e3",
        "0x10",
        " ",
        "five",
        "1_0",
    ):
        yield Attack(f"length {str(length)[:20]}", http("POST", home, b"", length=length), frozenset({400, 413}))
    yield Attack("a body above the limit", http("POST", home, bytes(SETTINGS.body + 1)), frozenset({413}))
    for path, method in product(paths(), ("PUT", "GET")):
        place = quote(path, safe="/%\\;*$(){}")
        raw = http(method, f"/v1/batches/{place}", TEXTS if method == "PUT" else b"")
        yield Attack(f"{method} {path[:40]!r}", raw, frozenset({404, 405, 422}))
    for method in ("TRACE", "CONNECT", "OPTIONS", "DELETE", "PATCH", "get", "A" * 9000, "G\0T", "PROPFIND", "HEAD"):
        yield Attack(f"method {method[:10]!r}", http(method, home), frozenset({400, 405}))
    yield from framing(home)
    for encoding in ("gzip", "deflate", "br", "zstd", "identity, gzip", "GZIP", "x"):
        packed = gzip.compress(b"\0" * 10**6)
        raw = http("POST", home, packed, more=f"Content-Encoding: {encoding}\r\n")
        yield Attack(f"encoding {encoding}", raw, frozenset({415}))
    for kind in ("text/plain", "application/json", "application/x-python-pickle", "multipart/form-data; boundary=x"):
        raw = http("POST", home, SCORE).replace(wire.CONTENT_TYPE.encode(), kind.encode())
        yield Attack(f"type {kind}", raw, frozenset({415}))
    for name, body in bodies(info):
        yield Attack(f"score: {name}", http("POST", home, body), frozenset({400, 409, 413, 422}))
    for name, body in texts():
        yield Attack(f"texts: {name}", http("PUT", f"/v1/batches/{'0' * 64}", body), frozenset({400, 413, 422}))


def framing(home: str) -> Iterator[Attack]:
    """Requests whose ends, lines and headers are not what they should be."""
    start = f"POST {home} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n"
    inner = http("GET", "/v1/info")
    for one, other in product((5, 0, len(inner)), (6, "5, 6", "")):
        raw = f"{start}Content-Length: {one}\r\nContent-Length: {other}\r\n\r\n".encode() + inner
        yield Attack(f"lengths {one} and {other}", raw, frozenset({400}))
    for coding in (
        "chunked",
        "Chunked",
        " chunked",
        "chunked\t",
        "\x0bchunked",
        "chunked, identity",
        "xchunked",
        "identity",
    ):
        for length in ("Content-Length: 5\r\n", ""):
            raw = f"{start}{length}Transfer-Encoding: {coding}\r\n\r\n0\r\n\r\n".encode() + inner
            yield Attack(f"coding {coding!r} {length!r}", raw, frozenset({400, 415}))
    for line in (
        "X Y: 1",
        "X\0: 1",
        "X: \0",
        "X: a\rb",
        ": 1",
        "X",
        " X: 1",
        "X : 1",
        "Content-Length : 5",
        "X: é",
        "X: ‮",
    ):
        yield Attack(f"header {line!r}", http("GET", "/v1/info", more=f"{line}\r\n"), frozenset({200, 400}))
    many = "".join(f"X-{n}: {n}\r\n" for n in range(3000))
    for name, more in (("many", many), ("long", f"X: {'a' * 10**6}\r\n"), ("long name", f"{'X' * 10**5}: 1\r\n")):
        yield Attack(f"{name} headers", http("GET", "/v1/info", more=more), frozenset({400, 431}))
    lines = [b"GET /v1/info", b"GET /v1/info HTTP/9.9\r\n\r\n", b"GET /v1/info HTTP/1.1\r\n\r\n", b"\0" * 100]
    lines += [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n" * 1000,
        b"GET",
    ]
    lines += [
        b"GET " + b"/" * 10**5 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://elsewhere/ HTTP/1.1\r\nHost: a\r\n\r\n",
    ]
    for number, raw in enumerate(lines):
        yield Attack(f"line {number}", raw, frozenset({0, 400, 401}))
    yield Attack("longer than said", http("POST", home, SCORE, length=5), frozenset({400}))
    yield Attack("shorter than said", http("POST", home, SCORE, length=len(SCORE) + 5), frozenset({408}))
    yield Attack("no length", http("POST", home, SCORE, length=""), frozenset({400}))


def bodies(info: Any) -> Iterator[tuple[str, bytes]]:
    """Requests for scores that are none."""
    size = int.from_bytes(SCORE[:8], "little")
    header, data = json.loads(SCORE[8 : 8 + size]), SCORE[8 + size :]
    for number in (0, 1, 2**16 + 1, 2**31, 2**63, 2**64 - 1):
        yield f"header of {number} bytes", tensor_file(header, data, number)
    for text in (
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b"9" * 10**5,
        b"NaN",
        b"{}",
        b"[]",
        b"null",
        b'"\xff"',
        b'{"a":1,"a":1}',
    ):
        yield f"header {text[:8]!r}", tensor_file(text, data)
    shapes: list[Any] = [[2**40, 2**40, 2**40], [2**62, 4, 1], [-1, 3, 4], [2.0, 3, 4], [True, 3, 4], ["2", 3, 4], []]
    shapes += [[2] * 100, [0, 3, 4], None, {}, [2, 3, 5], [10**400, 1, 1]]
    for shape in shapes:
        yield f"shape {str(shape)[:30]}", tensor_file(header | {"points": header["points"] | {"shape": shape}}, data)
    for dtype in ("f32", "float32", "F64", "BF16", "I8", "F32 ", "", None, 4, "U8", "BOOL", "F8_E4M3"):
        yield f"dtype {dtype}", tensor_file(header | {"points": header["points"] | {"dtype": dtype}}, data)
    offsets: list[Any] = [[0, 0], [-8, 0], [0, 2**50], [96, 0], [0.0, 8.0], [0], [0, 8, 16], "08", [0, 10**400]]
    for offset in offsets:
        at = header["points"] | {"data_offsets": offset}
        yield f"offsets {str(offset)[:30]}", tensor_file(header | {"points": at}, data)
    for key, value in product(
        ("call_id", "batch", "points", "longest_answer", "support", "kind", "protocol"), range(4)
    ):
        odd = ("a\r\nX: 1", "../" * 20, "9" * 5000, "\0")[value]
        meta = header["__metadata__"] | {key: odd}
        yield f"{key} {odd[:8]!r}", tensor_file(header | {"__metadata__": meta}, data)
    for count in (0, -1, 65, 10**9):
        meta = header["__metadata__"] | {"points": str(count)}
        yield f"{count} points", tensor_file(header | {"__metadata__": meta}, data)
    for value in (None, [], {"a": 1}, "x"):
        yield f"metadata {value!r}", tensor_file(header | {"__metadata__": value}, data)
    yield "another tensor", tensor_file(header | {"more": header["points"]}, data)
    yield "bytes behind", SCORE + b"x"
    yield "cut", SCORE[:-1]
    yield from canaries.payloads(CANARY).items()
    for points in (np.full((2, 3, 4), np.nan), np.full((2, 3, 4), np.inf), np.ones((2, 4, 4)), np.ones((2, 3, 5))):
        asked = wire.request_for(info, DIGEST, points.astype(np.float32), "candidates", None)
        yield f"points {points.shape} {points[0, 0, 0]}", wire.encode_request(asked)
    unknown = replace(ASKED, batch="0" * 64, model="0" * 64)
    yield "another model", wire.encode_request(unknown)


def texts() -> Iterator[tuple[str, bytes]]:
    """Texts that are none."""

    def written(text: bytes) -> bytes:
        return wire._write("batch", {}, {"texts": np.frombuffer(text, "u1")})

    whole = json.loads(wire._read(TEXTS, "batch", {"texts": ("U8", 1)})[1]["texts"].tobytes())
    form = whole[0][0]
    yield "33 texts", written(json.dumps([[form] * 33, []]).encode())
    yield "no texts", written(b"[[],[]]")
    for text in (b"[" * 10**5, b"9" * 10**5, b"[NaN,[]]", b"[1e999,[]]", b"{}", b"\xff\xfe", b"", b"null", b'["",""]'):
        yield f"{text[:8]!r}", written(text)
    for place, odd in product(range(6), (None, -2, 10**30, 1.5, "x", [], {}, [[]], True)):
        broken = [*form[:place], odd, *form[place + 1 :]]
        yield f"form {place} {odd!r}", written(json.dumps([[broken], []]).encode())
    yield "a digest of others", TEXTS
