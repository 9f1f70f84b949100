"""Prompts as rows before the text, which are no tokens: every family against its stock forward, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_prompt
import torch
from clients import EAGER, close_all, kept
from reference import PlainOracle, compare, points_of, prepended_states
from safetensors.numpy import load_file
from test_export import code_in
from test_verbalizer import CAUSAL, batch_for, language_models, load_tiny, masked_logits, points_for
from test_vllm import shares
from tiny_prompt import batch_of
from tiny_run import begin, go_on
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from vllmdouble import MODEL, Double

from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.completions import Completions
from bbprompt.backends.language import LocalLanguageModel
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.scale import facts_of
from bbprompt.backends.stock import StockOracle
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.virtual_tokens import front_of
from bbprompt.backends.vllm import VllmOracle
from bbprompt.config import TuneConfig
from bbprompt.errors import ArtifactError, OracleError, UsageError
from bbprompt.export import export_prompt
from bbprompt.oracle import ReadoutKind, Support, check_scores
from bbprompt.predict import load_prompt
from bbprompt.prompts import ModularPrompt, Pooling
from bbprompt.random_projection import random_prompt
from bbprompt.run import Prepared, Watcher, prepare
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.tasks.example import Form
from bbprompt.texts.cloze import word_tokens
from bbprompt.texts.mrc import NO_TOKEN

LENGTH = 3
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
STOCK = (*CAUSAL, "t5", "mt5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    t5 = {kind: tiny.t5_dir(root / kind, kind=kind) for kind in ("t5", "mt5")}
    return language_models(root) | t5


def prepended(backbone: Backbone, readout: ReadoutKind = "verbalizer", **changes: Any) -> ModularPrompt:
    subspace = ProjectionConfig(
        readout=readout, injection="prepend", layers="input", prompt_length=LENGTH, dim=4, scale=1.0, **changes
    )
    return random_prompt(subspace, facts_of(backbone), 3)


def with_head(backbone: Backbone) -> ModularPrompt:
    """A prepended prompt that a span head reads."""
    rows, head = prepended(backbone, "span"), tiny_prompt.artifact(Path(backbone.id), backbone.digest)
    return ModularPrompt(rows.config, rows.projection, rows.modules, rows.routers, head.head_weight, head.head_bias)


# ------------------------------------------------------------------------------------- as the stock models compute


def expected(backbone: Backbone, stock: Any, family: str, form: Form, prompt: np.ndarray) -> list[float]:
    """The logit of each option's word, the prompt `(P, H)` before all tokens of the text."""
    tokenizer, rows = backbone.tokenizer, torch.from_numpy(prompt)[None]
    tokenize = tokenize_with(tokenizer)
    words = [word_tokens(form.parts[-1].text, word, tokenize) for word in form.options]
    text = tokenize("".join(part.text for part in form.parts))[0]
    with torch.no_grad():
        if family in tiny.MASKED:
            gap = max(map(len, words))
            ids = [tokenizer.cls_token_id, *text, *[tokenizer.mask_token_id] * gap, tokenizer.sep_token_id]
            states = torch.from_numpy(prepended_states(stock.base_model, [ids], prompt)[0])
            logits = masked_logits(stock, states[None])[0]
            at = len(prompt) + 1 + len(text)
            return [float(np.mean([float(logits[at + j, token]) for j, token in enumerate(word)])) for word in words]
        if family.endswith("t5"):
            sentinel = tokenizer.get_vocab()["<extra_id_0>"]
            ids, told = [*text, sentinel, 1], torch.tensor([[0, sentinel]])
        else:
            ids, told = [tokenizer.cls_token_id, *text], None
        embeds = torch.cat([rows, stock.get_input_embeddings()(torch.tensor([ids]))], dim=1)
        found = stock(inputs_embeds=embeds, **({} if told is None else {"decoder_input_ids": told})).logits[0, -1]
        return [float(found[word[0]]) for word in words]


