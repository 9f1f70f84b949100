"""The HTTP oracle against real servers, and against servers that misbehave in every way."""

from __future__ import annotations

import itertools
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from clients import BATCH, EAGER, POINTS, close_all, failing, same
from httpstage import Stage, connect
from servers import TOKEN, serving, start, stop
from tiny_prompt import batch_of

from bbprompt import prompts, wire
from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.calls import Policy
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.local import LocalOracle
from bbprompt.connect import open_oracle
from bbprompt.errors import DataError, OracleError, UsageError
from bbprompt.oracle import Oracle, Scores
from bbprompt.prompts import ModularPrompt
from bbprompt.testing import FaultyOracle, OracleContract, ToyOracle


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    close_all()


class TestToyServer(OracleContract):
    """A real server; nothing is answered from memory."""

    url: str

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls) -> Iterator[None]:
        with serving(ToyOracle(max_tokens=64), replies=0) as url:
            cls.url = url
            yield

    def make(self) -> Oracle:
        return connect(self.url)


class TestPiecewise(OracleContract):
    """A server that takes two candidates at once, asked by three workers, with room for one batch."""

    url: str

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls) -> Iterator[None]:
        with serving(ToyOracle(max_tokens=64), points=2, batches=1) as url:
            cls.url = url
            yield

    def make(self) -> Oracle:
        return connect(self.url, workers=3)


