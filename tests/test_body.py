"""Encoder-decoders of the T5 family: our forward against the stock one, and prompts where the formula puts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_prompt
import torch
from safetensors.numpy import load_file, save_file
from test_verbalizer import GapOracle, points_for
from transformers import AutoModelForSeq2SeqLM

from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.language import LocalLanguageModel
from bbprompt.backends.scale import facts_of, measure
from bbprompt.backends.stock import StockOracle
from bbprompt.backends.tokens import tokenize_with
from bbprompt.config import TuneConfig
from bbprompt.errors import ArtifactError, DataError, UsageError
from bbprompt.oracle import Oracle, TextBatch, check_scores
from bbprompt.predict import load_prompt
from bbprompt.prompts import ModularPrompt
from bbprompt.random_projection import clipped_std, random_prompt
from bbprompt.run import prepare, tune
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.store.rundir import RunDirectory
from bbprompt.tasks.task import Task
from bbprompt.testing import OracleContract
from bbprompt.texts.cloze import word_tokens
from bbprompt.texts.forms import cloze_form

FAMILIES = {"t5": {}, "t5-unscaled": {"scaled": False}, "mt5": {"kind": "mt5"}}
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
LENGTH, FIRST = 2, 300


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("t5")
    return {name: tiny.t5_dir(root / name, **settings) for name, settings in FAMILIES.items()}


def open_tiny(folder: Path, layers: Any, **settings: Any) -> tuple[StockOracle, ModularPrompt, Backbone]:
    backbone = load_backbone(str(folder), head=True)
    subspace = ProjectionConfig(
        readout="verbalizer", layers=layers, prompt_length=LENGTH, dim=4, scale=1.0, placeholder=FIRST
    )
    prompt = random_prompt(subspace, facts_of(backbone), 3)
    return StockOracle(backbone, prompt, **settings), prompt, backbone


def batch() -> TextBatch:
    """Texts of different length with a gap in the middle; one option word has three characters."""
    task = Task.model_validate(tiny_prompt.SINGLE | {"cloze": "{text}很{gap}，是吗。"})
    return TextBatch(
        tuple(cloze_form(task, task.example(record)) for record in tiny_prompt.single_records(5, 5)),
    )


def written(backbone: Backbone, form: Any, placeholders: bool = True) -> list[int]:
    """The text with the sentinel in its gap, as the encoder reads it."""
    tokenize = tokenize_with(backbone.tokenizer)
    front = list(range(FIRST, FIRST + LENGTH)) if placeholders else []
    before = tokenize("".join(part.text for part in form.parts[: form.gap]))[0]
    behind = tokenize("".join(part.text for part in form.parts[form.gap :]))[0]
    sentinel = backbone.tokenizer.get_vocab()["<extra_id_0>"]
    return [*front, *before, sentinel, *behind, 1]


def stock_logits(model: Any, backbone: Backbone, **inputs: torch.Tensor) -> np.ndarray:
    """What the stock model says behind the sentinel."""
    told = torch.tensor([[0, backbone.tokenizer.get_vocab()["<extra_id_0>"]]])
    with torch.no_grad():
        found: np.ndarray = model(**inputs, decoder_input_ids=told).logits[0, -1].numpy()
    return found


def deep_logits(model: Any, backbone: Backbone, ids: list[int], prompts: torch.Tensor) -> np.ndarray:
    """The same with prompts `(L, P, H)` added before the encoder's blocks, block by block without our code."""
    with torch.no_grad():
        states, bias = model.get_input_embeddings()(torch.tensor([ids])), None
        for layer, block in enumerate(model.encoder.block):
            if layer < len(prompts):
                states[:, :LENGTH] += prompts[layer]
            states, bias = block(states, None, bias)[:2]
        read = model.encoder.final_layer_norm(states)
    return stock_logits(model, backbone, encoder_outputs=(read,))


