"""A language model that is asked without prompt vectors, against the stock forward with its whole output layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_prompt
import torch
from test_verbalizer import CAUSAL, batch_for, language_models, load_tiny
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.body import CausalBody
from bbprompt.backends.language import LocalLanguageModel
from bbprompt.backends.tokens import tokenize_with
from bbprompt.embedding import can_embed
from bbprompt.errors import ArtifactError, DataError, OracleError, UsageError
from bbprompt.language import LanguageModel, can_fill
from bbprompt.tasks.example import Form, Part
from bbprompt.tasks.task import Task
from bbprompt.texts.forms import cloze_form
from bbprompt.texts.mrc import Encoded, Frame

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return language_models(tmp_path_factory.mktemp("models"))


def stock_logits(folder: Path, ids: list[int], causal: bool) -> np.ndarray:
    loader = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model: Any = loader.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: np.ndarray = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return found


def text_of(form: Form) -> str:
    return "".join(part.text for part in form.parts)


@pytest.mark.parametrize("family", [*tiny.MASKED, *CAUSAL])
def test_it_equals_the_stock_forward(family: str, folders: dict[str, Path]) -> None:
    folder = folders[family]
    backbone = load_tiny(folder)
    model = LocalLanguageModel(backbone, batch_tokens=64)
    assert can_fill(model)
    assert not can_embed(model)
    causal = family in CAUSAL
    assert model.causal == causal
    tokenize, tokenizer = tokenize_with(backbone.tokenizer), backbone.tokenizer
    forms = batch_for("single").forms
    scores, whole = model.words(forms), model.vocabulary(forms)
    some = model.vocabulary(forms, [7, 3])
    assert scores.logits.shape == (1, 7 * len(forms), 1)
    np.testing.assert_array_equal(some.logs, whole.logs[:, [7, 3]])
    np.testing.assert_allclose(np.exp(whole.logs.astype(np.float64)).sum(axis=1), 1.0, rtol=1e-5)
    for number, form in enumerate(forms):
        words = [tokenize(option)[0] for option in form.options]
        front = [tokenizer.cls_token_id, *tokenize(text_of(form))[0]]
        at = len(front)
        if causal:
            logits = stock_logits(folder, front, causal)
            expected = [logits[-1, word[0]] for word in words]
            gap = logits[-1]
        else:
            mask, last = tokenizer.mask_token_id, tokenizer.sep_token_id
            wide = stock_logits(folder, [*front, *[mask] * max(map(len, words)), last], causal)
            expected = [np.mean([wide[at + i, token] for i, token in enumerate(word)]) for word in words]
            gap = stock_logits(folder, [*front, mask, last], causal)[at]
        np.testing.assert_allclose(scores.logits[0, 7 * number : 7 * number + 7, 0], expected, **CLOSE)
        np.testing.assert_allclose(whole.logs[number], gap - np.log(np.exp(gap).sum()), **CLOSE)


@pytest.mark.parametrize("family", CAUSAL)
def test_demonstrations_stand_in_front(family: str, folders: dict[str, Path]) -> None:
    folder = folders[family]
    backbone = load_tiny(folder)
    task = Task.model_validate(tiny_prompt.SINGLE | {"cloze": "{text}很{gap}。"})
    examples = [task.example(record) for record in tiny_prompt.single_records(9, 5)]
    forms = [cloze_form(task, example) for example in examples]
    tokenize, first = tokenize_with(backbone.tokenizer), backbone.tokenizer.cls_token_id
    model: LanguageModel = LocalLanguageModel(backbone, batch_tokens=128)
    shown = [(form, example.label) for form, example in zip(forms[:3], examples[:3], strict=True)]
    demonstrations = model.demonstrate(shown)
    written = [tokenize(text_of(form).replace("很。", f"很{form.options[right]}。"))[0] for form, right in shown]
    assert list(demonstrations.ids) == [token for ids in written for token in ids]
    scores = model.words(forms[3:], demonstrations.ids)
    for number, form in enumerate(forms[3:]):
        text = tokenize(text_of(form).removesuffix("。"))[0]
        logits = stock_logits(folder, [first, *demonstrations.ids, *text], causal=True)[-1]
        expected = [logits[tokenize(option)[0][0]] for option in form.options]
        np.testing.assert_allclose(scores.logits[0, 7 * number : 7 * number + 7, 0], expected, **CLOSE)
    bare = model.words(forms[3:])
    np.testing.assert_allclose(bare.logits, LocalLanguageModel(backbone).words(forms[3:]).logits, **CLOSE)
    assert np.abs(bare.logits - scores.logits).max() > 0.1
    logits = stock_logits(folder, [first, *demonstrations.ids], causal=True)
    recalled = model.recall(shown, demonstrations).logits[0, :, 0]
    for number, ((form, _), gap) in enumerate(zip(shown, demonstrations.gaps, strict=True)):
        expected = [logits[gap, tokenize(option)[0][0]] for option in form.options]
        np.testing.assert_allclose(recalled[7 * number : 7 * number + 7], expected, **CLOSE)


def test_half_of_the_length_is_for_demonstrations(folders: dict[str, Path]) -> None:
    backbone = load_tiny(folders["llama"])
    form = Form(batch_for("single").forms[0].parts, ("好", "坏"), -1, gap=2)
    size = len(LocalLanguageModel(backbone).demonstrate([(form, 0)]).ids)
    for limit, count in ((2 * size, 0), (2 * size + 1, 1), (4 * size, 1), (4 * size + 1, 2)):
        model = LocalLanguageModel(backbone, max_tokens=limit)
        found = model.demonstrate([(form, 0), (form, 1), (form, 0)])
        assert (len(found.gaps), len(found.ids)) == (count, count * size), "the first token is not theirs"
    crowded = [replace(form, parts=(Part("长" * 40, cut=False),), gap=1)]
    with pytest.raises(DataError, match="question and options alone take"):
        LocalLanguageModel(backbone, max_tokens=4).words(crowded, found.ids)


def test_masked_models_continue_nothing(folders: dict[str, Path]) -> None:
    model = LocalLanguageModel(load_backbone(str(folders["bert"]), head=True))
    form = batch_for("single").forms[0]
    with pytest.raises(UsageError, match="continues no text"):
        model.demonstrate([(form, 0)])
    with pytest.raises(ArtifactError, match="without its language model head"):
        LocalLanguageModel(load_backbone(str(folders["bert"])))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_memory_that_runs_out_halves_the_batch_for_good(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, forms = load_backbone(str(folders[family]), head=True), batch_for("single").forms * 4
    whole = LocalLanguageModel(backbone)
    words, logs = whole.words(forms).logits, whole.vocabulary(forms).logs
    model, asked = LocalLanguageModel(backbone), [0]
    plain = model._body.states

    def states(sequences: Sequence[Encoded], frame: Frame) -> torch.Tensor:
        asked.append(len(sequences) * max(len(item.ids) for item in sequences))
        if asked[-1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(sequences, frame)

    monkeypatch.setattr(model._body, "states", states)
    np.testing.assert_allclose(model.words(forms).logits, words, **CLOSE)
    assert max(asked) > 100
    asked.clear()
    np.testing.assert_allclose(model.vocabulary(forms).logs, logs, **CLOSE)
    assert max(asked) <= 100, "it must remember"


@pytest.mark.parametrize("method", ["words", "vocabulary", "recall"])
def test_memory_that_never_suffices(method: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = LocalLanguageModel(load_tiny(folders["llama"])), batch_for("single").forms[0]

    def fail(*_: Any) -> None:
        raise MemoryError

    shown = [(form, 0)]
    demonstrations = model.demonstrate([(replace(form, gap=len(form.parts)), 0)])
    monkeypatch.setattr(CausalBody, "run", fail)
    with pytest.raises(OracleError, match="does not fit into memory with 64 tokens"):
        model.recall(shown, demonstrations) if method == "recall" else getattr(model, method)([form])
