"""Pooled states of the local encoder: those of the stock model, one text at a time or many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bbprompt.backends import memory
from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.embedding import LocalEmbedder, marker_for
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import Layout
from bbprompt.backends.local import LocalOracle
from bbprompt.connect import open_embedder
from bbprompt.embedding import can_embed
from bbprompt.errors import OracleError
from bbprompt.prompts import ModularPrompt
from bbprompt.testing import ToyOracle

TEXTS = ["今天天气", "好", "一二三四五六七八九十", "今天天气"]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_they_are_those_of_the_stock_model(kind: str, request: pytest.FixtureRequest) -> None:
    backbone = load_backbone(str(request.getfixturevalue(f"tiny_{kind}_dir")))
    found = LocalEmbedder(backbone, batch_tokens=20).embed(TEXTS)
    assert found.vectors.shape == (4, 32)
    assert found.vectors.dtype == np.float32
    assert found.cut == 0
    for text, vector in zip(TEXTS, found.vectors, strict=True):
        with torch.inference_mode():
            states = backbone.model(**backbone.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=2e-6)


def test_long_texts_are_cut_and_counted(tiny_bert_dir: Path) -> None:
    embedder = LocalEmbedder(load_backbone(str(tiny_bert_dir)), max_tokens=8)
    found = embedder.embed(["一二三四五六七八九十", "一二三四五六"])
    assert found.cut == 4
    np.testing.assert_allclose(found.vectors[0], found.vectors[1], atol=1e-6)
    assert embedder.info.max_tokens == 8
    embedder.close()


def test_the_local_oracle_embeds_too(tiny_bert_dir: Path, tiny_prompts: Path) -> None:
    backbone = load_backbone(str(tiny_bert_dir))
    oracle = LocalOracle(backbone, ModularPrompt.load(tiny_prompts))
    np.testing.assert_array_equal(oracle.embed(TEXTS).vectors, LocalEmbedder(backbone).embed(TEXTS).vectors)
    assert can_embed(oracle)
    assert not can_embed(ToyOracle())


@pytest.mark.parametrize(
    ("name", "marker"),
    [
        ("intfloat/multilingual-e5-small", "query: "),
        ("/models/e5-base-v2", "query: "),
        ("bert-base-chinese", ""),
        ("/models/abe5d", ""),
    ],
)
def test_the_marker_of_a_family(name: str, marker: str) -> None:
    assert marker_for(name) == marker


@pytest.mark.parametrize("oracle", [False, True])
def test_memory_that_runs_out_halves_the_batch_for_good(
    oracle: bool, backbone: Backbone, deep: ModularPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = TEXTS * 30
    whole, asked = LocalEmbedder(backbone).embed(texts).vectors, [0]
    model = LocalOracle(backbone, deep) if oracle else LocalEmbedder(backbone)
    plain = Encoder.last_states

    def last_states(self: Encoder, some: list[tuple[int, ...]], layout: Layout) -> torch.Tensor:
        asked.append(sum(map(len, some)))
        if asked[-1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, some, layout)

    monkeypatch.setattr(Encoder, "last_states", last_states)
    np.testing.assert_allclose(model.embed(texts).vectors, whole, atol=1e-5)
    assert max(asked) > 300
    asked.clear()
    model.embed(texts)
    assert max(asked) <= 300, "it must remember"
    monkeypatch.setattr(memory, "_LEAST_TOKENS", 256)
    monkeypatch.setattr(Encoder, "last_states", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(OracleError, match="does not fit into memory with 256 tokens"):
        model.embed(texts)


@pytest.mark.parametrize(("free", "tokens"), [(1 << 40, 4096), (1 << 20, 64)])
def test_tokens_at_once_follow_free_memory(
    free: int, tokens: int, tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    opened = open_embedder("local", backbone=str(tiny_bert_dir), device="cpu", threads=torch.get_num_threads())
    assert opened.info.batch_tokens == tokens
