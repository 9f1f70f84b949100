"""Messages survive the way there and back, and nothing else gets in."""

from __future__ import annotations

import json
import re
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from depth import deep
from hypothesis import given, settings
from hypothesis import strategies as st

from bbprompt import wire
from bbprompt.oracle import OracleInfo, Scores, TextBatch
from bbprompt.tasks.example import Answer, Form, Part
from bbprompt.wire import ScoreRequest, WireError

INFO = OracleInfo("toy", "a" * 64, "b" * 64, 3, 4, "float32", "numpy", 64)
CHOICES = TextBatch((Form((Part("很好吃", cut=True), Part("？", cut=False)), ("好", "差"), -1),) * 3)
SPANS = TextBatch((Form((Part("谁", cut=False), Part("李白在长安", cut=True)), (), 1),) * 2, (Answer("李白", 0), None))
LIMITS: dict[str, int] = {"layers": 3, "dim": 4, "most": 20}


def request(points: np.ndarray, longest: int | None = None) -> ScoreRequest:
    return wire.request_for(INFO, CHOICES.digest(), points.astype(np.float32), "candidates", longest)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("batch", [CHOICES, SPANS, TextBatch((SPANS.forms[0],))])
def test_a_batch_comes_back_equal(batch: TextBatch) -> None:
    again = wire.decode_batch(wire.encode_batch(batch), most=3)
    assert again == batch
    assert again.digest() == batch.digest()


@given(text=st.text(min_size=1), cut=st.booleans())
@settings(max_examples=deep(50), deadline=None)
def test_any_text_comes_back_equal(text: str, cut: bool) -> None:
    batch = TextBatch((Form((Part(text, cut),), (text, "\ud800"), -1),))
    assert wire.decode_batch(wire.encode_batch(batch), most=1) == batch


@pytest.mark.parametrize("layers", [[], [0], [2], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("longest", [None, 7])
def test_a_request_comes_back_equal_whatever_differs(layers: list[int], longest: int | None) -> None:
    points = np.repeat(normal(1, 3, 4), 5, axis=0)
    points[:, layers] = normal(5, len(layers), 4)
    sent = request(points, longest)
    got = wire.decode_request(wire.encode_request(sent), **LIMITS)
    assert np.array_equal(got.points, sent.points)
    assert replace(got, points=points) == replace(sent, points=points)
    assert got.points.flags.writeable


def test_what_candidates_share_travels_once() -> None:
    points = np.repeat(normal(1, 24, 300), 20, axis=0)
    whole = len(wire.encode_request(request(normal(20, 24, 300))))
    points[:, 5] = normal(20, 300)
    layer = len(wire.encode_request(request(points)))
    assert 20 * 24 * 300 * 4 < whole < 20 * 24 * 300 * 4 + 24 * 300 * 4 + 1024
    assert layer < (20 + 24) * 300 * 4 + 1024


def test_the_call_id_is_that_of_all_that_decides_the_answer() -> None:
    points = normal(2, 3, 4)
    others = {
        "backbone_digest": "c" * 64,
        "prompts_digest": "c" * 64,
        "precision": "bfloat16",
        "device": "cuda",
        "max_tokens": 32,
        "versions": "torch 99.0",
    }
    ids = {
        request(points).call_id,
        request(points[::-1]).call_id,
        request(points, 5).call_id,
        wire.request_for(INFO, CHOICES.digest(), points, "sequence", None).call_id,
        wire.request_for(INFO, SPANS.digest(), points, "candidates", None).call_id,
        *(
            wire.request_for(replace(INFO, **{key: value}), CHOICES.digest(), points, "candidates", None).call_id  # type: ignore[arg-type]
            for key, value in others.items()
        ),
    }
    assert len(ids) == 5 + len(others)
    assert request(points).call_id == request(points.copy()).call_id


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("best", [None, np.array([[[0, 2], [1, 1]]] * 3)])
def test_a_reply_comes_back_equal(channels: int, best: np.ndarray | None) -> None:
    scores = Scores(normal(3, 6, channels), normal(3, 2, channels), best, 4)
    call_id, got = wire.decode_reply(wire.encode_reply("0" * 64, scores))
    assert call_id == "0" * 64
    assert got.cut == 4
    assert np.array_equal(got.logits, scores.logits)
    assert np.array_equal(got.normalizer, scores.normalizer)
    assert (got.best is None and best is None) or np.array_equal(got.best, best)  # type: ignore[arg-type]
    got.logits[:] = 0


def test_arrays_with_strides_come_back_equal() -> None:
    scores = Scores(normal(2, 6, 3).transpose(2, 1, 0), normal(2, 5, 3).T, np.ones((2, 2, 3), dtype=int).T, 0)
    _, got = wire.decode_reply(wire.encode_reply("0" * 64, scores))
    assert np.array_equal(got.logits, scores.logits)
    assert np.array_equal(got.normalizer, scores.normalizer)


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7), end=st.integers(0, 10_000))
@settings(max_examples=deep(300), deadline=None)
def test_damage_is_refused_or_harmless(at: int, bit: int, end: int) -> None:
    body = bytearray(wire.encode_request(request(normal(2, 3, 4))))
    body[at % len(body)] ^= 1 << bit
    for damaged in (bytes(body), bytes(body[: end % len(body)]), bytes(body) + b"\0"):
        try:
            got = wire.decode_request(damaged, **LIMITS)
        except WireError:
            continue
        assert got.points.shape == (2, 3, 4)