class TestRealServer(OracleContract):
    """`bbprompt serve` with a torch model, a process of its own, behind a token."""

    url: str
    prompts: Path

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, tiny_prompts: Path) -> Iterator[None]:
        process, url = start(tiny_prompts, env={"BBPROMPT_TOKEN": TOKEN})
        cls.url, cls.prompts = url, tiny_prompts
        yield
        assert stop(process) == 0, "SIGTERM ends it in order"

    def make(self) -> Oracle:
        return connect(self.url, TOKEN)

    @pytest.mark.parametrize("kind", ["pair", "choice", "extract"])
    def test_it_equals_the_local_oracle_bit_for_bit(self, kind: str) -> None:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            prompt = ModularPrompt.load(self.prompts)
            local = LocalOracle(load_backbone(prompt.config.backbone), prompt)
            remote, batch = self.make(), batch_of(kind, 9)
            points = np.random.default_rng(3).normal(size=(20, *prompt.space.shape))
            for which in (points, np.where(np.arange(points.shape[1])[:, None] == 1, points, points[:1])):
                assert same(remote.score(batch, which), local.score(batch, which))
        finally:
            torch.set_num_threads(threads)

    def test_wrong_tokens(self) -> None:
        for token in (None, TOKEN.upper(), TOKEN + "x"):
            with pytest.raises(OracleError, match="BBPROMPT_TOKEN"):
                connect(self.url, token)

    def test_other_prompts(self, tiny_shallow_prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BBPROMPT_TOKEN", TOKEN)
        with pytest.raises(OracleError, match="holds other prompts"):
            open_oracle(self.url, ModularPrompt.load(tiny_shallow_prompts), threads=1)
        own = ModularPrompt.load(self.prompts)
        with pytest.raises(OracleError, match="computes in float32"):
            open_oracle(self.url, own, dtype="bfloat16", threads=1)
        with pytest.raises(UsageError, match="--device"):
            open_oracle(self.url, own, device="cpu")
        open_oracle(self.url, own, threads=1).close()


@pytest.mark.parametrize("known", [False, True])
def test_other_prompts_are_named_where_they_come_with_the_package(
    known: bool, tiny_prompts: Path, tiny_shallow_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_BUNDLED", tmp_path)
    held, wanted = (ModularPrompt.load(folder) for folder in (tiny_prompts, tiny_shallow_prompts))
    if known:
        shutil.copytree(tiny_prompts, tmp_path / "b-deep")
        shutil.copytree(tiny_shallow_prompts, tmp_path / "c-shallow")
        shutil.copytree(tiny_prompts, tmp_path / "a-damaged")
        (tmp_path / "a-damaged" / "model.safetensors").write_bytes(b"junk")
    with (
        serving(open_oracle("local", held, dtype="float32", threads=1)) as url,
        pytest.raises(OracleError) as raised,
    ):
        open_oracle(url, wanted, threads=1)
    names = ("b-deep", "c-shallow") if known else (held.digest[:12], wanted.digest[:12])
    assert f"holds other prompts ({names[0]}) than are wanted here ({names[1]}); start it with these, " in str(
        raised.value
    )
    assert str(raised.value).endswith(f"`bbprompt serve --prompts {names[1] if known else 'DIR'}`")


def test_the_number_of_workers_changes_nothing() -> None:
    with serving(ToyOracle(), points=2, replies=0) as url:
        assert connect(url).most_points == 2
        replies = [connect(url, workers=workers).score(BATCH, POINTS) for workers in (1, 2, 5)]
    assert all(same(reply, replies[0]) for reply in replies)
    assert same(replies[0], ToyOracle().score(BATCH, POINTS))


def test_clients_at_once_get_what_they_would_get_alone() -> None:
    batches = [batch_of(kind, 4) for kind in ("pair", "choice", "single", "pair")]
    alone = [ToyOracle().score(batch, POINTS + n) for n, batch in enumerate(batches)]
    with serving(ToyOracle(), batches=2) as url, ThreadPoolExecutor(4) as threads:
        clients = [connect(url) for _ in batches]
        for _ in range(5):
            works = [
                threads.submit(c.score, b, POINTS + n) for n, (c, b) in enumerate(zip(clients, batches, strict=True))
            ]
            assert all(same(work.result(), reply) for work, reply in zip(works, alone, strict=True))


def test_layers_below_the_one_that_changes_are_computed_once_behind_a_server(
    tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, int]] = []
    layer = Encoder.layer

    def counted(self: Encoder, index: int, states: Any, *more: Any, **named: Any) -> Any:
        computed.append((index, len(states)))
        return layer(self, index, states, *more, **named)

    monkeypatch.setattr(Encoder, "layer", counted)
    prompt = ModularPrompt.load(tiny_prompts)
    local = LocalOracle(load_backbone(prompt.config.backbone), prompt)
    points = np.repeat(np.random.default_rng(0).normal(size=(1, *prompt.space.shape)), 9, axis=0)
    points[:, 2] = np.random.default_rng(1).normal(size=(9, prompt.space.shape[-1]))
    with serving(local) as url:
        remote, batch = connect(url), batch_of("pair", 3)
        remote.score(batch, points)
        first, computed[:] = list(computed), []
        points[:, 2] += 1
        remote.score(batch, points)
    assert [rows for index, rows in first if index < 2] == [1, 1], "of one candidate, for all of them"
    assert {index for index, _ in computed} == {2}, "and kept for the next generation"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*words, *names], check=True, capture_output=True)
    with serving(ToyOracle(), tls=(certificate, key)) as url:
        assert url.startswith("https://")
        trusting = httpx2.HTTPTransport(verify=ssl.create_default_context(cafile=str(certificate)))
        oracle = connect(url, transport=trusting)
        assert same(oracle.score(BATCH, POINTS), ToyOracle().score(BATCH, POINTS))
        with pytest.raises(OracleError, match="SSL_CERT_FILE"):
            connect(url)
        with pytest.raises(OracleError, match="cannot be reached"):
            connect(url.replace("https", "http"), policy=EAGER)
        oracle.close()  # before the server ends, which does not wait for the farewell of TLS
        with monkeypatch.context() as told:  # as the error advises
            told.setenv("SSL_CERT_FILE", str(certificate))
            own = connect(url)
            assert same(own.score(BATCH, POINTS), ToyOracle().score(BATCH, POINTS))
            own.close()
    with serving(ToyOracle()) as url, pytest.raises(OracleError, match="http:// rather than https://"):
        connect(url.replace("http", "https"), policy=EAGER)


def test_a_server_that_fails_at_one_request_goes_on() -> None:
    faulty = FaultyOracle(ToyOracle(), at=2, fault="nan")
    with serving(faulty, replies=0) as url:
        oracle = connect(url, policy=EAGER)
        oracle.score(BATCH, POINTS)
        with pytest.raises(OracleError, match="NaN"):
            oracle.score(BATCH, POINTS)
        assert same(oracle.score(BATCH, POINTS), ToyOracle().score(BATCH, POINTS))


