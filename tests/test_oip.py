"""The oracle of the Open Inference Protocol against a strict double, and against servers that misbehave."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
from clients import BATCH, EAGER, POINTS, close_all, kept, same
from oipdouble import MODEL, Double, over_grpc, over_http
from servers import serving
from tiny_prompt import batch_of

from bbprompt.backends.http import HttpOracle
from bbprompt.backends.oip import OipOracle
from bbprompt.connect import open_oracle
from bbprompt.errors import DataError, OracleError, UsageError
from bbprompt.oip import read_reply
from bbprompt.oracle import Oracle, OracleInfo, Scores, TextBatch
from bbprompt.testing import OracleContract, ToyOracle


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    close_all()


def connect(url: str, *more: Any, **settings: Any) -> OipOracle:
    """An oracle that is closed when the test ends."""
    return kept(OipOracle(url, *more, **({"policy": EAGER} | settings)))


def offline(double: Double, handle: Callable[[httpx2.Request], Any] | None = None) -> OipOracle:
    """An oracle without a network; `handle` may answer instead of the double."""
    good = double.transport()

    def answer(request: httpx2.Request) -> httpx2.Response:
        said = handle(request) if handle is not None else None
        return said if said is not None else good.handle_request(request)

    return connect(f"kserve://test:80/{MODEL}", transport=httpx2.MockTransport(answer))


class TestHttpBinary(OracleContract):
    """Over a socket, two candidates a request, three requests at once, nothing from memory, one batch kept."""

    url: str

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls) -> Iterator[None]:
        with over_http(Double(ToyOracle(max_tokens=64), points=2, replies=0, batches=1)) as url:
            cls.url = url
            yield

    def make(self) -> Oracle:
        return connect(self.url, workers=3)


class TestHttpJson(OracleContract):
    """A server without the binary extension."""

    def make(self) -> Oracle:
        return offline(Double(ToyOracle(max_tokens=64), binary=False))


class TestGrpc(OracleContract):
    """Raw contents."""

    raw = True
    url: str

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls) -> Iterator[None]:
        with over_grpc(Double(ToyOracle(max_tokens=64), replies=0), raw=cls.raw) as url:
            cls.url = url
            yield

    def make(self) -> Oracle:
        return connect(self.url)


class TestGrpcTyped(TestGrpc):
    """Typed contents in the replies."""

    raw = False


class OneChannel(ToyOracle):
    """As a model whose readout gives one logit an option."""

    @property
    def info(self) -> OracleInfo:
        return replace(super().info, readout="prototype")

    def score(self, batch: TextBatch, points: Any, support: Any = "candidates", longest_answer: Any = None) -> Scores:
        full = super().score(batch, points, support, longest_answer)
        return Scores(full.logits[..., :1], full.normalizer[..., :1], None, full.cut)


def test_every_encoding_carries_the_same_numbers() -> None:
    want = ToyOracle().score(BATCH, POINTS)
    for binary in (True, False):
        assert same(offline(Double(ToyOracle(), binary=binary)).score(BATCH, POINTS), want)
    with over_grpc(Double(ToyOracle())) as url:
        assert same(connect(url).score(BATCH, POINTS), want)
    assert offline(Double(OneChannel())).score(BATCH, POINTS).logits.shape[-1] == 1


def test_one_channel_over_our_own_server() -> None:
    with serving(OneChannel()) as url:
        oracle = HttpOracle(url, policy=EAGER)
        assert oracle.score(BATCH, POINTS).logits.shape[-1] == 1
        assert httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200
        oracle.close()


def test_texts_travel_once_and_again_when_they_are_gone() -> None:
    double = Double(ToyOracle(), batches=1, replies=0)
    oracle = offline(double)
    other = batch_of("choice", 2)
    for batch in (BATCH, BATCH, other, BATCH):
        assert same(oracle.score(batch, POINTS), ToyOracle().score(batch, POINTS))
    assert ["texts" in tensors for tensors in double.asked[1:]] == [True, False, True, False, True]


def test_a_repeated_request_is_not_computed_again() -> None:
    toy = ToyOracle()
    seen: list[int] = []

    class Counting(ToyOracle):
        def score(self, *arguments: Any, **more: Any) -> Scores:
            seen.append(1)
            return toy.score(*arguments, **more)

    oracle = offline(Double(Counting()))
    assert same(oracle.score(BATCH, POINTS), oracle.score(BATCH, POINTS))
    assert len(seen) == 1


def of_infer(number: int, said: Callable[[], Any]) -> Callable[[httpx2.Request], Any]:
    """Answers the inference of this number (0 is the description) with `said`."""
    turns = itertools.count()
    return lambda request: said() if request.url.path.endswith("/infer") and next(turns) == number else None


def broken(error: type[httpx2.TransportError]) -> Callable[[], Any]:
    def fail() -> Any:
        raise error("broken")

    return fail


TRANSIENT: dict[str, Callable[[], Any]] = {
    **{str(code): (lambda code=code: httpx2.Response(code, text="no")) for code in (429, 500, 502, 503, 504)},
    "refused": broken(httpx2.ConnectError),
    "late": broken(httpx2.ReadTimeout),
    "html": lambda: httpx2.Response(200, html="<html>log in</html>"),
    "empty": lambda: httpx2.Response(200),
    "list": lambda: httpx2.Response(200, json=[]),
    "no outputs": lambda: httpx2.Response(200, json={"model_name": MODEL, "id": "x"}),
    "odd length": lambda: httpx2.Response(200, headers={"inference-header-content-length": "-3"}, json={}),
    "long length": lambda: httpx2.Response(200, headers={"inference-header-content-length": "999"}, json={}),
}


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_passes_is_tried_again(fault: str, at: int) -> None:
    oracle = offline(Double(ToyOracle()), of_infer(at, TRANSIENT[fault]))
    for turn in range(3):
        points = POINTS + np.float32(turn)
        assert same(oracle.score(BATCH, points), ToyOracle().score(BATCH, points))


FINAL = {
    "400": (lambda: httpx2.Response(400, text="no"), "status 400"),
    "401": (lambda: httpx2.Response(401), "BBPROMPT_TOKEN"),
    "403": (lambda: httpx2.Response(403), "BBPROMPT_TOKEN"),
    "404": (lambda: httpx2.Response(404, text="gone"), "no model 'oracle' there"),
    "unknown": (lambda: httpx2.Response(400, text="Request for unknown model: 'oracle'"), "no model 'oracle'"),
    "301": (lambda: httpx2.Response(301, headers={"location": "http://elsewhere/"}), "redirect"),
    "endless": (lambda: httpx2.Response(200, content=b"\0" * 10**6), "longer than"),
}


@pytest.mark.parametrize("case", FINAL)
def test_what_does_not_pass_is_said_at_once(case: str) -> None:
    answer, said = FINAL[case]
    oracle = offline(Double(ToyOracle()), of_infer(1, answer))
    with pytest.raises(OracleError, match=said) as raised:
        oracle.score(BATCH, POINTS)
    assert raised.value.exit_code == 69
    assert same(oracle.score(BATCH, POINTS), ToyOracle().score(BATCH, POINTS))


def spoiled(value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        if "logits" in tensors:
            tensors["logits"] = tensors["logits"].copy()
            tensors["logits"][-1, 0, 0] = value
        return tensors

    return change


def other_reply(**keys: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        if "logits" in tensors:
            said = {**read_reply(tensors)[0], **keys}
            tensors["reply"] = np.frombuffer(json.dumps(said).encode(), np.uint8)
        return tensors

    return change


CHANGED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "nan": (spoiled(float("nan")), "NaN"),
    "infinity": (spoiled(float("inf")), "infinity"),
    "fewer candidates": (lambda t: t | ({"logits": t["logits"][:-1]} if "logits" in t else {}), "shape"),
    "no logits": (lambda t: {name: array for name, array in t.items() if name != "logits"}, "shape"),
    "no normalizer": (lambda t: {name: array for name, array in t.items() if name != "normalizer"}, "missing"),
    "flat": (lambda t: t | ({"logits": t["logits"].ravel()} if "logits" in t else {}), "logits is"),
    "another's": (other_reply(call_id="f" * 64), "another request"),
    "odd cut": (other_reply(cut=-1), "cut"),
    "no JSON": (lambda t: t | ({"reply": np.zeros(3, np.uint8)} if "logits" in t else {}), "no JSON"),
}


@pytest.mark.parametrize("wire", ["binary", "json", "grpc"])
@pytest.mark.parametrize("case", CHANGED)
def test_replies_are_checked(case: str, wire: str) -> None:
    change, said = CHANGED[case]
    double = Double(ToyOracle(), binary=wire != "json", change=change)
    if wire == "json" and case in ("nan", "infinity"):
        said = "number"
    if wire != "grpc":
        with pytest.raises(OracleError, match=said):
            offline(double).score(BATCH, POINTS)
        return
    with over_grpc(double) as url, pytest.raises(OracleError, match=said):
        connect(url).score(BATCH, POINTS)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "id": lambda value: value.update(id="other"),
    "model": lambda value: value.update(model_name="other"),
    "twice": lambda value: value["outputs"].append(value["outputs"][0]),
    "type": lambda value: value["outputs"][1].update(datatype="FP64"),
    "shape": lambda value: value["outputs"][1].update(shape=[1, 1, 1]),
    "negative": lambda value: value["outputs"][1].update(shape=[-1, -1, 2]),
    "text": lambda value: value["outputs"][1].update(shape="big"),
    "short": lambda value: value["outputs"].pop(),
    "size": lambda value: value["outputs"][-1]["parameters"].update(binary_data_size=4),
    "unnamed": lambda value: value["outputs"][0].pop("name"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_what_is_around_the_tensors_is_checked(case: str) -> None:
    double = Double(ToyOracle())
    good = double.transport()

    def answer(request: httpx2.Request) -> httpx2.Response | None:
        said = good.handle_request(request)
        if len(double.asked) < 2:
            return said
        split = int(said.headers["inference-header-content-length"])
        value = json.loads(said.content[:split])
        HEADERS[case](value)
        head = json.dumps(value).encode()
        headers = {"inference-header-content-length": str(len(head))}
        return httpx2.Response(200, headers=headers, content=head + said.content[split:])

    with pytest.raises(OracleError, match="malformed"):
        offline(double, answer).score(BATCH, POINTS)


def test_refusals_of_the_model() -> None:
    oracle = offline(Double(ToyOracle(max_tokens=20)))
    with pytest.raises(DataError):
        oracle.score(batch_of("pair", 1), POINTS[:, :, :])
    double = Double(ToyOracle())
    oracle = offline(double)
    double.responder = Double(ToyOracle(seed=1)).responder
    with pytest.raises(OracleError, match="another model or other prompts"):
        oracle.score(BATCH, POINTS)
    double.responder = Double(ToyOracle(), points=2).responder
    with pytest.raises(OracleError, match="n from 1 to 2"):
        oracle.score(BATCH, POINTS)
    with pytest.raises(OracleError, match="3 texts, the model takes 2"):
        offline(Double(ToyOracle(), texts=2)).score(BATCH, POINTS)


def test_numbers_that_change_on_the_way_are_noticed() -> None:
    double = Double(ToyOracle())
    read = double.read

    def reading(*arguments: Any) -> Any:
        asked, tensors = read(*arguments)
        if "points" in tensors:
            tensors["points"] = tensors["points"] + np.float32(1e-3)
        return asked, tensors

    double.read = reading  # type: ignore[method-assign]
    with pytest.raises(OracleError, match="changed it on the way"):
        offline(double).score(BATCH, POINTS)


def test_nobody_there_and_gone_for_good() -> None:
    for url in ("kserve://127.0.0.1:1/oracle", "kserve+grpc://127.0.0.1:1/oracle"):
        with pytest.raises(OracleError, match=r"tries: 4.*bbprompt resume") as raised:
            connect(url)
        assert raised.value.exit_code == 69
        if "grpc" in url:  # named as the user wrote it
            assert str(raised.value).startswith(f"{url}: ")
    with over_grpc(Double(ToyOracle())) as url:
        oracle = connect(url)
    with pytest.raises(OracleError, match="tries: 4"):
        oracle.score(BATCH, POINTS)


def test_a_model_that_is_none_of_ours() -> None:
    iris = {"name": MODEL, "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}], "outputs": None}
    for said, message in ((iris, "none of `bbprompt export-server`"), ({"inputs": 3}, "malformed")):
        with pytest.raises(OracleError, match=message):
            offline(Double(ToyOracle()), lambda request, said=said: httpx2.Response(200, json=said))

    def newer(tensors: dict[str, Any]) -> dict[str, Any]:
        value = json.loads(tensors["reply"].tobytes()) | {"protocol": 2}
        return tensors | {"reply": np.frombuffer(json.dumps(value).encode(), np.uint8)}

    with pytest.raises(OracleError, match="speaks protocol"):
        offline(Double(ToyOracle(), change=newer))
    with pytest.raises(OracleError, match="no model 'other' there"):
        connect("kserve://test:80/other", transport=Double(ToyOracle()).transport())


@pytest.mark.parametrize(
    "url",
    [
        "kserve://a:80",
        "kserve://a/m",
        "kserve://user:secret@a:80/m",
        "kserve://a:80/m?token=secret",
        "kserve://a:99999/m",
        "kserve+ftp://a:80/m",
        "kserve+grpc://a:80/path/m",
        "kserve://a:80/m m",
    ],
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        connect(url)
    assert "secret" not in str(raised.value)


def test_other_prompts_are_refused_where_runs_begin(tiny_prompts: Any) -> None:
    from bbprompt.prompts import ModularPrompt

    with over_http(Double(ToyOracle())) as url, pytest.raises(OracleError, match="holds other prompts"):
        open_oracle(url, ModularPrompt.load(tiny_prompts), threads=1)
    with pytest.raises(UsageError, match=r"kserve://HOST:PORT/MODEL"):
        open_oracle("kserv://a:80/m", ModularPrompt.load(tiny_prompts))
