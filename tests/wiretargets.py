"""What comes over the wire: messages of our own protocol, of the Open Inference Protocol and of vLLM, as fuzz targets.

A target reads through the client as it stands, on a transport that gives it the fuzzed bytes for an answer. Imported
by `fuzztargets.targets` only, so that a fuzzer can instrument the package first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
import oipdouble
import tiny_prompt
import torch
from fuzztargets import Target
from safetensors import SafetensorError
from safetensors.numpy import save

from bbprompt import wire
from bbprompt.backends.calls import Answer, Policy
from bbprompt.backends.completions import Completions
from bbprompt.backends.http import HttpOracle
from bbprompt.backends.oip import OipOracle
from bbprompt.backends.oip_grpc import MESSAGES, _parse, read_outputs
from bbprompt.errors import DataError, OracleError
from bbprompt.oip import ask_description, ask_scores, read_question, read_reply, reply_scores
from bbprompt.scoring import labelled
from bbprompt.tasks.task import Task
from bbprompt.tensorfile import unpack
from bbprompt.testing import ToyOracle

__all__ = ["targets"]

LENGTH = "inference-header-content-length"
REFUSALS = (400, 401, 404, 409, 413, 422, 500)
TASKS = {"pair": tiny_prompt.PAIR, "choice": tiny_prompt.CHOICE, "extract": tiny_prompt.EXTRACT}
RECORDS = {
    "pair": tiny_prompt.pair_records,
    "choice": tiny_prompt.choice_records,
    "extract": tiny_prompt.extract_records,
}


@dataclass
class Wire:
    """A transport to a sound server, which remembers its last answer, or gives some bytes in the place of one."""

    sound: Callable[[httpx2.Request], httpx2.Response]
    body: bytes | None = None
    counted: bool = False
    last: httpx2.Response | None = field(default=None, init=False)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if self.body is None:
            self.last = self.sound(request)
            return self.last
        if not self.counted:
            return httpx2.Response(200, content=self.body)
        # As in a safetensors file, the first eight bytes count those of the JSON; `fuzztargets` knows to mend them.
        return httpx2.Response(
            200, content=self.body[8:], headers={LENGTH: str(int.from_bytes(self.body[:8], "little"))}
        )

    def seed(self) -> bytes:
        """The last sound answer, in the form that `body` takes."""
        assert self.last is not None
        content = bytes(self.last.content)
        if not self.counted:
            return content
        return int(self.last.headers[LENGTH]).to_bytes(8, "little") + content


#: Malformed answers are asked for once more, at once, and for ever.
POLICY = Policy(sleep=lambda seconds: None, clock=lambda: 0.0, quota=2**60)
POINTS = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)


def targets() -> dict[str, Target]:
    """All of them by name."""
    kserve = _kserve("bytes", binary=True) | _kserve("JSON", binary=False) | _grpc()
    return _messages() | _http() | kserve | _vllm()


def _messages() -> dict[str, Target]:
    """What the server reads."""
    info = ToyOracle().info
    batches = tuple(_batch(name) for name in TASKS)
    asked = wire.request_for(info, batches[0].digest(), POINTS, "candidates", None)
    same = wire.request_for(info, batches[2].digest(), np.repeat(POINTS[:1], 3, axis=0), "vocabulary", 8)

    def texts(data: bytes) -> object:
        batch = wire.decode_batch(data, most=8)
        assert wire.decode_batch(wire.encode_batch(batch), most=8) == batch
        return batch.digest()

    def question(data: bytes) -> object:
        try:
            tensors = unpack(data)
        except (SafetensorError, ValueError):  # the server's own affair, for there is no such file on the wire
            raise wire.WireError("no tensors") from None
        return read_question(tensors, info, 4)

    return {
        "wire request": Target(
            (wire.encode_request(asked), wire.encode_request(same)),
            lambda data: wire.decode_request(data, layers=info.layers, dim=info.dim, most=4),
            (wire.WireError,),
        ),
        "wire batch": Target(tuple(map(wire.encode_batch, batches)), texts, (wire.WireError,)),
        "KServe request": Target(
            tuple(bytes(save(dict(tensors))) for tensors in (ask_description(), ask_scores(asked, batches[0]))),
            question,
            (wire.WireError,),
        ),
    }


def _http() -> dict[str, Target]:
    """What the client of `bbprompt serve` reads."""
    toy, batch = ToyOracle(), _batch("pair")

    def sound(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/v1/info":
            limits = {"points": 4, "texts": 8, "body": 10**6}
            model = {name: getattr(toy.info, name) for name in toy.info.__slots__}
            return httpx2.Response(200, json={"protocol": wire.PROTOCOL, "model": model, "limits": limits})
        if request.method == "PUT":
            return httpx2.Response(201)
        asked = wire.decode_request(request.read(), layers=toy.info.layers, dim=toy.info.dim, most=4)
        scores = toy.score(batch, asked.points, asked.support, asked.longest_answer)
        return httpx2.Response(200, content=wire.encode_reply(asked.call_id, scores))

    server = Wire(sound)

    def opened() -> HttpOracle:
        return HttpOracle("http://site", policy=POLICY, transport=httpx2.MockTransport(server))

    oracle = opened()
    described = server.seed()
    digest = batch.digest()

    def piece() -> object:
        return oracle._piece(batch, digest, POINTS, "candidates", None)

    piece()
    refusal = json.dumps({"error": "batch", "message": "these texts are not kept", "protocol": 1}).encode()
    return {
        "wire reply": _reading(server, piece),
        "server info": Target((described,), _with(server, lambda: opened().close()), (OracleError,)),
        "server refusal": Target(
            (refusal, b"<html>Bad gateway</html>"),
            lambda data: _refused(lambda status: oracle._expect(Answer(status, "", data), 200)),
            (),
        ),
    }


def _kserve(form: str, *, binary: bool) -> dict[str, Target]:
    """What the client of the Open Inference Protocol reads over HTTP, with tensors as bytes or as JSON."""
    batch, url = _batch("pair"), f"kserve://site:1/{oipdouble.MODEL}"
    server = Wire(oipdouble.Double(ToyOracle(), binary=binary, points=4).transport().handle_request, counted=binary)
    oracle = OipOracle(url, policy=POLICY, transport=httpx2.MockTransport(server))
    transport: Any = oracle._transport

    def describe() -> object:
        return transport.infer("describe", ask_description(), oracle._describe, numbers=65536)

    def piece() -> object:
        return oracle._piece(batch, batch.digest(), POINTS, "candidates", None)

    found = {}
    for name, ask in (("description", describe), ("reply", piece)):
        ask()
        found[f"KServe {name}, {form}"] = _reading(server, ask)
    return found


def _grpc() -> dict[str, Target]:
    """The same over gRPC, raw and typed."""
    reply, typed = (MESSAGES["ModelInferResponse"](model_name="m", id="i") for _ in range(2))
    for name, array in reply_scores("0" * 64, ToyOracle().score(_batch("pair"), POINTS)).items():
        for said in (reply, typed):
            said.outputs.add(name=name, datatype=oipdouble.OUTPUTS[name][0], shape=array.shape)
        reply.raw_output_contents.append(array.tobytes())
        kind = {"u": "uint", "f": "fp32", "i": "int64"}[array.dtype.kind]
        getattr(typed.outputs[-1].contents, f"{kind}_contents").extend(array.ravel().tolist())
    read = Target(
        (reply.SerializeToString(), typed.SerializeToString()),
        lambda data: read_reply(read_outputs(_parse("ModelInferResponse", data), "i", "m")),
        (wire.WireError,),
    )
    return {"KServe reply, gRPC": read}


def _vllm() -> dict[str, Target]:
    """What the client of a vLLM server reads."""
    choices = [
        {"index": index, "text": "x", "logprobs": {"top_logprobs": [{"token_id:0": -0.5, "token_id:1": -1.25}]}}
        for index in (1, 0)
    ]
    answers = {
        "/version": {"version": "0.32.0"},
        "/v1/models": {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 128}]},
    }

    def sound(request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":
            return httpx2.Response(200, json=answers[request.url.path])
        asked = json.loads(request.read())
        if "prompt" in asked:
            return httpx2.Response(200, json={"choices": choices[1:], "usage": {"prompt_tokens": 1}})
        if isinstance(asked["prompt_embeds"], str):
            return httpx2.Response(400, json={"error": {"message": "hidden_size 1 does not match"}})
        return httpx2.Response(200, json={"choices": choices, "usage": {"prompt_tokens": 5}})

    server = Wire(sound)
    client = Completions("vllm+http://site:1", policy=POLICY, transport=httpx2.MockTransport(server))

    def score() -> object:
        return client.score([torch.zeros(2, 4), torch.zeros(3, 4)], [0, 1])

    score()
    completion = server.seed()
    models = json.dumps(answers["/v1/models"]).encode()

    def listed(data: bytes) -> object:
        return client._chosen(client._models(Answer(200, "", data)), "")

    refusal = json.dumps({"error": {"message": "too long", "type": "BadRequestError", "code": 400}}).encode()
    return {
        "vLLM completion": Target((completion,), _with(server, score), (OracleError,)),
        "vLLM version": Target(
            (b'{"version":"0.32.0"}',), lambda data: client._version(Answer(200, "", data)), (OracleError,)
        ),
        "vLLM models": Target((models,), listed, (OracleError,)),
        "vLLM refusal": Target(
            (refusal, b'{"error":"Unauthorized"}'),
            lambda data: _refused(lambda status: client._expect(Answer(status, "", data))),
            (),
        ),
    }


def _batch(name: str) -> Any:
    task = Task.model_validate(TASKS[name])
    return labelled(task, [task.example(record) for record in RECORDS[name](3, 1)], for_loss=True).batch


def _reading(server: Wire, ask: Callable[[], object]) -> Target:
    """What a client asks, with the last sound answer for a seed."""
    return Target((server.seed(),), _with(server, ask), (OracleError, DataError))


def _with(server: Wire, ask: Callable[[], object]) -> Callable[[bytes], object]:
    """Ask while the server gives some bytes for an answer."""

    def read(data: bytes) -> object:
        server.body = data
        try:
            return ask()
        finally:
            server.body = None

    return read


def _refused(expect: Callable[[int], None]) -> None:
    """Every status of a refusal becomes an error of one line."""
    for status in REFUSALS:
        try:
            expect(status)
        except (OracleError, DataError) as error:
            assert len(str(error).splitlines()) <= 1, f"{status}: {error}"  # noqa: PT017
        else:
            raise AssertionError(f"status {status} was taken for an answer")