def forged(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


META = {"protocol": "1", "kind": "batch"}


def texts(raw: bytes, **changes: Any) -> bytes:
    tensor = {"dtype": "U8", "shape": [len(raw)], "data_offsets": [0, len(raw)], **changes}
    return forged({"__metadata__": META, "texts": tensor}, raw)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff" * 8,
        b"\x80\x04\x95pickle",
        forged(b"[" * 60000),
        forged([]),
        forged({}),
        forged({"__metadata__": {"protocol": 1}}),
        forged({"__metadata__": {**META, "protocol": "2"}}),
        forged({"__metadata__": {**META, "kind": "reply"}}),
        forged({"__metadata__": META}),
        forged({"__metadata__": META, "texts": 5}),
        forged(b'{"texts": 1, "texts": 2}'),
        texts(b"[[],[]]"),
        texts(b"[[],[]]", dtype="F32"),
        texts(b"[[],[]]", shape=[-7]),
        texts(b"[[],[]]", shape=[7.0]),
        texts(b"[[],[]]", shape=[2**62]),
        texts(b"[[],[]]", shape=[7, 1]),
        texts(b"[[],[]]", data_offsets=[1, 8]),
        texts(b"[" * 60000),
        texts(b"1" * 50000),
        texts(b"[[],[]"),
        texts(b"[1.5,[]]"),
        texts(b"[NaN,[]]"),
        texts(b"\xff\xfe"),
    ],
    ids=range(25),
)
def test_what_is_no_batch_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_batch(body, most=4)


@pytest.mark.parametrize("shape", [[0, 2**39, 2**39], [2**39, 2**39, 0], [2**20, 2**20, 0]])
def test_an_empty_tensor_has_sizes_that_an_array_can_have(shape: list[int]) -> None:
    def empty(shape: list[int]) -> bytes:
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        meta = {"protocol": "1", "kind": "reply", "call_id": "0" * 64, "cut": "0"}
        return forged({"__metadata__": meta, "logits": tensor, "normalizer": tensor})

    assert wire.decode_reply(empty([2, 0, 2]))[1].logits.shape == (2, 0, 2)
    with pytest.raises(WireError, match="sizes that no array has together"):
        wire.decode_reply(empty(shape))


FORM = [[["a", True]], ["x", "y"], -1, -1, -1, -1]
SPAN = [[["a", True]], [], 0, -1, -1, -1]

#: Forms and answers that are written as agreed on but for one thing, and what is said of it.
ODD: dict[str, tuple[list[Any], list[Any], str]] = {
    "cut": ([[[["a", 1]], *FORM[1:]]], [], "a bool was expected"),
    "text": ([[[[1, True]], *FORM[1:]]], [], "a str was expected"),
    "option": ([[FORM[0], ["x", None], *FORM[2:]]], [], "a str was expected"),
    "context": ([[*FORM[:2], True, *FORM[3:]]], [], "an? int was expected"),
    "both": ([[*FORM[:2], 0, *FORM[3:]]], [], "neither options nor a context, or both"),
    "neither": ([[FORM[0], [], *FORM[2:]]], [], "neither options nor a context, or both"),
    "no such context": ([[*SPAN[:2], 1, *SPAN[3:]]], [], "neither options nor a context, or both"),
    "no such second": ([[*FORM[:3], 1, -1, -1]], [], "a part or an option that it has not"),
    "no such same": ([[*FORM[:4], 2, -1]], [], "a part or an option that it has not"),
    "gap": ([[*FORM[:5], 2]], [], "its gap outside"),
    "mixed": ([FORM, SPAN], [], "texts with options and texts with answers"),
    "answers of options": ([FORM], [None], "answers that belong to no text"),
    "more answers": ([SPAN], [None, None], "answers that belong to no text"),
    "early answer": ([SPAN], [["a", -1]], "starts before its context"),
    "answer type": ([SPAN], [["a", "0"]], "an? int was expected"),
    "five": ([FORM] * 5, [], "5 texts in a batch"),
    "none": ([], [], "0 texts in a batch"),
    "short form": ([FORM[:3]], [], "not written as agreed on"),
}