def changed(change: Callable[[str, Scores], tuple[str, Scores]]) -> Callable[[Stage, httpx2.Request], httpx2.Response]:
    return lambda stage, request: httpx2.Response(200, content=wire.encode_reply(*change(*stage.scores(request))))


def spoiled(value: float) -> Any:
    def change(call_id: str, scores: Scores) -> tuple[str, Scores]:
        scores.logits[-1, 0, 0] = value
        return call_id, scores

    return changed(change)


TRANSIENT: dict[str, Any] = {
    **{str(code): httpx2.Response(code, text="no") for code in (408, 425, 429, 500, 502, 503, 504)},
    "refused": failing(httpx2.ConnectError),
    "reset": failing(httpx2.ReadError),
    "cut off": failing(httpx2.RemoteProtocolError),
    "late": failing(httpx2.ReadTimeout),
    "unresolved": failing(httpx2.ConnectTimeout),
}
MALFORMED: dict[str, Any] = {
    "empty": httpx2.Response(200),
    "202": httpx2.Response(202, text="later"),
    "html": httpx2.Response(200, html="<html>log in</html>"),
    "json": httpx2.Response(200, json={"logits": [1.0]}),
    "truncated": lambda stage, request: httpx2.Response(200, content=stage.good(request).content[:-8]),
    "nan": spoiled(float("nan")),
    "infinity": spoiled(float("inf")),
    "fewer candidates": changed(lambda i, s: (i, replace(s, logits=s.logits[:-1]))),
    "fewer spans": changed(lambda i, s: (i, replace(s, logits=s.logits[:, :-1]))),
    "more texts": changed(lambda i, s: (i, replace(s, normalizer=np.repeat(s.normalizer, 2, axis=1)))),
    "transposed": changed(lambda i, s: (i, replace(s, logits=s.logits.transpose(2, 0, 1).copy()))),
    "best unasked": changed(lambda i, s: (i, replace(s, best=np.zeros((5, 3, 2), dtype=np.int64)))),
    "another's": changed(lambda i, s: ("f" * 64, s)),
}
FINAL: dict[str, tuple[Any, str]] = {
    **{str(code): (httpx2.Response(code, text="no"), f"status {code}") for code in (400, 405, 413, 415, 422)},
    "401": (httpx2.Response(401), "BBPROMPT_TOKEN"),
    "403": (httpx2.Response(403), "BBPROMPT_TOKEN"),
    "404": (httpx2.Response(404, text="nginx"), "correct --backend"),
    "409": (httpx2.Response(409, json={"error": "model", "message": "another model"}), "another model"),
    "301": (httpx2.Response(301, headers={"location": "http://elsewhere/"}), "redirect"),
    "gzip": (httpx2.Response(200, headers={"content-encoding": "br"}, content=b"x"), "compressed"),
    "endless": (httpx2.Response(200, content=b"\0" * 10**6), "longer than"),
}


def played(answer: Any, stage: Stage, request: httpx2.Request) -> Any:
    if not callable(answer):
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)
    return answer(request) if answer.__code__.co_argcount == 1 else answer(stage, request)


@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("fault", [*TRANSIENT, *MALFORMED])
def test_what_passes_is_tried_again(fault: str, at: int) -> None:
    stage = Stage()
    answer = {**TRANSIENT, **MALFORMED}[fault]
    stage.script = lambda number, request: played(answer, stage, request) if number == at else None
    oracle = stage.oracle()
    for turn in range(3):
        points = POINTS + np.float32(turn)
        assert same(oracle.score(BATCH, points), ToyOracle().score(BATCH, points))
    assert stage.sent.count("/v1/score") == 3 + (at <= 3)


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_does_not_pass_ends_after_four_tries(fault: str) -> None:
    stage = Stage()
    stage.script = lambda number, request: played(TRANSIENT[fault], stage, request)
    with pytest.raises(OracleError, match=r"tries: 4.*bbprompt resume") as raised:
        stage.oracle().score(BATCH, POINTS)
    assert raised.value.exit_code == 69
    assert "\n" not in str(raised.value)
    assert stage.sent.count("/v1/score") == 4


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_answer_is_asked_for_twice(fault: str) -> None:
    stage = Stage()
    stage.script = lambda number, request: played(MALFORMED[fault], stage, request)
    with pytest.raises(OracleError, match="malformed"):
        stage.oracle().score(BATCH, POINTS)
    assert stage.sent.count("/v1/score") == 2


