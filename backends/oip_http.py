"""The Open Inference Protocol over HTTP: JSON around tensors, which follow it as bytes where the server can.

Source: the protocol's REST specification and its binary tensor data extension. With the extension a body is the JSON
and behind it the bytes of each tensor in order, little-endian, row by row; the header `Inference-Header-Content-Length`
says where the JSON ends. Servers without it answer 4xx to such a body; they get numbers in JSON. Their decimals have
as many digits as it takes to be read back to the same float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
import numpy as np
from numpy.typing import NDArray

from bbprompt.backends.calls import Answer, Caller, Policy, plain
from bbprompt.errors import OracleError
from bbprompt.oip import DTYPES, Tensors
from bbprompt.wire import WireError, fits

__all__ = ["HttpTransport", "read_body", "write_body"]

_T = TypeVar("_T")
_LENGTH = "inference-header-content-length"
_SMALL = 262144  # bytes of a reply besides its numbers
_DECIMAL = 32  # bytes of a number in JSON, at most, with room for a pretty printer
_RANK = 8


class HttpTransport:
    """Requests to one model of a server.

    Args:
        url: `http(s)://host:port`, with a path where a proxy wants one.
        model: Its name there.
        token: Of a gateway in front of it; None for nothing.
        policy: How patient to be.
        workers: Most requests at once.
        transport: Instead of the network.
    """

    def __init__(
        self,
        url: str,
        model: str,
        token: str | None,
        policy: Policy,
        workers: int,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._url, self._model = url, model
        self._path = f"/v2/models/{quote(model, safe='')}"
        self._caller = Caller(url, token, policy, workers, transport)
        self._binary: bool | None = None  # None: not known yet

    def signature(self) -> tuple[dict[str, str], dict[str, str]]:
        """Types of the model's inputs and outputs, by name."""

        def read(answer: Answer) -> tuple[dict[str, str], dict[str, str]]:
            self._expect(answer)
            value = _json(answer.body)
            try:
                inputs, outputs = (
                    {str(tensor["name"]): str(tensor["datatype"]) for tensor in value.get(part) or []}
                    for part in ("inputs", "outputs")
                )
            except (TypeError, LookupError, AttributeError) as error:
                raise WireError("it does not describe a model as the Open Inference Protocol does") from error
            return inputs, outputs

        return self._caller.call("GET", self._path, read, most=_SMALL)

    def infer(self, name: str, tensors: Tensors, read: Callable[[Tensors], _T], *, numbers: int) -> _T:
        """What `read` makes of the model's outputs.

        Args:
            name: Id of the request, which the answer must bear.
            tensors: The inputs.
            read: Makes the result; `WireError` means that the answer is malformed.
            numbers: Most numbers in the outputs.
        """
        if self._binary is None:
            found = self._send(name, tensors, read, numbers, binary=True, probing=True)
            if found is not None:
                self._binary = True
                return found
            result = self._send(name, tensors, read, numbers, binary=False)
            self._binary = False
        else:
            result = self._send(name, tensors, read, numbers, binary=self._binary)
        if result is None:
            raise OracleError(f"{self._url}: the model answers nothing")
        return result

    def close(self) -> None:
        """Close the connections."""
        self._caller.close()

    def _send(
        self,
        name: str,
        tensors: Tensors,
        read: Callable[[Tensors], _T],
        numbers: int,
        *,
        binary: bool,
        probing: bool = False,
    ) -> _T | None:
        """The result; None where the server does not take bytes and that was to be found out."""

        def understand(answer: Answer) -> _T | None:
            if probing and answer.status in (400, 415, 422):
                return None
            self._expect(answer)
            return read(read_body(answer.body, answer.headers.get(_LENGTH), name, self._model))

        body, length = write_body(name, tensors, binary)
        return self._caller.call(
            "POST",
            f"{self._path}/infer",
            understand,
            body=body,
            kind="application/octet-stream" if binary else "application/json",
            most=_SMALL + _DECIMAL * numbers,
            headers={_LENGTH: str(length)} if binary else None,
        )

    def _expect(self, answer: Answer) -> None:
        """Raise what a status means unless it is 200."""
        if answer.status == 200:
            return
        said = plain(answer.body[:400].decode("utf-8", "replace"))
        if answer.status in (401, 403):
            raise OracleError(f"{self._url}: missing or wrong token; set BBPROMPT_TOKEN to that of the server")
        if answer.status == 404 or "unknown model" in said.lower():
            raise OracleError(f"{self._url}: no model {plain(self._model)!r} there; correct --backend ({said})")
        raise OracleError(f"{self._url}: refused (status {answer.status}): {said}")