BOMBS = {
    "lists": (b"[[" + b"[]," * 2**19 + b"[]],[]]", "more than 1048576 bytes around its texts"),
    "numbers": (b"[[" + b"1," * 2**20 + b"1],[]]", "more than 1048576 bytes around its texts"),
    "quotes": (b'[["' + rb"\"[" * 2**19 + b'"],[]]', "not written as agreed on"),  # a text, and no form
    "strings": (b"[[" + b'"",' * 2**17 + b'""],[]]', "more than 131072 parts and options"),
    "text": (json.dumps([[[[["a" * (2**17 + 1), True]], ["b"], -1, -1, -1, -1]], []]).encode(), "a text of 131073"),
    "bytes": (b'[["' + b"a" * wire.MOST_BATCH + b'"],[]]', "at most 8388608 are taken"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_would_grow_in_memory_is_refused_before_it_does(bomb: str) -> None:
    text, said = BOMBS[bomb]
    body = texts(text)
    tracemalloc.start()
    try:
        with pytest.raises(wire.WireError, match=re.escape(said)):
            wire.decode_batch(body, most=4096)
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_about_a_batch_is_said(odd: str) -> None:
    forms, answers, said = ODD[odd]
    with pytest.raises(WireError, match=said):
        wire.decode_batch(texts(json.dumps([forms, answers]).encode()), most=4)
    assert len(wire.decode_batch(texts(json.dumps([[FORM], []]).encode()), most=4).forms) == 1
    assert wire.decode_batch(texts(json.dumps([[SPAN], [["a", 0]]]).encode()), most=4).extractive


@pytest.mark.parametrize("layers", [[2, 0], [0, 0], [-1, 0], [0, 3], [2**62, -(2**63)]])
def test_layers_are_in_order_and_those_of_the_model(layers: list[int]) -> None:
    points = np.repeat(normal(1, 3, 4), 2, axis=0)
    points[:, [0, 2]] = normal(2, 2, 4)
    body = wire.encode_request(request(points))
    size = int.from_bytes(body[:8], "little")
    begin, end = (8 + size + place for place in json.loads(body[8 : 8 + size])["layers"]["data_offsets"])
    assert wire.decode_request(body, **LIMITS).points.shape == (2, 3, 4)
    with pytest.raises(WireError, match="not in order or not of the model"):
        wire.decode_request(body[:begin] + np.array(layers, "<i8").tobytes() + body[end:], **LIMITS)


@pytest.mark.parametrize("name", ["points", "longest_answer"])
@pytest.mark.parametrize("value", ["-1", "1.0", "01", "1e3", "９", "9" * 16, "x"])
def test_numbers_in_metadata_are_whole(name: str, value: str) -> None:
    body = wire.encode_request(request(normal(2, 3, 4)))
    size = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + size])
    header["__metadata__"][name] = value
    with pytest.raises(WireError, match=f"{name} is not a whole number"):
        wire.decode_request(forged(header, body[8 + size :]), **LIMITS)


@pytest.mark.parametrize(
    ("limits", "said"),
    [({"most": 1}, "2 candidates"), ({"layers": 4}, r"\(2, 3, 4\)"), ({"dim": 5}, r"\(2, 3, 4\)")],
)
def test_requests_that_do_not_fit_are_refused(limits: dict[str, int], said: str) -> None:
    with pytest.raises(WireError, match=said):
        wire.decode_request(wire.encode_request(request(normal(2, 3, 4))), **(LIMITS | limits))
    with pytest.raises(WireError, match="support"):
        wire.decode_request(wire.encode_request(replace(request(normal(2, 3, 4)), support="all")), **LIMITS)  # type: ignore[arg-type]
    with pytest.raises(WireError, match="call_id"):
        wire.decode_request(wire.encode_request(replace(request(normal(2, 3, 4)), call_id="../x")), **LIMITS)


def test_a_request_is_for_one_model() -> None:
    asked = request(normal(2, 3, 4))
    wire.check_model(asked, replace(INFO))
    other = replace(INFO, precision="bfloat16", versions="torch 99.0")
    with pytest.raises(wire.OtherModel, match=r"other settings or versions \(toy; bfloat16; .*torch 99\.0\)"):
        wire.check_model(asked, other)
