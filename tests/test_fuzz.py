"""Parsers of foreign bytes: whatever they are given, they answer with a value or with a documented error."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import canaries
import fuzz
import fuzztargets
import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from bbprompt import wire
from bbprompt.backends.cache import memoised_digest
from bbprompt.backends.oip_grpc import MESSAGES

MUTANTS = 200
#: What reads anything: a damaged curve is begun anew, and a refusal in no known form is one all the same.
NEVER_REFUSED = ("curve", "training log", "server refusal", "vLLM refusal")


def test_every_target_is_named() -> None:
    assert tuple(fuzztargets.targets()) == fuzztargets.NAMES


@pytest.mark.parametrize("name", fuzztargets.NAMES)
def test_mutants_of_sound_files(name: str) -> None:
    counts = fuzz.mutations(name, MUTANTS, seed=1)
    assert counts["accepted"] >= 1, "the sound file itself"
    assert counts["refused"] > MUTANTS // 10 or name in NEVER_REFUSED


#: These sizes fit a tensor without numbers, and no array.
VAST = [0, 2**39, 2**39]


def tensor_file(kind: str, meta: dict[str, str], tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A message of `bbprompt.wire` whose tensors are all empty."""
    header = {"__metadata__": {"protocol": "1", "kind": kind, **meta}}
    for name, (dtype, shape) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}  # type: ignore[assignment]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def output(parameters: dict[str, Any]) -> bytes:
    """An answer of the Open Inference Protocol, to a question for a description, whose one output is empty."""
    entry = {"name": "logits", "datatype": "FP32", "shape": VAST, **parameters}
    return json.dumps({"id": "describe", "model_name": "oracle", "outputs": [entry]}).encode()


def over_grpc(raw: bool) -> bytes:
    """The same, as gRPC has it."""
    said = MESSAGES["ModelInferResponse"](model_name="m", id="i")
    said.outputs.add(name="logits", datatype="FP32", shape=VAST)
    if raw:
        said.raw_output_contents.append(b"")
    return bytes(said.SerializeToString())


def completion(index: str, logprob: str) -> bytes:
    """An answer of vLLM about two texts."""
    table = f'{{"token_id:0":{logprob},"token_id:1":-1.0}}'
    choices = [f'{{"index":{number},"logprobs":{{"top_logprobs":[{table}]}}}}' for number in ("0", index)]
    return f'{{"choices":[{",".join(choices)}],"usage":{{"prompt_tokens":5}}}}'.encode()


@pytest.mark.parametrize(
    "name", ["pickle 2", "npy", "torch", "old torch", "yaml object/apply:os.system", "yaml eval", "python"]
)
def test_a_canary_sings_where_it_is_run(name: str, tmp_path: Path) -> None:
    """Otherwise its silence would say nothing."""
    canary = tmp_path / "canary"
    payload = canaries.payloads(canary)[name]
    if name == "python":
        exec(payload)
    elif name.startswith("yaml"):
        yaml.unsafe_load(payload)
    elif name == "npy":
        np.load(io.BytesIO(payload), allow_pickle=True)
    elif name == "torch":
        pickle.loads(zipfile.ZipFile(io.BytesIO(payload)).read("archive/data.pkl"))
    else:
        file = io.BytesIO(payload)
        while file.tell() < len(payload):
            pickle.load(file)
    assert canary.exists()


READERS: dict[str, tuple[Callable[[bytes], object], type[Exception]]] = {
    "request": (lambda data: wire.decode_request(data, layers=3, dim=4, most=9), wire.WireError),
    "reply": (wire.decode_reply, wire.WireError),
    "batch": (lambda data: wire.decode_batch(data, most=9), wire.WireError),
}


