"""YAML files are read strictly, and every refusal names file and line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from bbprompt import yamlfile
from bbprompt.errors import UsageError
from bbprompt.yamlfile import read_yaml, validate


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    sigma: float = 1.0


class Outer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    budget: int
    stage: Inner = Inner()


def write(folder: Path, content: str | bytes) -> Path:
    file = folder / "a.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1e-3", 1e-3),
        ("1.5E+2", 150.0),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("-12", -12),
        ("0", 0),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("'1'", "1"),
        ('"矛盾"', "矛盾"),
        ("[1, 2.0]", [1, 2.0]),
    ],
)
def test_scalars_follow_the_core_schema(tmp_path: Path, scalar: str, value: object) -> None:
    got = read_yaml(write(tmp_path, f"key: {scalar}\n"))["key"]
    assert got == value
    assert type(got) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    file = write(tmp_path_factory.getbasetemp(), f"key: {value!r}\n")
    assert read_yaml(file)["key"] == value


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' stands twice"),
        ("a: {b: 1,\n b: 2}\n", 2, "'b' stands twice"),
        ("a: &x 1\nb: 2\n", 1, "anchors and aliases"),
        ("a: 1\nb: *x\n", 2, "anchors and aliases"),
        ("a: 1\n0: 2\n", 2, "not a string"),
        ("a: 1\n? [x]\n: 2\n", 2, "not a string"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "could not determine a constructor"),
        ("a: 1\nb: 'open\n", 3, "end of stream"),
        ("a: 1\n b: 2\n", 2, "not allowed"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("a: 1\nb: \x01\n", 2, "U+0001"),
        ("- 1\n", 1, "holds a list"),
        ("", 1, "is empty"),
        ("a: 1\nb: " + "[" * 60 + "]" * 60 + "\n", 2, "nested deeper"),
        (b"a: 1\nb: \xd6\xd0\n", 2, "not UTF-8 at byte 8"),
    ],
)
def test_refusals_name_the_line(tmp_path: Path, content: str | bytes, line: int, words: str) -> None:
    file = write(tmp_path, content)
    with pytest.raises(UsageError) as caught:
        read_yaml(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}: ")
    assert words in message
    assert "\n" not in message


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, b"\xef\xbb\xbfa: 1\n")) == {"a": 1}


def test_a_long_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        read_yaml(write(tmp_path, "#" * (yamlfile.MAX_BYTES + 1)))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        read_yaml(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no such file"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml("a\0b")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"budget": 1, "stag": {}}, "unknown key 'stag'; did you mean 'stage'?"),
        ({"budget": 1, "stage": {"sigm": 2}}, "unknown key 'stage.sigm'; did you mean 'sigma'?"),
        ({"budget": 1, "zzz": 0}, "unknown key 'zzz'; known are budget, stage"),
        ({}, "the key 'budget' is missing"),
        ({"budget": "many"}, "budget: input should be a valid integer"),
        ({"stage": {"sigma": []}}, "(and 1 more)"),
        ([], "valid dictionary"),
    ],
)
def test_validate_names_the_key(data: object, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(Outer, data, "a.yaml")
    assert str(caught.value).startswith("a.yaml: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_validate_returns_the_model() -> None:
    assert validate(Outer, {"budget": 3, "stage": {"sigma": 0.5}}, "x") == Outer(budget=3, stage=Inner(sigma=0.5))
