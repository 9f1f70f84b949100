"""The server against clients that misbehave: through the application, and over sockets."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from serveclient import AUTH, BATCH, DIGEST, POINTS, TEXTS, TYPE, Client, Counting, request
from servers import TOKEN, serving
from tiny_prompt import batch_of

from bbprompt import wire
from bbprompt.errors import UsageError
from bbprompt.serve.app import routes
from bbprompt.serve.batches import Batches
from bbprompt.serve.metrics import Metrics
from bbprompt.serve.scorer import Scorer
from bbprompt.serve.server import listen
from bbprompt.serve.settings import ServeSettings
from bbprompt.testing import ToyOracle

ROUTES = [
    (method, route.path.replace("{digest}", DIGEST))
    for route in routes(Scorer(ToyOracle(), ServeSettings(), Metrics()), ServeSettings(), Metrics()).routes
    for method in route.methods  # type: ignore[attr-defined]
]


def test_there_are_the_routes_that_are_documented_and_no_others() -> None:
    assert {path for _, path in ROUTES} == {
        "/v1/info",
        f"/v1/batches/{DIGEST}",
        "/v1/score",
        "/healthz",
        "/metrics",
        "/v1/openapi.json",
    }


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/"), ("GET", "/docs"), ("POST", "/nowhere")])
def test_every_route_wants_the_token(method: str, path: str) -> None:
    client = Client(ToyOracle(), token=TOKEN)
    wrong = ["", "Bearer", "Bearer ", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN.upper()}", f"Basic {TOKEN}"]
    for headers in ({}, *({"authorization": value} for value in wrong)):
        refused = client.one(method, path, None, TYPE | headers)
        assert (refused.status_code, refused.json()["error"]) == (401, "token")
    assert client.one(method, f"{path}?token={TOKEN}").status_code == 401
    assert client.one(method, path, None, TYPE | AUTH).status_code != 401
    assert TOKEN not in repr(ServeSettings(token=TOKEN))


def test_a_repeated_request_is_not_computed_again() -> None:
    oracle = Counting()
    client = Client(oracle)
    client.keep()
    first = client.one("POST", "/v1/score", request())
    again = client.one("POST", "/v1/score", request())
    assert first.status_code == 200
    assert again.content == first.content
    assert oracle.calls == 1
    oracle.gate.clear()
    threading.Timer(0.1, oracle.gate.set).start()
    ask = ("POST", "/v1/score", request(POINTS + 1), TYPE)
    answers = client.send(ask, ask, ask)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert oracle.calls == 2
    said = client.one("GET", "/metrics").text
    assert "bbprompt_calls_total 10.0" in said
    assert "bbprompt_repeated_total 3.0" in said
    assert "bbprompt_waiting 0.0" in said
    assert "bbprompt_candidates_count 2.0" in said
    assert "bbprompt_model_seconds_count 2.0" in said
    assert "bbprompt_tokens_cut_total 0.0" in said


def test_an_answer_that_nobody_waited_for_is_there_at_the_next_try() -> None:
    oracle = Counting()
    client = Client(oracle, deadline=0.2)

    async def impatient() -> tuple[int, int]:
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=client.app),  # type: ignore[arg-type]
            base_url="http://test",
        ) as sender:
            await sender.put(f"/v1/batches/{DIGEST}", content=TEXTS, headers=TYPE)
            oracle.gate.clear()
            late = await sender.post("/v1/score", content=request(), headers=TYPE)
            assert late.headers["retry-after"] == "1"
            oracle.gate.set()
            return late.status_code, (await sender.post("/v1/score", content=request(), headers=TYPE)).status_code

    assert asyncio.run(impatient()) == (503, 200)
    assert oracle.calls == 1


def test_a_call_id_is_for_one_request() -> None:
    client = Client(ToyOracle())
    client.keep()
    same = wire.decode_request(request(), layers=3, dim=4, most=9).call_id
    assert client.one("POST", "/v1/score", request()).status_code == 200
    other = client.one("POST", "/v1/score", request(POINTS + 1, call_id=same))
    assert (other.status_code, other.json()["error"]) == (422, "call_id")


def test_replies_are_kept_up_to_a_number_of_bytes() -> None:
    oracle = Counting()
    client = Client(oracle, replies=2500)
    client.keep()
    for turn in (0, 1, 2, 3, 3, 0):
        assert client.one("POST", "/v1/score", request(POINTS + np.float32(turn))).status_code == 200
    assert oracle.calls == 5


def test_failures_are_not_kept_and_do_not_take_the_server_along() -> None:
    oracle = Counting()
    client = Client(oracle)
    client.keep()
    oracle.error = RuntimeError("CUDA error\nsecret")
    failed = client.one("POST", "/v1/score", request())
    assert (failed.status_code, failed.json()["error"]) == (500, "failed")
    assert "secret" not in failed.text
    assert client.one("GET", "/healthz").status_code == 503
    oracle.error = None
    assert client.one("POST", "/v1/score", request()).status_code == 200
    assert client.one("GET", "/healthz").status_code == 200
    assert oracle.calls == 3, "a forward that just worked is proof enough"


def test_texts_are_kept_and_forgotten() -> None:
    client = Client(ToyOracle(), batches=1)
    missing = client.one("POST", "/v1/score", request())
    assert (missing.status_code, missing.json()["error"]) == (404, "batch")
    client.keep()
    assert client.one("PUT", f"/v1/batches/{DIGEST}", TEXTS).status_code == 204
    other = batch_of("pair", 4)
    assert client.one("PUT", f"/v1/batches/{DIGEST[::-1]}", wire.encode_batch(other)).status_code == 422
    assert client.one("PUT", f"/v1/batches/{other.digest()}", wire.encode_batch(other)).status_code == 201
    assert client.one("POST", "/v1/score", request()).status_code == 404


def test_a_lease_ends_unless_it_is_used() -> None:
    now = 0.0
    kept = Batches(2, 10.0, 100, lambda: now)
    kept.put("a", BATCH, 1)
    now = 9.0
    kept.put("b", BATCH, 1)
    assert kept.get("a") is BATCH
    now = 18.0
    assert kept.get("a") is BATCH
    now = 19.0
    assert kept.get("b") is None
    assert len(kept) == 1
    kept.put("c", BATCH, 1)
    kept.put("d", BATCH, 1)
    assert kept.get("a") is None


def test_texts_are_kept_up_to_a_number_of_bytes() -> None:
    kept = Batches(9, 10.0, 100, lambda: 0.0)
    for digest, size in (("a", 40), ("b", 40), ("a", 40), ("c", 60)):
        kept.put(digest, BATCH, size)
    assert [kept.get(digest) is None for digest in "abc"] == [False, True, False]
    kept.put("d", BATCH, 1000)
    assert len(kept) == 1
    kept.put("e", BATCH, 60)
    kept.put("f", BATCH, 40)
    assert len(kept) == 2


def test_what_is_promised_of_times_and_places_is_the_default() -> None:
    settings = ServeSettings()
    assert (settings.receive, settings.deadline, settings.together) == (10.0, 600.0, False)
    assert "token" not in repr(ServeSettings(token="a-secret"))


def test_texts_have_a_limit_of_their_own_before_they_are_read() -> None:
    large = bytes(wire.MOST_BATCH + 1)
    (answer,) = Client(ToyOracle()).send(("PUT", f"/v1/batches/{DIGEST}", large, TYPE))
    assert (answer.status_code, answer.json()["message"]) == (413, "texts of at most 8388608 bytes are taken at once")


NAN = np.where(np.arange(5)[:, None, None] == 2, np.float32("nan"), POINTS)
BAD: dict[str, tuple[tuple[Any, ...], int]] = {
    "another model": (("POST", "/v1/score", request(model="0" * 64)), 409),
    "nan": (("POST", "/v1/score", request(NAN)), 422),
    "many points": (("POST", "/v1/score", request(np.repeat(POINTS, 3, axis=0))), 400),
    "other shape": (("POST", "/v1/score", request(POINTS[:, :2])), 400),
    "pickle": (("POST", "/v1/score", b"\x80\x04\x95\x10"), 400),
    "empty": (("POST", "/v1/score", b""), 400),
    "many texts": (("PUT", "/v1/batches/" + "0" * 64, wire.encode_batch(batch_of("pair", 9))), 400),
    "no texts": (("PUT", "/v1/batches/" + "0" * 64, b"{}"), 400),
    "form type": (("POST", "/v1/score", request(), {"content-type": "text/plain"}), 415),
    "large": (("POST", "/v1/score", b"\0" * 20001), 413),
    "gzip": (("POST", "/v1/score", request(), TYPE | {"content-encoding": "gzip"}), 415),
    "chunked": (("POST", "/v1/score", request(), TYPE | {"transfer-encoding": "chunked"}), 415),
    "body of a get": (("GET", "/v1/info", b"x"), 413),
    "wrong length": (("POST", "/v1/score", b"x", TYPE | {"content-length": "-1"}), 400),
    "wrong method": (("DELETE", f"/v1/batches/{DIGEST}"), 405),
    "nowhere": (("GET", "/v2/info"), 404),
    "traversal": (("PUT", "/v1/batches/..%2f..%2fetc%2fpasswd", TEXTS), 404),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_and_the_next_one_is_fine(case: str) -> None:
    client = Client(ToyOracle(), points=9, texts=8, body=20000)
    client.keep()
    words, status = BAD[case]
    assert client.one(*words).status_code == status
    assert client.one("POST", "/v1/score", request()).status_code == 200


def test_only_so_many_at_once() -> None:
    oracle = Counting()
    client = Client(oracle, at_once=2)
    client.keep()
    oracle.gate.clear()
    threading.Timer(0.2, oracle.gate.set).start()
    answers = client.send(*(("POST", "/v1/score", request(POINTS + np.float32(i)), TYPE) for i in range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503]
    assert client.one("POST", "/v1/score", request()).status_code == 200


def test_only_so_many_wait_for_the_model_even_if_their_clients_gave_them_up() -> None:
    oracle = Counting()
    client = Client(oracle, at_once=2, deadline=0.1)
    client.keep()
    oracle.gate.clear()
    threading.Timer(1.0, oracle.gate.set).start()

    async def impatient() -> list[tuple[int, str]]:
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=client.app),  # type: ignore[arg-type]
            base_url="http://test",
        ) as sender:
            said = []
            for number in range(6):
                answer = await sender.post("/v1/score", content=request(POINTS + np.float32(number)), headers=TYPE)
                assert answer.headers["retry-after"] == "1"
                said.append((answer.status_code, answer.json()["error"]))
            assert "bbprompt_waiting 3.0" in (await sender.get("/metrics")).text
            return said

    # One is at the model, two wait.
    assert asyncio.run(impatient()) == [(503, "deadline")] * 3 + [(503, "busy")] * 3


def test_only_so_many_bytes_at_once() -> None:
    oracle = Counting()
    client = Client(oracle, body=1000)
    client.keep()
    oracle.gate.clear()
    threading.Timer(0.2, oracle.gate.set).start()
    answers = client.send(*(("POST", "/v1/score", request(POINTS + np.float32(i)), TYPE) for i in range(9)))
    size = len(request())
    assert [answer.status_code for answer in answers].count(200) == 4000 // size
    assert client.one("POST", "/v1/score", request()).status_code == 200


def test_an_answer_does_not_wait_for_its_head_to_be_acknowledged() -> None:
    """An answer is a head and a body: without TCP_NODELAY the second waits for the first, 40 ms."""

    async def option(listening: socket.socket) -> int:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            told.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(accepted, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            writer.close()
            return await told

    with listen("127.0.0.1", 0, None) as listening:
        assert asyncio.run(option(listening)) == 1


def test_where_it_listens() -> None:
    with pytest.raises(UsageError, match="BBPROMPT_TOKEN"):
        listen("0.0.0.0", 0, None)
    listen("0.0.0.0", 0, TOKEN).close()
    with listen("127.0.0.1", 0, None) as taken, pytest.raises(UsageError, match="choose another"):
        listen("127.0.0.1", taken.getsockname()[1], None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(ToyOracle(), receive=0.5) as url:
        yield url


def said(url: str, *pieces: bytes, pause: float = 0.0) -> tuple[bytes, float]:
    """What the server answers to raw bytes until it closes, and how long that took."""
    host, port = url.removeprefix("http://").split(":")
    began = time.monotonic()
    got = b""
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        try:
            for piece in pieces:
                raw.sendall(piece)
                time.sleep(pause)
            while more := raw.recv(65536):
                got += more
        except ConnectionError:
            pass
    return got, time.monotonic() - began


POST = b"POST /v1/score HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", b"400"),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"4"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"415"),
        (POST + b"Content-Length: 99999999999999\r\n\r\n", b"413"),
        (POST + b"Content-Length: 1e3\r\n\r\n", b"400"),
        (POST + b"X: " + b"a" * 50000 + b"\r\n\r\n", b"431"),
        (b"\x16\x03\x01\x02\x00\x01", b"400"),
        (b"GET /v1/info\r\n\r\n", b"400"),
    ],
    ids=range(8),
)
def test_raw_bytes(server: str, raw: bytes, status: bytes) -> None:
    got, _ = said(server, raw)
    assert re.match(rb"HTTP/1.1 " + status, got) or got == b""
    assert httpx2.get(f"{server}/v1/info", trust_env=False).status_code == 200


def test_dripping_headers_and_bodies_are_cut_off(server: str) -> None:
    got, seconds = said(server, *(bytes([byte]) for byte in POST), pause=0.05)
    assert got == b""
    assert seconds < 5
    started = POST + b"Content-Type: " + wire.CONTENT_TYPE.encode() + b"\r\nContent-Length: 1000\r\n\r\n"
    got, seconds = said(server, started, *[b"x"] * 20, pause=0.05)
    assert got.startswith(b"HTTP/1.1 408") or got == b""
    assert seconds < 5
    got, seconds = said(server, started, b"x")  # and then silence, so that the answer is read
    assert got.startswith(b"HTTP/1.1 408")
    assert seconds < 5
    assert httpx2.get(f"{server}/v1/info", trust_env=False).status_code == 200


def test_a_silent_connection_is_cut_off(server: str) -> None:
    got, seconds = said(server)
    assert got == b""
    assert seconds < 5


def test_refusals_have_one_form(server: str) -> None:
    refused = httpx2.post(f"{server}/v1/score", content=b"x", headers=TYPE, trust_env=False)
    assert json.loads(refused.content).keys() == {"error", "message", "protocol"}
    assert "server" not in refused.headers
    for method, path, status in (("GET", "/v1", 404), ("PUT", "/v1/batches/a/b", 404), ("DELETE", "/v1/score", 405)):
        refused = httpx2.request(method, f"{server}{path}", trust_env=False)
        assert refused.status_code == status
        assert json.loads(refused.content) == {"error": "route", "message": refused.reason_phrase, "protocol": 1}
    assert refused.headers["allow"] == "POST"