def write_body(name: str, tensors: Tensors, binary: bool) -> tuple[bytes, int]:
    """A request's body and the length of the JSON in it."""
    names = {dtype: datatype for datatype, dtype in DTYPES.items()}
    inputs, tail = [], []
    for key, array in tensors.items():
        little = np.ascontiguousarray(array, dtype=DTYPES[names[array.dtype]])
        entry: dict[str, Any] = {"name": key, "shape": list(array.shape), "datatype": names[array.dtype]}
        if binary:
            entry["parameters"] = {"binary_data_size": little.nbytes}
            tail.append(little.tobytes())
        else:
            # float64 prints enough digits for float32 to come back bit for bit.
            wide = little.astype(np.float64) if little.dtype.kind == "f" else little
            entry["data"] = wide.ravel().tolist()
        inputs.append(entry)
    asked = {"id": name, "inputs": inputs} | ({"parameters": {"binary_data_output": True}} if binary else {})
    head = json.dumps(asked, separators=(",", ":")).encode("ascii")
    return b"".join([head, *tail]), len(head)


def read_body(body: bytes, length: str | None, name: str, model: str) -> dict[str, NDArray[Any]]:
    """The outputs in an answer, as own arrays.

    Args:
        body: Of the answer.
        length: Where its JSON ends; None where it is all JSON.
        name: Id that the answer must bear.
        model: Name of the model that must have answered.

    Raises:
        WireError: Anything is not as the protocol says, or is about something else.
    """
    if length is not None and not (length.isascii() and length.isdigit() and len(length) < 12):
        raise WireError("the length of its JSON is no number")
    split = len(body) if length is None else int(length)
    if split > len(body):
        raise WireError("it is cut short")
    value, at = _json(body[:split]), split
    if value.get("id") != name or value.get("model_name") != model:
        raise WireError("it belongs to another request or model")
    outputs = value.get("outputs")
    if not isinstance(outputs, list) or not all(isinstance(entry, dict) for entry in outputs):
        raise WireError("it has no list of outputs")
    found: dict[str, NDArray[Any]] = {}
    for entry in outputs:
        key, dtype = entry.get("name"), DTYPES.get(str(entry.get("datatype")))
        if not isinstance(key, str) or key in found or dtype is None:
            raise WireError("an output without a name or of a type that is not expected, or twice")
        shape = _shape(entry.get("shape"))
        parameters = entry.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:
            found[key] = _numbers(entry.get("data"), dtype, shape)
            continue
        if type(size) is not int or size != math.prod(shape) * dtype.itemsize or size > len(body) - at:
            raise WireError(f"{key[:20]} has another number of bytes than its shape says")
        found[key] = np.ndarray(shape, dtype, body, at).copy()
        at += size
    if at != len(body):
        raise WireError("there are bytes behind its last output")
    return found


def _shape(value: Any) -> tuple[int, ...]:
    sizes = isinstance(value, list) and len(value) <= _RANK and all(type(n) is int and n >= 0 for n in value)
    if not sizes or not fits(value):
        raise WireError("an output's shape is no list of sizes")
    return tuple(value)


def _numbers(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Numbers from JSON, in one list or in lists of lists."""
    flat, depth = data, 0
    while isinstance(flat, list) and flat and isinstance(flat[0], list):
        depth += 1
        if depth > _RANK or not all(isinstance(row, list) for row in flat):
            raise WireError("an output's numbers are no lists")
        flat = [number for row in flat for number in row]
    kinds = (int, float) if dtype.kind == "f" else (int,)
    if not isinstance(flat, list) or not all(type(number) in kinds for number in flat):
        raise WireError("an output's numbers are none")
    if len(flat) != math.prod(shape):
        raise WireError("an output has another number of numbers than its shape says")
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype=np.float64 if dtype.kind == "f" else dtype).astype(dtype).reshape(shape)
    except (OverflowError, FloatingPointError) as error:
        raise WireError("an output's number does not fit its type") from error


def _json(text: bytes) -> Mapping[str, Any]:
    def no_number(word: str) -> None:
        raise WireError(f"the number {word[:20]}")

    try:
        value = json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise WireError("it is no JSON") from error
    if not isinstance(value, dict):
        raise WireError("it is no JSON object")
    return value
