"""The Open Inference Protocol over gRPC. Needs the extra `kserve`.

The messages are declared below, by field number, instead of generated: the four that are used, without fields that are
not. They live in a pool of their own, so that a client of another package in the same process is not disturbed.
Source: the protocol's gRPC specification (package `inference`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from bbprompt.backends.calls import Policy, Retries, Transient, plain
from bbprompt.errors import BBPromptError, OracleError
from bbprompt.oip import DTYPES, Tensors
from bbprompt.wire import WireError, fits

__all__ = ["MESSAGES", "GrpcTransport", "read_outputs", "write_request"]

_T = TypeVar("_T")
_SMALL = 262144  # bytes of a reply besides its numbers
_LARGEST = 256 * 2**20  # bytes of any reply
_SERVICE = "/inference.GRPCInferenceService/"

# Message: fields as (name, number, type, repeated).
_TENSOR = [("name", 1, "string", False), ("datatype", 2, "string", False), ("shape", 3, "int64", True)]
_SCHEMA: dict[str, list[tuple[str, int, str, bool]]] = {
    "ModelMetadataRequest": [("name", 1, "string", False), ("version", 2, "string", False)],
    "TensorMetadata": _TENSOR,
    "ModelMetadataResponse": [
        ("name", 1, "string", False),
        ("versions", 2, "string", True),
        ("platform", 3, "string", False),
        ("inputs", 4, "TensorMetadata", True),
        ("outputs", 5, "TensorMetadata", True),
    ],
    "InferTensorContents": [
        ("int64_contents", 3, "int64", True),
        ("uint_contents", 4, "uint32", True),
        ("fp32_contents", 6, "float", True),
    ],
    "InferTensor": [*_TENSOR, ("contents", 5, "InferTensorContents", False)],
    "ModelInferRequest": [
        ("model_name", 1, "string", False),
        ("model_version", 2, "string", False),
        ("id", 3, "string", False),
        ("inputs", 5, "InferTensor", True),
        ("raw_input_contents", 7, "bytes", True),
    ],
    "ModelInferResponse": [
        ("model_name", 1, "string", False),
        ("model_version", 2, "string", False),
        ("id", 3, "string", False),
        ("outputs", 5, "InferTensor", True),
        ("raw_output_contents", 6, "bytes", True),
    ],
}
_TYPED = {"UINT8": "uint_contents", "FP32": "fp32_contents", "INT64": "int64_contents"}
_PASSES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="bbprompt_oip.proto", package="inference", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, members in _SCHEMA.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in members:
            member = declared.field.add(name=name, number=number)
            member.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in _SCHEMA:
                member.type, member.type_name = kinds.TYPE_MESSAGE, f".inference.{kind}"
            else:
                member.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}")) for name in _SCHEMA}


#: Message classes by name.
MESSAGES = _messages()


class GrpcTransport:
    """Requests to one model of a server.

    Args:
        target: HOST:PORT.
        model: Its name there.
        token: Of a gateway in front of it; None for nothing.
        policy: How patient to be.
        tls: Whether to encrypt; the authorities are those of gRPC (`GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`).
    """

    def __init__(self, target: str, model: str, token: str | None, policy: Policy, *, tls: bool = False) -> None:
        # As `--backend` spells it, so that what an error names can be found on the command line.
        self._url, self._model, self._policy = f"kserve+{'grpcs' if tls else 'grpc'}://{target}/{model}", model, policy
        self._retries = Retries(self._url, policy)
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        local = target.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]")
        options = [
            ("grpc.enable_retries", 0),
            ("grpc.max_receive_message_length", _LARGEST),
            ("grpc.max_send_message_length", -1),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.enable_http_proxy", int(not local)),
        ]
        if tls:
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(), options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._calls = {
            name: self._channel.unary_unary(
                _SERVICE + name,
                request_serializer=MESSAGES[f"{name}Request"].SerializeToString,
                response_deserializer=None,  # parsed by us, so that what is no message is told from no answer
            )
            for name in ("ModelMetadata", "ModelInfer")
        }

    def signature(self) -> tuple[dict[str, str], dict[str, str]]:
        """Types of the model's inputs and outputs, by name."""

        def read(body: bytes) -> tuple[dict[str, str], dict[str, str]]:
            said = _parse("ModelMetadataResponse", body)
            return ({t.name: t.datatype for t in said.inputs}, {t.name: t.datatype for t in said.outputs})

        request = MESSAGES["ModelMetadataRequest"](name=self._model)
        return self._retries.run(lambda: self._send("ModelMetadata", request, _SMALL), read)

    def infer(self, name: str, tensors: Tensors, read: Callable[[Tensors], _T], *, numbers: int) -> _T:
        """What `read` makes of the model's outputs; the arguments are those of `HttpTransport.infer`."""
        request, most = write_request(self._model, name, tensors), _SMALL + 16 * numbers
        return self._retries.run(
            lambda: self._send("ModelInfer", request, most),
            lambda body: read(read_outputs(_parse("ModelInferResponse", body), name, self._model)),
        )

    def close(self) -> None:
        """Close the connection; requests that are under way end with an error."""
        self._retries.end()
        self._channel.close()

    def _send(self, method: str, request: Any, most: int) -> bytes:
        deadline = self._policy.deadline
        try:
            body: bytes = self._calls[method](request, timeout=deadline, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._meaning(error) from error
        if len(body) > most:
            raise OracleError(f"{self._url}: the answer is longer than {most} bytes")
        return body

    def _meaning(self, error: Any) -> BBPromptError:
        code, said = error.code(), plain(str(error.details()))
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return OracleError(f"{self._url}: missing or wrong token; set BBPROMPT_TOKEN to that of the server")
        if code is grpc.StatusCode.NOT_FOUND or "unknown model" in said.lower():
            return OracleError(f"{self._url}: no model {plain(self._model)!r} there; correct --backend ({said})")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return OracleError(f"{self._url}: no server of the Open Inference Protocol there; correct --backend")
        if "handshake" in said.lower():  # as a status it is "unavailable", and does not pass
            return OracleError(
                f"{self._url}: no secure connection ({said}); name the certificate of its authority in "
                "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH, or correct --backend"
            )
        if code in _PASSES:
            return Transient(f"{code.name}: {said}", done=code is not grpc.StatusCode.RESOURCE_EXHAUSTED)
        return OracleError(f"{self._url}: refused ({code.name}): {said}")


def write_request(model: str, name: str, tensors: Tensors) -> Any:
    """A ModelInferRequest whose tensors travel as raw bytes."""
    names = {dtype: datatype for datatype, dtype in DTYPES.items()}
    request = MESSAGES["ModelInferRequest"](model_name=model, id=name)
    for key, array in tensors.items():
        datatype = names[array.dtype]
        request.inputs.add(name=key, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(np.ascontiguousarray(array, dtype=DTYPES[datatype]).tobytes())
    return request


def read_outputs(said: Any, name: str, model: str) -> dict[str, NDArray[Any]]:
    """The outputs in a ModelInferResponse, as own arrays, raw or typed.

    Raises:
        WireError: Anything is not as the protocol says, or is about something else.
    """
    if said.id != name or said.model_name != model:
        raise WireError("it belongs to another request or model")
    raw = list(said.raw_output_contents)
    if raw and len(raw) != len(said.outputs):
        raise WireError("it has another number of raw contents than of outputs")
    found: dict[str, NDArray[Any]] = {}
    for number, output in enumerate(said.outputs):
        dtype, shape = DTYPES.get(output.datatype), tuple(output.shape)
        if dtype is None or output.name in found:
            raise WireError("an output of a type that is not expected, or twice")
        if len(shape) > 8 or any(size < 0 for size in shape) or not fits(shape):
            raise WireError("an output's shape is no list of sizes")
        if raw:
            if len(raw[number]) != math.prod(shape) * dtype.itemsize:
                raise WireError(f"{output.name[:20]!r} has another number of bytes than its shape says")
            found[output.name] = np.ndarray(shape, dtype, raw[number]).copy()
            continue
        values = getattr(output.contents, _TYPED[output.datatype])
        if len(values) != math.prod(shape) or (dtype.kind == "u" and any(value > 255 for value in values)):
            raise WireError(f"{output.name[:20]!r} has other numbers than its shape or type say")
        found[output.name] = np.array(values, dtype=dtype).reshape(shape)
    return found


def _parse(kind: str, body: bytes) -> Any:
    try:
        return MESSAGES[kind].FromString(body)
    except DecodeError as error:
        raise WireError(f"it is no {kind}") from error
