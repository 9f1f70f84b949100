"""The bytes between a remote oracle and its server: safetensors with strict parsing, never pickle, no JSON floats.

Three messages, each one safetensors file of float32, int64 or byte tensors with text metadata:

- a *batch* of texts, registered once under its digest;
- a *request*: candidates for a registered batch. Layers in which all candidates are equal travel once, so a
  population that differs in one layer costs d numbers a candidate;
- a *reply*: scores, with the id of the request they answer.

Both sides read with the same reader, which trusts nothing: sizes are checked before anything is allocated, tensors
must be those that are expected, lie one behind the other and fill the message exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from bbprompt.errors import OracleError
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch
from bbprompt.tasks.example import Answer, Form, Part

__all__ = [
    "CONTENT_TYPE",
    "MOST_BATCH",
    "PROTOCOL",
    "OtherModel",
    "ScoreRequest",
    "WireError",
    "check_model",
    "decode_batch",
    "decode_reply",
    "decode_request",
    "encode_batch",
    "encode_reply",
    "encode_request",
    "fits",
    "request_for",
]

#: Version of everything here; both sides must have the same.
PROTOCOL = 1
CONTENT_TYPE = "application/vnd.bbprompt.safetensors"

_HEADER = 65536  # bytes; ours are below one kB
#: Most bytes of a batch; ours have 64 texts and are far below. Of these bytes, most that are no text; most strings, and
#: characters of one.
MOST_BATCH = 8 * 2**20
_MOST_STRUCTURE, _MOST_STRINGS, _MOST_CHARACTERS = 2**20, 2**17, 2**17
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}
_ID = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,14}")


class WireError(OracleError):
    """A message is not what was agreed on."""


class OtherModel(OracleError):
    """A request is for another model than the one that it has reached."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Candidates to be scored on a registered batch.

    Attributes:
        call_id: 64 hex digits, the same whenever the same is asked: an answer that is known is not computed again.
        batch: Digest of the texts.
        model: Digest of what is meant to answer, settings and versions included (`OracleInfo.digest`).
        support: What probabilities are normalised over.
        longest_answer: See `bbprompt.oracle.Oracle.score`.
        points: `(n, L, d)` float32.
    """

    call_id: str
    batch: str
    model: str
    support: Support
    longest_answer: int | None
    points: NDArray[np.float32]


def request_for(
    info: OracleInfo, batch: str, points: NDArray[np.float32], support: Support, longest_answer: int | None
) -> ScoreRequest:
    """A request whose id is a digest of all that decides the answer, the model included."""
    model = info.digest()
    head = [PROTOCOL, batch, model, support, longest_answer, points.shape]
    sha = hashlib.sha256(json.dumps(head).encode("ascii"))
    sha.update(points.astype("<f4").tobytes())
    return ScoreRequest(sha.hexdigest(), batch, model, support, longest_answer, points)


def check_model(request: ScoreRequest, info: OracleInfo) -> None:
    """See that a request has reached the model that it is for.

    Raises:
        OtherModel: It has not; says what this one is.
    """
    if request.model != info.digest():
        raise OtherModel(
            "this server holds another model or other prompts, or the same with other settings or versions "
            f"({info.backbone}; {info.precision}; {info.device}; at most {info.max_tokens} tokens; {info.versions})"
        )


def encode_request(request: ScoreRequest) -> bytes:
    """Write a request; what all candidates share is written once."""
    points = request.points
    differs = np.flatnonzero((points != points[:1]).any(axis=(0, 2)))
    meta = {
        "call_id": request.call_id,
        "batch": request.batch,
        "model": request.model,
        "support": request.support,
        "longest_answer": "" if request.longest_answer is None else str(request.longest_answer),
        "points": str(len(points)),
    }
    own = np.ascontiguousarray(points[:, differs], dtype="<f4")
    return _write("request", meta, {"base": points[0].astype("<f4"), "layers": differs.astype("<i8"), "points": own})


def decode_request(body: bytes, *, layers: int, dim: int, most: int) -> ScoreRequest:
    """Read a request.

    Args:
        body: The message.
        layers: L of the model.
        dim: d of the model.
        most: Most candidates.

    Raises:
        WireError: Anything is not as agreed on.
    """
    meta, tensors = _read(body, "request", {"base": ("F32", 2), "layers": ("I64", 1), "points": ("F32", 3)})
    support, longest = meta.get("support", ""), meta.get("longest_answer", "")
    if support not in get_args(Support):
        raise WireError(f"support is {support[:20]!r}, expected one of {', '.join(get_args(Support))}")
    count = _number(meta, "points")
    if not 1 <= count <= most:
        raise WireError(f"{count} candidates in a request, this server takes 1 to {most}")
    base, which, own = tensors["base"], tensors["layers"], tensors["points"]
    if base.shape != (layers, dim) or own.shape != (count, len(which), dim):
        raise WireError(
            f"points have shape ({count}, {base.shape[0]}, {base.shape[1]}), the model takes (n, {layers}, {dim})"
        )
    if len(which) and (which.min() < 0 or which.max() >= layers or (np.diff(which) <= 0).any()):
        raise WireError("the layers that differ are not in order or not of the model")
    points = np.repeat(base[None], count, axis=0).astype(np.float32)
    points[:, which] = own
    return ScoreRequest(
        _digest(meta, "call_id"),
        _digest(meta, "batch"),
        _digest(meta, "model"),
        cast(Support, support),
        _number(meta, "longest_answer") if longest else None,
        points,
    )


def encode_reply(call_id: str, scores: Scores) -> bytes:
    """Write scores; any number of channels on their last axis."""
    tensors = {"logits": scores.logits.astype("<f4"), "normalizer": scores.normalizer.astype("<f4")}
    if scores.best is not None:
        tensors["best"] = scores.best.astype("<i8")
    return _write("reply", {"call_id": call_id, "cut": str(int(scores.cut))}, tensors)


def decode_reply(body: bytes) -> tuple[str, Scores]:
    """Read a reply: the id of its request, and scores yet to be checked against the batch.

    Raises:
        WireError: Anything is not as agreed on.
    """
    expected = {"logits": ("F32", 3), "normalizer": ("F32", 3), "best": ("I64", 3)}
    meta, tensors = _read(body, "reply", expected, optional=frozenset({"best"}))
    scores = Scores(tensors["logits"], tensors["normalizer"], tensors.get("best"), _number(meta, "cut"))
    return _digest(meta, "call_id"), scores


def encode_batch(batch: TextBatch) -> bytes:
    """Write texts: a list of forms and a list of answers, as JSON in a tensor of bytes."""
    forms = [
        [[[p.text, p.cut] for p in form.parts], list(form.options), form.context, form.second, form.same, form.gap]
        for form in batch.forms
    ]
    answers = [None if answer is None else [answer.text, answer.start] for answer in batch.answers]
    text = json.dumps([forms, answers], separators=(",", ":"), ensure_ascii=True)
    return _write("batch", {}, {"texts": np.frombuffer(text.encode("ascii"), dtype=np.uint8)})


def decode_batch(body: bytes, *, most: int) -> TextBatch:
    """Read texts.

    Args:
        body: The message.
        most: Most texts.

    Raises:
        WireError: Anything is not as agreed on.
    """
    if len(body) > MOST_BATCH:
        raise WireError(f"a batch of {len(body)} bytes, at most {MOST_BATCH} are taken")
    _, tensors = _read(body, "batch", {"texts": ("U8", 1)})
    text = tensors["texts"].tobytes()
    _check_extent(text)
    try:
        value = json.loads(text, parse_float=_no_number, parse_constant=_no_number)
        forms, answers = value
        if not 1 <= len(forms) <= most:
            raise WireError(f"{len(forms)} texts in a batch, this server takes 1 to {most}")
        batch = TextBatch(tuple(map(_form, forms)), tuple(map(_answer, answers)))
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(f"the texts are not written as agreed on ({type(error).__name__})") from error
    if len({form.context < 0 for form in batch.forms}) > 1:
        raise WireError("texts with options and texts with answers in one batch")
    if batch.answers and (len(batch.answers) != len(batch.forms) or not batch.extractive):
        raise WireError("answers that belong to no text")
    return batch


def _check_extent(text: bytes) -> None:
    """Refuse JSON that would become many times as large in memory, before it does; in one pass over its bytes."""
    unescaped = text.replace(rb"\\", b"").replace(rb"\"", b"")  # so that each quote begins or ends a string
    if unescaped.count(b'"') > 2 * _MOST_STRINGS:
        raise WireError(f"more than {_MOST_STRINGS} parts and options in a batch")
    if sum(map(len, unescaped.split(b'"')[::2])) > _MOST_STRUCTURE:
        raise WireError(f"a batch with more than {_MOST_STRUCTURE} bytes around its texts")


def _form(value: Any) -> Form:
    parts, options, context, second, same, gap = value
    form = Form(
        tuple(Part(_text(text), _is(bool, cut)) for text, cut in parts),
        tuple(map(_text, options)),
        *(_is(int, number) for number in (context, second, same, gap)),
    )
    if not (-1 <= form.second < len(form.parts) and -1 <= form.same < len(form.options)):
        raise WireError("a text is compared with a part or an option that it has not")
    if not -1 <= form.gap <= len(form.parts):
        raise WireError("a text has its gap outside")
    if not -1 <= form.context < len(form.parts) or (form.context < 0) != bool(form.options):
        raise WireError("a text has neither options nor a context, or both")
    return form


def _answer(value: Any) -> Answer | None:
    if value is None:
        return None
    text, start = value
    answer = Answer(_text(text), _is(int, start))
    if answer.start < 0:
        raise WireError("an answer starts before its context")
    return answer


def _text(value: Any) -> str:
    text: str = _is(str, value)
    if len(text) > _MOST_CHARACTERS:
        raise WireError(f"a text of {len(text)} characters, at most {_MOST_CHARACTERS} are taken; shorten it")
    return text


def _is(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise WireError(f"a {kind.__name__} was expected in a text, not a {type(value).__name__}")
    return value


def _no_number(text: str) -> None:
    raise WireError(f"the number {text[:20]} in a text")


def _number(meta: Mapping[str, str], name: str) -> int:
    if not _NUMBER.fullmatch(meta.get(name, "")):
        raise WireError(f"{name} is not a whole number")
    return int(meta[name])


def _digest(meta: Mapping[str, str], name: str) -> str:
    if not _ID.fullmatch(meta.get(name, "")):
        raise WireError(f"{name} is not 64 hex digits")
    return meta[name]


def _write(kind: str, meta: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]) -> bytes:
    # safetensors writes an array's memory as it lies there, strides or not.
    rows = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return cast(bytes, save(rows, metadata={"protocol": str(PROTOCOL), "kind": kind, **meta}))


def _read(
    body: bytes,
    kind: str,
    expected: Mapping[str, tuple[str, int]],
    optional: frozenset[str] = frozenset(),
) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Metadata and tensors (own, writable copies) of a message of the given kind."""
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > min(_HEADER, len(body) - 8):
        raise WireError(f"a {kind} that is cut short, or no safetensors")
    try:
        header = json.loads(body[8 : 8 + size], object_pairs_hook=_no_duplicates, parse_float=_no_number)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a {kind} whose header is no JSON") from error
    meta = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise WireError(f"a {kind} without metadata")
    if meta.get("protocol") != str(PROTOCOL):
        raise WireError(f"protocol {str(meta.get('protocol'))[:10]!r}, this side speaks {PROTOCOL}")
    if meta.get("kind") != kind:
        raise WireError(f"a {str(meta.get('kind'))[:10]!r} where a {kind} was expected")
    if not expected.keys() - optional <= header.keys() <= expected.keys():
        raise WireError(f"a {kind} with other tensors than {', '.join(expected)}")
    places = {name: _place(name, value, *expected[name]) for name, value in header.items()}
    data, at, tensors = memoryview(body)[8 + size :], 0, {}
    for name, (dtype, shape, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        count = 1
        for length in shape:
            count *= length
        if begin != at or end - begin != count * dtype.itemsize or end > len(data):
            raise WireError(f"a {kind} whose tensor {name} does not lie where it should")
        tensors[name] = np.frombuffer(data[begin:end], dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="))
        at = end
    if at != len(data):
        raise WireError(f"a {kind} with {len(data) - at} bytes too many")
    return meta, tensors


def _place(name: str, value: Any, dtype: str, dimensions: int) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"} or value["dtype"] != dtype:
        raise WireError(f"tensor {name} is not {dtype}")
    shape, offsets = value["shape"], value["data_offsets"]
    for numbers, length in ((shape, dimensions), (offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) != length:
            raise WireError(f"tensor {name} has not {dimensions} dimensions")
        if any(type(number) is not int or not 0 <= number < 2**40 for number in numbers):
            raise WireError(f"tensor {name} has a size that is no size")
    if not fits(shape):
        raise WireError(f"tensor {name} has sizes that no array has together")
    begin, end = offsets
    return _DTYPES[dtype], tuple(shape), begin, end


def fits(shape: Sequence[int]) -> bool:
    """Whether an array can have a shape: sizes beside a 0 need no memory, and yet may be too large for any."""
    return math.prod(size or 1 for size in shape) < 2**40


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise WireError("a name stands twice in a header")
    return values