@pytest.mark.parametrize("name", [*fuzztargets.NAMES, *READERS])
def test_nothing_that_is_read_is_run(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    if name in READERS:
        read, allowed = READERS[name]
    else:
        target = fuzztargets.targets()[name]
        read, allowed = target.read, target.allowed  # type: ignore[assignment]
    payloads = canaries.payloads(canary)
    assert len(payloads) >= 17
    for payload in payloads.values():
        with contextlib.suppress(allowed):
            read(payload)
        assert not canary.exists()


def test_a_cached_digest_is_not_run(cache: Path, tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "weights"
    file.write_bytes(b"x")
    assert memoised_digest([file], lambda: "0" * 64) == "0" * 64
    (memo,) = (cache / "digests").iterdir()
    for payload in canaries.payloads(canary).values():
        memo.write_bytes(payload)
        assert memoised_digest([file], lambda: "1" * 64) == "1" * 64
    assert not canary.exists()


#: Inputs that once came out as something else.
FOUND = {
    "checksummed journal": [
        b'{"n":1,"record":{"ids":["a"],"kind":"train","op":"reserve"},"run":"r"} 0\n'
        b'{"n":2,"record":{"ids":["a"],"op":"settle","values":[{"loss":"0x1p99999"}]},"run":"r"} 0\n',
        b'{"n":1,"record":{"ids":' + b"[" * 5000 + b"]" * 5000 + b'},"run":"r"} 0\n',
        b'{"n":"a\\nb","record":{"ids":[],"kind":"train","op":"reserve"},"run":"r"} 0\n',
        b'{"n":1,"record":{"ids":[],"kind":"train","op":"reserve"},"run":"a\\nb"} 0\n',
        b'{"n":1,"record":{"ids":[],"kind":"a\\nb","op":"a\\nb"},"run":"r"} 0\n',
    ],
    "curve": [b"header\n1,a,0,,nan\n", b"header\n1,a,0,,1e999\n", b"header\n1,a,0,,5\n2,a,0,,-5\n"],
    "training checkpoint": [tensor_file("a", {}, {"weight": ("a\nb", [0])})],
    "frozen prompt": [
        save(
            {"prompt": np.full((1, 2, 32), 1e300), "head.weight": np.zeros((2, 32)), "head.bias": np.zeros(2)}
            | {"placeholders": np.arange(2)}
        )
    ],
    "sweep": [b'{"format":"a\\nb","experiment":{}}'],
    "head config": [
        b'{"backbone":"toy","backbone_digest":"a\\nb","hidden":2,"width":3,"tokens":4}',
        b'{"backbone":"toy","backbone_digest":"d","hidden":2,"width":1000000000000000000000000000000,"tokens":4}',
    ],
    "--set": [b"a\nb", b"x='\n'y", b"x=[\n1"],
    "prompt": [
        (78).to_bytes(8, "little")
        + b'{"point":{"dtype":"a\\nb","shape":[3,4],"data_offsets":[0,48]}}'.ljust(78)
        + bytes(48)
    ],
    "wire reply": [
        tensor_file("reply", {"call_id": "0" * 64, "cut": "0"}, {"logits": ("F32", VAST), "normalizer": ("F32", VAST)})
    ],
    "wire request": [
        tensor_file(
            "request",
            {"support": "candidates", "points": "1"},
            {"base": ("F32", [0, 4]), "layers": ("I64", [0]), "points": ("F32", VAST)},
        )
    ],
    "KServe description, JSON": [output({"data": []})],
    "KServe description, bytes": [
        len(text := output({"parameters": {"binary_data_size": 0}})).to_bytes(8, "little") + text
    ],
    "KServe reply, gRPC": [over_grpc(raw=True), over_grpc(raw=False)],
    "vLLM completion": [
        *(completion(index, "-0.5") for index in ("1e999", "-1e999", "NaN", "1" + "0" * 400)),
        *(completion("1", logprob) for logprob in ("1" + "0" * 400, "-1" + "0" * 400, "1e999", "NaN", "-1e999")),
    ],
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_found(name: str) -> None:
    target = fuzztargets.targets()[name]
    warnings.simplefilter("error")
    for data in FOUND[name]:
        assert fuzz.judged(target, data) == (name == "curve")


def test_a_mutant_of_a_mutant_may_be_nested_as_deep_as_it_likes() -> None:
    for depth in (100, 900, 985, 5_000):
        nested = b"[" * depth + b"]" * depth
        assert all(len(list(fuzztargets.mutants((nested,), 1, str(seed)))) == 3 for seed in range(20))


def test_a_mutant_of_nothing_but_braces_is_made() -> None:
    """Found at night: each eight bytes of it could be taken for the length of a header that begins behind them."""
    assert len(list(fuzztargets.mutants((b"{" * 20_000,), 20, "1"))) == 22