def stock(folder: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("layers", ["input", "all"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_scores_equal_the_stock_forward(family: str, layers: str, folders: dict[str, Path]) -> None:
    oracle, prompt, backbone = open_tiny(folders[family], layers, batch_tokens=40)
    model, texts, points = stock(folders[family]), batch(), points_for(prompt)
    scores = check_scores(oracle.score(texts, points), texts, 3, channels=1)
    assert backbone.head is not None
    assert (backbone.head.kind, backbone.layers, backbone.max_positions) == ("sentinel", tiny.LAYERS, 512)
    tokenize = tokenize_with(backbone.tokenizer)
    for number, form in enumerate(texts.forms):
        before = form.parts[form.gap - 1].text
        words = [word_tokens(before, option, tokenize)[0] for option in form.options]
        ids = written(backbone, form)
        for n, point in enumerate(points):
            rows = torch.from_numpy(prompt.prompts(point))
            if n == 0:  # the zero prompt: nothing but the placeholders
                logits = stock_logits(model, backbone, input_ids=torch.tensor([ids]))
            elif layers == "input":
                embedded = model.get_input_embeddings()(torch.tensor([ids])).detach().clone()
                embedded[0, :LENGTH] += rows[0]
                logits = stock_logits(model, backbone, inputs_embeds=embedded)
            else:
                logits = deep_logits(model, backbone, ids, rows)
            found = scores.logits[n, 7 * number : 7 * number + 7, 0]
            np.testing.assert_allclose(found, logits[words], **CLOSE)
    assert np.abs(scores.logits[0] - scores.logits[1]).max() > 1e-3, "the prompt matters"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_without_a_prompt_it_is_the_stock_model(family: str, folders: dict[str, Path]) -> None:
    backbone, texts = load_backbone(str(folders[family]), head=True), batch()
    asked, model = LocalLanguageModel(backbone, batch_tokens=40), stock(folders[family])
    scores, whole = asked.words(texts.forms), asked.vocabulary(texts.forms)
    tokenize = tokenize_with(backbone.tokenizer)
    assert not asked.causal
    for number, form in enumerate(texts.forms):
        ids = written(backbone, form, placeholders=False)
        logits = stock_logits(model, backbone, input_ids=torch.tensor([ids]))
        before = form.parts[form.gap - 1].text
        words = [word_tokens(before, option, tokenize)[0] for option in form.options]
        np.testing.assert_allclose(scores.logits[0, 7 * number : 7 * number + 7, 0], logits[words], **CLOSE)
        np.testing.assert_allclose(whole.logs[number], logits - np.log(np.exp(logits).sum()), **CLOSE)
    with pytest.raises(UsageError, match="continues no text"):
        asked.demonstrate([(texts.forms[0], 0)])


def test_states_of_its_encoder_scale_a_projection(folders: dict[str, Path]) -> None:
    backbone, forms = load_backbone(str(folders["t5"]), head=True), batch().forms
    facts = measure(backbone, forms, LENGTH)
    model, entering = stock(folders["t5"]), np.zeros(0)

    def note(module: Any, args: Any) -> None:
        nonlocal entering
        entering = np.concatenate([entering, args[0].numpy().ravel()])

    model.encoder.block[1].register_forward_pre_hook(note)
    for form in forms:
        placeholders = torch.tensor([[1000, 1001, *written(backbone, form, placeholders=False)]])
        stock_logits(model, backbone, input_ids=placeholders)
    assert len(facts.stds) == tiny.LAYERS
    assert facts.stds[1] == pytest.approx(clipped_std(entering), rel=1e-4)


def test_words_that_begin_alike_are_refused(folders: dict[str, Path]) -> None:
    asked = LocalLanguageModel(load_backbone(str(folders["t5"]), head=True))
    task = Task.model_validate(tiny_prompt.SINGLE | {"labels": {"a": "金融", "b": "金色"}})
    with pytest.raises(DataError, match="begin with the same token"):
        asked.words([cloze_form(task, task.example({"text": "天", "label": "a"}))])


def test_a_tokenizer_without_a_sentinel_is_refused(folders: dict[str, Path], tiny_bert_dir: Path) -> None:
    backbone = load_backbone(str(folders["t5"]), head=True)
    other = load_backbone(str(tiny_bert_dir)).tokenizer
    bare = Backbone(backbone.id, backbone.model, other, backbone.digest, 0, "directory", backbone.head)
    with pytest.raises(ArtifactError, match="no token for a gap"):
        LocalLanguageModel(bare)


def test_a_missing_output_matrix_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["t5"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="no language model head"):
        load_backbone(str(tmp_path), head=True)


@pytest.mark.parametrize("method", ["bbt", "bbtv2", "zero-shot-lm", "promptboosting"])
def test_methods_run_on_it(method: str, folders: dict[str, Path], tiny_pair_data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    if method.startswith("bbt"):
        changes = {"projection.dim": 6, "projection.prompt_length": 3, "prompt.popsize": 4, "prompt.dev_every": 8}
    keys = {"data": str(tiny_pair_data), "method": method, "budget": 40, "threads": 1, "set": changes}
    task = str(tiny_pair_data / "task.yaml")
    run = prepare(TuneConfig.model_validate(keys | {"task": task, "backbone": str(folders["t5"])}))
    with RunDirectory.create(tmp_path / "run", run.manifest()) as directory:
        result = tune(run, directory)
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


class TestContract(OracleContract):
    """The shared oracle tests on a T5."""

    @pytest.fixture(autouse=True)
    def _folder(self, folders: dict[str, Path]) -> None:
        self.folder = folders["t5"]

    def make(self) -> Oracle:
        return GapOracle(open_tiny(self.folder, "all")[0])