@pytest.mark.parametrize("fault", FINAL)
def test_what_is_final_is_not_tried_again(fault: str) -> None:
    answer, said = FINAL[fault]
    stage = Stage()
    stage.script = lambda number, request: played(answer, stage, request)
    with pytest.raises(OracleError, match=said):
        stage.oracle().score(BATCH, POINTS)
    assert stage.sent.count("/v1/score") == 1


def test_texts_that_do_not_fit_are_an_error_of_the_data() -> None:
    refusal = httpx2.Response(422, json={"error": "data", "message": "text 2: too long\x1b[31m"})
    with pytest.raises(DataError, match="text 2: too long") as raised:
        Stage(lambda number, request: refusal).oracle().score(BATCH, POINTS)
    assert "\x1b" not in str(raised.value)


def test_forgotten_texts_are_registered_again() -> None:
    gone = httpx2.Response(404, json={"error": "batch", "message": "gone"})
    stage = Stage(lambda number, request: played(gone, stage, request) if number == 2 else None)
    oracle = stage.oracle()
    oracle.score(BATCH, POINTS)
    oracle.score(BATCH, POINTS)
    assert [path.split("/")[2] for path in stage.sent] == ["info", "batches", "score", "score", "batches", "score"]
    stage.script = lambda number, request: played(gone, stage, request)
    with pytest.raises(OracleError, match="forgets"):
        oracle.score(BATCH, POINTS)


@pytest.mark.parametrize(
    ("headers", "pauses"),
    [({"retry-after": "7"}, [7.0]), ({"retry-after": "9999"}, [60.0]), ({"retry-after": "soon"}, None), ({}, None)]
    + [
        ({"retry-after": f"Sat, 01 Jan {year} 00:00:00 GMT"}, [pause])
        for year, pause in (("2000", 0.0), ("2400", 60.0))
    ]
    + [({"retry-after": "Sat, 01 Jan 2400 00:00:00 -0000"}, None)],
)
def test_pauses(headers: dict[str, str], pauses: list[float] | None) -> None:
    slept: list[float] = []
    stage = Stage(lambda number, request: httpx2.Response(429, headers=headers))
    for _ in range(50):
        with pytest.raises(OracleError):
            stage.oracle(Policy(sleep=slept.append)).score(BATCH, POINTS)
    if pauses is not None:
        assert slept == pauses * 150
        return
    for turn, most in enumerate((0.5, 1.0, 2.0)):
        own = slept[turn::3]
        assert 0.0 <= min(own) < 0.3 * most
        assert 0.7 * most < max(own) <= most


def test_no_pause_begins_that_would_end_too_late() -> None:
    slept: list[float] = []
    stage = Stage(lambda number, request: httpx2.Response(503, headers={"retry-after": "50"}))
    with pytest.raises(OracleError, match="tries: 1"):
        stage.oracle(Policy(total=30.0, sleep=slept.append)).score(BATCH, POINTS)
    assert slept == []


def test_pieces_stay_in_order_and_the_first_error_wins() -> None:
    stage = Stage()
    stage.info["limits"]["points"] = 1  # type: ignore[index]
    turns = itertools.count()
    barrier = threading.Barrier(5, timeout=10)

    def together(number: int, request: httpx2.Request) -> Any:
        barrier.wait()
        return None

    stage.script = together
    assert same(stage.oracle(workers=5).score(BATCH, POINTS), ToyOracle().score(BATCH, POINTS))
    stage.script = lambda number, request: httpx2.Response(400, text="no") if next(turns) == 1 else None
    with pytest.raises(OracleError, match="status 400"):
        stage.oracle().score(BATCH, POINTS)
    assert next(turns) < 5, "nothing more is sent after an error"
