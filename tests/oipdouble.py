"""A server of the Open Inference Protocol for tests: strict, with a parser of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx2
import numpy as np
from servers import answering

from bbprompt.backends.oip_grpc import MESSAGES
from bbprompt.oracle import Oracle
from bbprompt.serve.oip import Responder
from bbprompt.serve.settings import ServeSettings

MODEL = "oracle"
TYPES = {"UINT8": "u1", "FP32": "<f4", "INT64": "<i8"}
INPUTS = {"request": ("UINT8", 1), "points": ("FP32", 3), "texts": ("UINT8", 1)}
OUTPUTS = {"reply": ("UINT8", 1), "logits": ("FP32", 3), "normalizer": ("FP32", 3), "best": ("INT64", 3)}


class Wrong(Exception):
    """A request that is not as the protocol says."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)


def signature(part: Mapping[str, tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"name": name, "datatype": kind, "shape": [-1] * rank} for name, (kind, rank) in part.items()]


class Double:
    """One model on one oracle.

    Args:
        oracle: What answers.
        binary: Whether the binary tensor extension is spoken; else a body with it gets 422, as at MLServer.
        change: Changes the outputs before they are sent.
        token: What a gateway in front of it wants; None for nothing.
        settings: Limits of the model.
    """

    def __init__(
        self,
        oracle: Oracle,
        *,
        binary: bool = True,
        change: Callable[[dict[str, Any]], dict[str, Any]] = lambda tensors: tensors,
        token: str | None = None,
        **settings: Any,
    ) -> None:
        self.responder = Responder(oracle, ServeSettings(**settings))
        self.binary, self.change = binary, change
        self.pass_ = None if token is None else f"Bearer {token}"
        self.asked: list[dict[str, Any]] = []

    def http(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        if self.pass_ not in (None, headers.get("authorization")):
            return 401, {}, b'{"error": "no"}'
        place, _, verb = path.removeprefix("/v2/models/").partition("/")
        if not path.startswith("/v2/models/") or place != MODEL or verb not in ("", "infer"):
            return 404, {}, b'{"error": "Model not found"}'
        if verb == "":
            need(method == "GET", "metadata are got")
            said = {"name": MODEL, "platform": "test", "inputs": signature(INPUTS), "outputs": signature(OUTPUTS)}
            return 200, {"content-type": "application/json"}, json.dumps(said).encode()
        length = headers.get("inference-header-content-length")
        if length is not None and not self.binary:
            return 422, {}, b'{"error": "no JSON"}'
        try:
            need(method == "POST", "inference is posted")
            asked, tensors = self.read(body, length, headers.get("content-type", ""))
        except Wrong as error:
            return 400, {}, json.dumps({"error": str(error)}).encode()
        self.asked.append({name: array.copy() for name, array in tensors.items()})
        reply = self.change(self.responder.answer(tensors))
        return self.write(asked, reply)

    def read(self, body: bytes, length: str | None, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
        need(kind == ("application/json" if length is None else "application/octet-stream"), f"content-type {kind}")
        end = len(body) if length is None else int(length)
        need(end <= len(body), "header longer than the body")
        asked = json.loads(body[:end])
        need(set(asked) <= {"id", "parameters", "inputs", "outputs"}, "unknown key")
        need(isinstance(asked["id"], str), "id")
        tensors = {}
        for entry in asked["inputs"]:
            need(set(entry) <= {"name", "shape", "datatype", "parameters", "data"}, "unknown key of an input")
            name, shape = entry["name"], entry["shape"]
            need(name in INPUTS and name not in tensors, f"input {name}")
            need((entry["datatype"], len(shape)) == INPUTS[name], f"type or rank of {name}")
            need(all(type(size) is int and size > 0 for size in shape), f"shape of {name}")
            dtype = np.dtype(TYPES[entry["datatype"]])
            if length is not None:
                size = entry["parameters"]["binary_data_size"]
                need("data" not in entry and size == np.prod(shape) * dtype.itemsize, f"size of {name}")
                need(end + size <= len(body), f"{name} is cut")
                array = np.frombuffer(body[end : end + size], dtype)
                end += size
            else:
                need("parameters" not in entry and len(entry["data"]) == np.prod(shape), f"numbers of {name}")
                array = np.array(entry["data"], dtype)
            tensors[name] = array.reshape(shape)
        need(end == len(body), "bytes behind the last input")
        return asked, tensors

    def write(self, asked: dict[str, Any], reply: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        raw = bool(asked.get("parameters", {}).get("binary_data_output", False))
        outputs, tail = [], b""
        for name, array in reply.items():
            entry: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name][0], "shape": list(array.shape)}
            if raw:
                entry["parameters"] = {"binary_data_size": array.nbytes}
                tail += array.tobytes()
            else:
                entry["data"] = array.tolist()
            outputs.append(entry)
        head = json.dumps({"model_name": MODEL, "model_version": "1", "id": asked["id"], "outputs": outputs}).encode()
        headers = {"inference-header-content-length": str(len(head))} if raw else {}
        return 200, headers, head + tail

    def transport(self) -> httpx2.MockTransport:
        """The same without a network."""

        def handle(request: httpx2.Request) -> httpx2.Response:
            status, headers, body = self.http(request.method, request.url.path, request.headers, request.read())
            return httpx2.Response(status, headers=headers, content=body)

        return httpx2.MockTransport(handle)


@contextlib.contextmanager
def over_http(double: Double) -> Iterator[str]:
    """URL of a server in a thread."""
    with answering(double.http) as place:
        yield f"kserve://{place}/{MODEL}"


@contextlib.contextmanager
def over_grpc(
    double: Double,
    *,
    raw: bool = True,
    script: Callable[[], Any] = lambda: None,
    key: tuple[bytes, bytes] | None = None,
) -> Iterator[str]:
    """URL of a gRPC server in a thread; `script` may give a status that a request is aborted with.

    With `key`, a private key and its certificate, it answers over TLS alone.
    """

    def let_in(context: grpc.ServicerContext) -> None:
        if double.pass_ not in (None, dict(context.invocation_metadata()).get("authorization")):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")

    def metadata(request: Any, context: grpc.ServicerContext) -> Any:
        let_in(context)
        if request.name != MODEL:
            context.abort(grpc.StatusCode.NOT_FOUND, "Request for unknown model")
        said = MESSAGES["ModelMetadataResponse"](name=MODEL, platform="test")
        for part, types in ((said.inputs, INPUTS), (said.outputs, OUTPUTS)):
            for entry in signature(types):
                part.add(**entry)
        return said

    def infer(request: Any, context: grpc.ServicerContext) -> Any:
        let_in(context)
        status = script()
        if status is not None:
            context.abort(status, "as the test wants it")
        if len(request.raw_input_contents) != len(request.inputs):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "raw contents")
        tensors = {}
        for entry, content in zip(request.inputs, request.raw_input_contents, strict=True):
            if (entry.datatype, len(entry.shape)) != INPUTS[entry.name]:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, entry.name)
            tensors[entry.name] = np.frombuffer(content, TYPES[entry.datatype]).reshape(tuple(entry.shape))
        double.asked.append(tensors)
        reply = MESSAGES["ModelInferResponse"](model_name=MODEL, id=request.id)
        for name, array in double.change(double.responder.answer(tensors)).items():
            output = reply.outputs.add(name=name, datatype=OUTPUTS[name][0], shape=array.shape)
            if raw:
                reply.raw_output_contents.append(array.tobytes())
                continue
            kind = {"UINT8": "uint", "FP32": "fp32", "INT64": "int64"}[OUTPUTS[name][0]]
            getattr(output.contents, f"{kind}_contents").extend(array.ravel().tolist())
        return reply

    def handler(method: Callable[..., Any], name: str) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            method, MESSAGES[f"{name}Request"].FromString, MESSAGES[f"{name}Response"].SerializeToString
        )

    methods = {"ModelMetadata": handler(metadata, "ModelMetadata"), "ModelInfer": handler(infer, "ModelInfer")}
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods),)
        )
        if key is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([key]))
        server.start()
        try:
            yield f"kserve+grpc{'' if key is None else 's'}://127.0.0.1:{port}/{MODEL}"
        finally:
            server.stop(0).wait(30)
