"""Prompt pre-training on raw text with label words: masked and causal models, and a T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_prompt
import torch
from test_pretrain_ppt import corpus, recipe, settings
from test_verbalizer import causal_dir

import bbprompt
from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.stock import StockOracle
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.errors import UsageError
from bbprompt.oracle import TextBatch
from bbprompt.pretrain.cloze import cloze_loss, collate_cloze, write_cloze
from bbprompt.pretrain.model import ModularPrompts, Phase
from bbprompt.pretrain.ppt_forms import span_task
from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.run import _frozen, pretrain
from bbprompt.prompts import ModularPrompt
from bbprompt.readout import Readout
from bbprompt.tasks.example import Example
from bbprompt.texts.forms import cloze_form
from bbprompt.texts.ppt import in_pattern

FAMILIES = ("bert", "gpt2", "t5")
pytestmark = pytest.mark.usefixtures("token_cache")


@pytest.fixture(scope="module")
def folders(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "bert": tiny_bert_dir,
        "gpt2": causal_dir(root / "gpt2", "gpt2"),
        "t5": tiny.t5_dir(root / "t5"),
    }


def silent(*_: Any) -> None:
    """Nothing is shown."""


def cloze_recipe(file: Path, backbone: Path, **changes: Any) -> PretrainConfig:
    """As in the tests of span readouts, with label words."""
    ppt = settings(file, formats=["choice", "pair"], terms="made up", hybrid=True).model_dump(mode="json")
    return recipe(file, backbone, readout="verbalizer", ppt=ppt, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_and_tune_loads_it(
    family: str, folders: dict[str, Path], tiny_pair_data: Path, tmp_path: Path
) -> None:
    depth = "all" if family == "bert" else "input"
    config = cloze_recipe(corpus(tmp_path / "corpus.txt", 80), folders[family], depth=depth)
    scores = pretrain(config, tmp_path / "out", None, silent)
    assert set(scores) == {"ppt-choice", "ppt-pair"}
    artifact = tmp_path / "out" / "artifact"
    prompt = ModularPrompt.load(artifact)
    assert prompt.config.readout == "verbalizer"
    assert prompt.head_weight.shape[0] == 0
    assert "label words are read by" in (artifact / "README.md").read_text(encoding="utf-8")
    result = bbprompt.tune(
        task=str(tiny_pair_data / "task.yaml"),
        data=str(tiny_pair_data),
        method="mp2-deep" if family == "bert" else "mp2-shallow",
        prompts=str(artifact),
        budget=30,
        threads=1,
        run_dir=str(tmp_path / "run"),
        set={"router": None, "prompt.popsize": 4},
    )
    assert result.test.n == 30
    assert result.prompts == str(artifact)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["choice", "pair", "single"])
def test_the_loss_is_that_of_tuning(form: Any, family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    backbone = load_backbone(str(folders[family]), head=True)
    assert backbone.head is not None
    causal = backbone.head.causal
    rng = np.random.default_rng(1)
    task = in_pattern(span_task(form, "zh"), "plain", causal=causal)
    texts = [tiny_prompt.words(rng, 3, 20) for _ in range(15)]
    examples = [
        Example({"text_a": a, "text_b": b, "query": a, "text": b}, (a, b, a + b)[: 2 + i % 2], i % 2, (), "")
        for i, (a, b) in enumerate(zip(texts[:7], texts[7:], strict=False))
    ]
    forms = [cloze_form(task, example) for example in examples]
    gold = [example.label for example in examples]

    artifact = prompt_for(family, folders[family], tmp_path)
    oracle = (LocalOracle if backbone.head.kind == "masked" else StockOracle)(backbone, artifact)
    batch = TextBatch(tuple(forms))
    point = np.asarray(artifact.modules).mean(1)[None].astype(np.float32)
    scores = oracle.score(batch, point)
    expected = Readout().losses(scores, batch, gold)[0]
    choices = Readout().choices(scores, batch)[0]

    frame = frame_for(backbone.tokenizer, artifact.config.placeholders, 100, open_end=causal)
    head = VerbalizerHead(
        backbone.head, backbone.gap_token, tokenize_with(backbone.tokenizer), frame, torch.device("cpu"), None
    )
    items = [write_cloze(each, head) for each in forms]
    prompts = ModularPrompts(
        1, 1, 1, 4, frame, backbone.hidden, 1.0, torch.Generator().manual_seed(0), routed=False, spans=False
    )
    with torch.no_grad():
        prompts.bank.copy_(torch.from_numpy(artifact.modules))
        prompts.projection.copy_(torch.from_numpy(artifact.projection))
    losses, right = cloze_loss(
        prompts,
        _frozen(backbone, torch.float32, "cpu"),
        backbone.head,
        collate_cloze(items, gold, [0] * len(items)),
        Phase(noise=False),
        torch.Generator(),
    )
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert right.tolist() == (choices == gold).astype(float).tolist()
    losses.mean().backward()
    assert prompts.bank.grad is not None
    assert float(prompts.bank.grad.abs().max()) > 0


def prompt_for(family: str, folder: Path, tmp_path: Path) -> ModularPrompt:
    """A prompt that matters, as a training would leave it."""
    config = cloze_recipe(corpus(tmp_path / "c.txt", 60), folder, steps=2, prompt_scale=1.0)
    pretrain(config, tmp_path / family, None, silent)
    return ModularPrompt.load(tmp_path / family / "artifact")


class KilledError(Exception):
    """Stands for the death of the process."""


@pytest.mark.parametrize("family", FAMILIES)
def test_it_goes_on_where_it_was_killed(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = cloze_recipe(corpus(tmp_path / "corpus.txt", 80), folders[family])
    pretrain(config, tmp_path / "whole", None, silent)

    def killer(progress: Any, steps: int) -> None:
        if progress.step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        pretrain(config, tmp_path / "out", None, killer)
    pretrain(config, tmp_path / "out", None, silent, resume=True)
    for name in ("checkpoint.safetensors", "artifact/model.safetensors", "artifact/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_words_that_begin_alike_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    file = corpus(tmp_path / "corpus.txt", 60)
    ppt = settings(file, options=[2, 16]).model_dump(mode="json")
    many = recipe(file, folders["gpt2"], readout="verbalizer", ppt=ppt)
    with pytest.raises(UsageError, match=r"'choice' has label words .* '十' and '十一' .* ppt\.options fewer"):
        pretrain(many, tmp_path / "out", None, silent)


def test_what_a_recipe_may_say(tmp_path: Path, folders: dict[str, Path]) -> None:
    file = corpus(tmp_path / "corpus.txt", 20)
    with pytest.raises(ValueError, match="'prototype' is not for kind ppt; write 'span' or 'verbalizer'"):
        recipe(file, folders["bert"], readout="prototype")
    with pytest.raises(ValueError, match="'verbalizer' is not for kind spot"):
        recipe(file, folders["bert"], kind="spot", ppt=None, readout="verbalizer")
    with pytest.raises(ValueError, match="hybrid: only the patterns"):
        recipe(file, folders["bert"], ppt=settings(file, hybrid=True).model_dump(mode="json"))