@pytest.mark.parametrize("family", [*tiny.MASKED, *STOCK])
def test_label_words_equal_the_stock_forward(family: str, folders: dict[str, Path]) -> None:
    backbone = (
        load_tiny(folders[family]) if family not in tiny.MASKED else load_backbone(str(folders[family]), head=True)
    )
    loader = AutoModelForMaskedLM if family in tiny.MASKED else AutoModelForCausalLM
    loader = AutoModelForSeq2SeqLM if family.endswith("t5") else loader
    stock: Any = loader.from_pretrained(folders[family], dtype=torch.float32).eval()
    prompt, batch = prepended(backbone), batch_for("pair")
    oracle = (LocalOracle if family in tiny.MASKED else StockOracle)(backbone, prompt, batch_tokens=64)
    points = points_for(prompt)
    scores = check_scores(oracle.score(batch, points), batch, 3, channels=1)
    for n, point in enumerate(points):
        logits = [
            value for form in batch.forms for value in expected(backbone, stock, family, form, prompt.prompts(point)[0])
        ]
        np.testing.assert_allclose(scores.logits[n, :, 0], logits, **CLOSE)
    assert np.abs(scores.logits[0] - scores.logits[1]).max() > 1e-3, "the prompt matters"
    bare = LocalLanguageModel(backbone).words(batch.forms)
    assert np.abs(scores.logits[0] - bare.logits[0]).max() > 1e-3, "rows of zeros are attended to"


@pytest.mark.parametrize("support", ["candidates", "sequence"])
@pytest.mark.parametrize("kind", ["pair", "single", "choice", "extract"])
def test_spans_equal_the_stock_forward(kind: str, support: Support, backbone: Backbone) -> None:
    prompt, batch = with_head(backbone), batch_of(kind)
    points, longest = points_of(prompt, 3), 3 if kind == "extract" else None
    scores = LocalOracle(backbone, prompt, batch_tokens=100).score(batch, points, support, longest)
    compare(scores, PlainOracle(backbone, prompt), batch, points, support)


def test_cpt(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny.cpt_dir(tmp_path, words=400, positions=96)))
    prompt, batch = with_head(backbone), batch_of("pair", 5)
    points = points_of(prompt, 2)
    scores = LocalOracle(backbone, prompt).score(batch, points)
    compare(scores, PlainOracle(backbone, prompt), batch, points, "candidates")


@pytest.mark.parametrize("pool_prompt", [False, True])
def test_its_rows_are_pooled_where_that_is_asked_for(pool_prompt: bool, backbone: Backbone) -> None:
    prompt = prepended(backbone, "prototype", pooling=Pooling(scale=7.0, prefix="问：", pool_prompt=pool_prompt))
    frame = frame_for(backbone.tokenizer, (), 128)
    batch, (point,) = batch_of("single", 4), points_of(prompt, 1)

    def embedding(text: str) -> np.ndarray:
        ids = [*frame.first, *tokenize_with(backbone.tokenizer)("问：" + text)[0], *frame.last]
        states = prepended_states(backbone.model, [ids], prompt.prompts(point)[0])[0]
        mean: np.ndarray = states[0 if pool_prompt else LENGTH :].astype(np.float64).mean(0)
        return mean / np.linalg.norm(mean)

    logits = [
        7.0 * float(embedding("".join(part.text for part in form.parts)) @ embedding(option))
        for form in batch.forms
        for option in form.options
    ]
    np.testing.assert_allclose(LocalOracle(backbone, prompt).score(batch, point[None]).logits[0, :, 0], logits, **CLOSE)


def test_tokens_count_the_rows(backbone: Backbone, folders: dict[str, Path]) -> None:
    batch = batch_of("pair", 5)
    written = PlainOracle(backbone, with_head(backbone)).encoded(batch)
    bare = [tokenize_with(backbone.tokenizer)("".join(part.text for part in form.parts))[0] for form in batch.forms]
    assert LocalOracle(backbone, with_head(backbone)).count_tokens(batch) == sum(len(item.ids) for item in written)
    assert all(len(item.ids) > LENGTH + 2 + len(text) for item, text in zip(written, bare, strict=True))
    gpt = load_tiny(folders["gpt2"])
    short, long = (StockOracle(gpt, prompt).count_tokens(batch_for("pair")) for prompt in (prepended(gpt), added(gpt)))
    assert short == long


