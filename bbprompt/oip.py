"""What travels in the tensors of the Open Inference Protocol (KServe v2) between an oracle and a model server.

| input | type, shape | what |
|---|---|---|
| `request` | UINT8 [m] | JSON: `ask` is "describe" or "score"; with "score" all of a request but its numbers |
| `points` | FP32 [n, L, d] | candidates; with "score" |
| `texts` | UINT8 [t] | a batch as in `bbprompt.wire`; with "score", where the model may not have it yet |

| output | type, shape | what |
|---|---|---|
| `reply` | UINT8 [m] | JSON: the `call_id` and `cut`; a description; or a refusal, `error` and `message` |
| `logits`, `normalizer` | FP32 [n, O, C], [n, N, C] | see `bbprompt.oracle.Scores`; absent where empty |
| `best` | INT64 [n, N, 2] | where it was asked for |

Text goes as bytes in UINT8, which all servers and all encodings of the protocol carry alike. A refusal is a reply, not
an error of the server, because servers give errors of a model statuses of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch
from bbprompt.wire import PROTOCOL, ScoreRequest, WireError, encode_batch, request_for

__all__ = [
    "DTYPES",
    "INPUTS",
    "OUTPUTS",
    "Tensors",
    "ask_description",
    "ask_scores",
    "read_question",
    "read_reply",
    "reply_description",
    "reply_refusal",
    "reply_scores",
]

Tensors = Mapping[str, NDArray[Any]]

#: Names of the protocol for the types that are used here.
DTYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}
INPUTS = {"request": "UINT8", "points": "FP32", "texts": "UINT8"}
OUTPUTS = {"reply": "UINT8", "logits": "FP32", "normalizer": "FP32", "best": "INT64"}
_RANKS = {"request": 1, "points": 3, "texts": 1, "reply": 1, "logits": 3, "normalizer": 3, "best": 3}
_MOST_JSON = 65536  # bytes; ours are below one kB


def ask_description() -> dict[str, NDArray[Any]]:
    """Inputs that ask what the model is."""
    return {"request": _pack({"protocol": PROTOCOL, "ask": "describe"})}


def ask_scores(request: ScoreRequest, batch: TextBatch | None) -> dict[str, NDArray[Any]]:
    """Inputs that ask for scores.

    Args:
        request: What is asked.
        batch: Its texts, where the model may not have them yet.
    """
    asked = {
        "protocol": PROTOCOL,
        "ask": "score",
        "call_id": request.call_id,
        "batch": request.batch,
        "model": request.model,
        "support": request.support,
        "longest_answer": request.longest_answer,
    }
    tensors: dict[str, NDArray[Any]] = {"request": _pack(asked), "points": request.points}
    if batch is not None:
        tensors["texts"] = np.frombuffer(encode_batch(batch), dtype=np.uint8)
    return tensors


def read_question(tensors: Tensors, info: OracleInfo, most: int) -> ScoreRequest | None:
    """What is asked; None where a description is.

    Args:
        tensors: The inputs; `texts` are not looked at.
        info: The model that answers. Its digest is not compared with the request's.
        most: Most candidates.

    Raises:
        WireError: The inputs are not as agreed on, or were changed on the way.
    """
    asked = _checked(tensors, INPUTS, "request")
    if asked.get("ask") == "describe":
        return None
    if asked.get("ask") != "score" or "points" not in tensors:
        raise WireError("it asks neither for a description nor for scores of points")
    points, longest = tensors["points"], asked.get("longest_answer")
    if points.shape[1:] != (info.layers, info.dim) or not 1 <= len(points) <= most:
        raise WireError(
            f"points have shape {points.shape}, the model takes (n, {info.layers}, {info.dim}) with n from 1 to {most}"
        )
    if asked.get("support") not in get_args(Support) or not (longest is None or type(longest) is int):
        raise WireError("support or longest_answer are none that there are")
    texts = {name: asked.get(name) for name in ("call_id", "batch", "model")}
    if not all(isinstance(text, str) and len(text) <= 200 for text in texts.values()):
        raise WireError("an id or a digest is missing")
    given = ScoreRequest(
        **cast(dict[str, str], texts),
        support=cast(Support, asked["support"]),
        longest_answer=longest,
        points=np.ascontiguousarray(points, dtype=np.float32),
    )
    if given.model == info.digest():
        same = request_for(info, given.batch, given.points, given.support, longest)
        if same.call_id != given.call_id:
            raise WireError("the call_id is not that of the request: something changed it on the way")
    return given


def reply_description(info: OracleInfo, points: int, texts: int) -> dict[str, NDArray[Any]]:
    """Outputs that say what the model is and takes at once."""
    limits = {"points": points, "texts": texts}
    return {"reply": _pack({"protocol": PROTOCOL, "model": asdict(info), "limits": limits})}


def reply_scores(call_id: str, scores: Scores) -> dict[str, NDArray[Any]]:
    """Outputs with scores; any number of channels on their last axis."""
    tensors: dict[str, NDArray[Any]] = {
        "reply": _pack({"protocol": PROTOCOL, "call_id": call_id, "cut": int(scores.cut)}),
        "normalizer": np.ascontiguousarray(scores.normalizer, dtype="<f4"),
    }
    if scores.logits.size:  # not every server carries a tensor without numbers
        tensors["logits"] = np.ascontiguousarray(scores.logits, dtype="<f4")
    if scores.best is not None:
        tensors["best"] = np.ascontiguousarray(scores.best, dtype="<i8")
    return tensors


def reply_refusal(code: str, message: str) -> dict[str, NDArray[Any]]:
    """Outputs that say no: a word for programs and a line for people."""
    return {"reply": _pack({"protocol": PROTOCOL, "error": code, "message": message})}


def read_reply(tensors: Tensors) -> tuple[dict[str, Any], Scores | None]:
    """The JSON of a reply, and its scores, yet to be checked, where it has any.

    Raises:
        WireError: Anything is not as agreed on.
    """
    said = _checked(tensors, OUTPUTS, "reply")
    if "call_id" not in said:
        return said, None
    normalizer = tensors.get("normalizer")
    if normalizer is None:
        raise WireError("scores are missing")
    logits = tensors.get("logits", np.zeros((len(normalizer), 0, normalizer.shape[2]), dtype=np.float32))
    cut = said.get("cut")
    if type(cut) is not int or cut < 0:
        raise WireError("cut is not a whole number")
    return said, Scores(logits, normalizer, tensors.get("best"), cut)


def _pack(value: Mapping[str, Any]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode("ascii"), dtype=np.uint8)


def _checked(tensors: Tensors, expected: Mapping[str, str], text: str) -> dict[str, Any]:
    """The JSON in the tensor `text`, after names, types and ranks of all tensors."""
    for name, array in tensors.items():
        if name not in expected:
            raise WireError(f"a tensor {name[:20]!r} that is not expected")
        if array.dtype != DTYPES[expected[name]] or array.ndim != _RANKS[name]:
            raise WireError(f"{name} is {array.dtype} of shape {array.shape}, not {expected[name]}")
    if text not in tensors or tensors[text].size > _MOST_JSON:
        raise WireError(f"no {text}, or one that is too long")
    try:
        value = json.loads(tensors[text].tobytes(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the {text} is no JSON") from error
    if not isinstance(value, dict):
        raise WireError(f"the {text} is no JSON object")
    return value


def _no_number(text: str) -> None:
    raise WireError(f"the number {text[:20]}")
