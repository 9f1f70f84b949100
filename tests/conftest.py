"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import tiny_prompt

from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.prompts import ModularPrompt

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

# No test asks the Hugging Face hub, nor does a process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """One process runs a file, whose tests share what is slow to make, and one runs all files of Ray.

    Of Rays only one may be started at a time. A mark of xdist's would say so, but 3.8 does not see it with pytest 9.2.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ray" if Path(file).name.startswith("test_ray") else file

    return ByFile(config, log)


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


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path) -> Path:
    """Deep modular prompts for the tiny BERT: 3 layers, K = 3, d = 4, P = 2, two upstream tasks."""
    return tiny_prompt.artifact_dir(tmp_path_factory.mktemp("prompts") / "deep", tiny_bert_dir, "mp2-deep")


@pytest.fixture(scope="session")
def tiny_shallow_prompts(tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path) -> Path:
    """As tiny_prompts, at the input layer alone."""
    return tiny_prompt.artifact_dir(tmp_path_factory.mktemp("prompts") / "shallow", tiny_bert_dir, "mp2-shallow")


@pytest.fixture(scope="session")
def tiny_pair_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`task.yaml`, train, dev and test of a pair task; labels and fields also fit the bundled task lcqmc."""
    make = tiny_prompt.pair_records
    splits = {"train": make(90, 1), "dev": make(40, 2), "test": make(30, 3)}
    return tiny_prompt.data_dir(tmp_path_factory.mktemp("data") / "lcqmc", tiny_prompt.PAIR, splits)


@pytest.fixture(scope="session")
def tiny_single_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`task.yaml` and splits of a task of single texts with seven labels."""
    make = tiny_prompt.single_records
    splits = {"train": make(140, 1), "dev": make(35, 2), "test": make(30, 3)}
    return tiny_prompt.data_dir(tmp_path_factory.mktemp("data") / "tiny-single", tiny_prompt.SINGLE, splits)


@pytest.fixture(scope="session")
def tiny_choice_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`task.yaml` and splits of a task whose examples have two to four options of their own."""
    make = tiny_prompt.choice_records
    splits = {"train": make(80, 1), "dev": make(30, 2), "test": make(30, 3)}
    return tiny_prompt.data_dir(tmp_path_factory.mktemp("data") / "tiny-choice", tiny_prompt.CHOICE, splits)


@pytest.fixture(scope="session")
def tiny_extract_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`task.yaml` and splits of an extraction task."""
    make = tiny_prompt.extract_records
    splits = {"train": make(80, 1), "dev": make(30, 2), "test": make(30, 3)}
    return tiny_prompt.data_dir(tmp_path_factory.mktemp("data") / "tiny-extract", tiny_prompt.EXTRACT, splits)


@pytest.fixture(scope="module")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for the tests of a module that pre-train."""
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BBPROMPT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def backbone(tiny_bert_dir: Path) -> Backbone:
    """The tiny BERT, loaded."""
    return load_backbone(str(tiny_bert_dir))


@pytest.fixture(scope="session")
def deep(backbone: Backbone) -> ModularPrompt:
    """Prompts before every layer of it."""
    return tiny_prompt.artifact(Path(backbone.id), backbone.digest)