def added(backbone: Backbone) -> ModularPrompt:
    subspace = ProjectionConfig(readout="verbalizer", layers="input", prompt_length=LENGTH, dim=4, scale=1.0)
    return random_prompt(subspace, facts_of(backbone), 3)


# ------------------------------------------------------------------------------------- savings that change nothing


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_candidates_together_equal_candidates_alone(family: str, folders: dict[str, Path]) -> None:
    backbone = load_tiny(folders[family]) if family != "bert" else load_backbone(str(folders[family]), head=True)
    prompt, batch = prepended(backbone), batch_for("single")
    make = LocalOracle if family == "bert" else StockOracle
    oracle, points = make(backbone, prompt), points_of(prompt, 5)
    together = oracle.score(batch, points)
    for n in range(5):
        alone = make(backbone, prompt, batch_tokens=60).score(batch, points[n : n + 1])
        np.testing.assert_allclose(together.logits[n], alone.logits[0], **CLOSE)


def test_deviations_are_those_of_the_prompt(backbone: Backbone) -> None:
    prompt, batch = with_head(backbone), batch_of("single")
    points = (points_of(prompt, 9) * 0.05).astype(np.float32)
    exact, mixed = (LocalOracle(backbone, prompt, dtype=dtype) for dtype in ("float32", "mixed"))
    right, found = exact.score(batch, points).logits, mixed._deviations(batch, points, "candidates", None).logits
    assert np.abs(found - right).max() < 0.1 * np.abs(right - right[:1]).max()


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("fault", ["scales", "takes none"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_that_reads_embeddings_otherwise(family: str, fault: str, folders: dict[str, Path]) -> None:
    backbone = load_tiny(folders[family])
    model: Any = backbone.model if family == "llama" else backbone.model.get_encoder()
    forward = model.forward

    def scales(input_ids: Any = None, inputs_embeds: Any = None, **more: Any) -> Any:
        return forward(
            input_ids=input_ids, inputs_embeds=None if inputs_embeds is None else inputs_embeds * 1.01, **more
        )

    def takes_none(input_ids: Any = None, **more: Any) -> Any:
        return forward(input_ids=input_ids, **more)

    model.forward = scales if fault == "scales" else takes_none
    with pytest.raises(ArtifactError, match=r"reads embeddings otherwise .* set projection\.injection=add"):
        StockOracle(backbone, prepended(backbone))
    StockOracle(backbone, added(backbone))


@pytest.mark.parametrize("make", [prepended, added])
def test_a_prompt_of_an_encoder_decoder_is_not_exported_as_rows(make: Any, folders: dict[str, Path]) -> None:
    backbone = load_tiny(folders["t5"])
    prompt = make(backbone)
    with pytest.raises(UsageError, match="no causal model: its prompt is its encoder's"):
        front_of(backbone, prompt, prompt.space.even())


# ------------------------------------------------------------------------------------------------ whole runs


def settings_for(folder: Path, data: Path, **changes: Any) -> TuneConfig:
    small = {"projection.dim": 6, "projection.prompt_length": LENGTH, "prompt.popsize": 4, "prompt.dev_every": 8}
    keys = {"task": str(data / "task.yaml"), "data": str(data), "method": "bbt", "backbone": str(folder), "budget": 40}
    keys |= {"threads": 1, "test_limit": 6, "baselines": False, "set": small | {"projection.injection": "prepend"}}
    return TuneConfig.model_validate(keys | changes)


class Death(Exception):
    """The end of a run that nothing foresaw."""


class Dies(Watcher):
    """Ends the run behind so many settled calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def status(self, status: Any) -> None:
        if status.calls >= self.calls:
            raise Death


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def whole(
    request: pytest.FixtureRequest,
    folders: dict[str, Path],
    tiny_pair_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Prepared, Path]:
    """A finished run: the model's family, what it was prepared as, its directory."""
    run, path = prepare(settings_for(folders[request.param], tiny_pair_data)), tmp_path_factory.mktemp("run") / "run"
    begin(run, path)
    return request.param, run, path


def test_a_run_that_died_ends_the_same(whole: tuple[str, Prepared, Path], tmp_path: Path) -> None:
    _, run, path = whole
    with pytest.raises(Death):
        begin(run, tmp_path / "run", Dies(9))
    assert not (tmp_path / "run" / "result.json").exists()
    result = go_on(run, tmp_path / "run")
    assert result.digest == json.loads((path / "result.json").read_text(encoding="utf-8"))["digest"]
    method = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["method"]
    assert method == run.method.model_dump(mode="json")
    assert method["projection"]["injection"] == "prepend"
    for name in ("prompt.safetensors", "journal.log"):
        assert (tmp_path / "run" / name).read_bytes() == (path / name).read_bytes()


def test_a_finished_run_at_work(whole: tuple[str, Prepared, Path]) -> None:
    _, run, path = whole
    tensors, batch = load_file(path / "prompt.safetensors"), batch_for("pair")
    assert tensors["placeholders"].tolist() == [NO_TOKEN] * LENGTH
    np.testing.assert_array_equal(tensors["prompt"], run.prompt.prompts(tensors["point"]))
    with load_prompt(path) as used:
        assert used.evaluate().value == json.loads((path / "result.json").read_text(encoding="utf-8"))["test"]["value"]
        oracle: Any = used._oracle
        found = oracle.score(batch, used.point[None]).logits
    np.testing.assert_allclose(found, run.oracle.score(batch, tensors["point"][None]).logits, **CLOSE)


def test_plain_tensors_are_applied_as_the_readme_says(
    whole: tuple[str, Prepared, Path], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _, path = whole
    out = tmp_path / "tensors"
    export_prompt(path, "safetensors", out)
    rows, facts = load_file(out / "prompt.safetensors"), json.loads((out / "bbprompt.json").read_text(encoding="utf-8"))
    assert (rows["placeholders"].tolist(), facts["prompt"]["injection"]) == ([NO_TOKEN] * LENGTH, "prepend")
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code_in(out / "README.md"), names)
    ids = torch.tensor([[2, 400, 401, 402, 3]])
    model = load_backbone(str(folders[family]), head=True).model
    with torch.no_grad():
        if family == "bert":
            found = names["encoder_states"](model, ids)
            expected = torch.from_numpy(prepended_states(model, ids.tolist(), rows["prompt"][0])[0])
        else:
            known = model.get_input_embeddings()(ids)
            expected = model(
                inputs_embeds=torch.cat([torch.from_numpy(rows["prompt"]), known], dim=1)
            ).last_hidden_state
            found = model(inputs_embeds=names["embeddings"](model, ids)).last_hidden_state
    assert float((found - expected).abs().max()) < 1e-5


# -------------------------------------------------------------------------------------------- behind a server


@pytest.mark.parametrize("family", CAUSAL)
def test_a_vllm_server_is_sent_the_same_rows(family: str, folders: dict[str, Path]) -> None:
    whole, part = (load_tiny(folders[family], layers) for layers in (None, 1))
    models = {name: AutoModelForCausalLM.from_pretrained(folders[name]).eval() for name in ("gpt2", "llama", family)}
    prompt, batch = prepended(whole), batch_for("pair")
    points = points_of(prompt, 3).astype(np.float32)

    def remote(model: Any) -> VllmOracle:
        server = Completions(f"vllm+http://test:80/{MODEL}", None, EAGER, 1, Double(model).transport())
        return kept(VllmOracle(server, part, prompt, policy=EAGER))

    try:
        there, here = remote(models[family]).score(batch, points), StockOracle(whole, prompt).score(batch, points)
        assert np.abs(shares(there, batch) - shares(here, batch)).max() < 1e-4
        # Other weights are noticed, although no row of the prompt is a token.
        with pytest.raises(OracleError, match="are not those of"):
            remote(models["llama" if family == "gpt2" else "gpt2"])
    finally:
        close_all()
