"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 3 layers, 32 hidden units, 4 heads, 128 positions; Chinese text is one token a character."""
    return tiny.bert_dir(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture(scope="session")
def tiny_roberta_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_bert_dir, but a RoBERTa with 64 positions."""
    return tiny.roberta_dir(tmp_path_factory.mktemp("tiny") / "roberta")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("BBPROMPT_CACHE", str(folder))
    return folder
