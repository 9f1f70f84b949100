"""Verbalizers: masked and causal language models against the stock forward with its whole output layer."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny
import tiny_prompt
import torch
from reference import counted_texts, plain_states
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.scale import facts_of
from bbprompt.backends.stock import StockOracle
from bbprompt.backends.tokens import tokenize_with
from bbprompt.errors import ArtifactError, DataError
from bbprompt.oracle import Oracle, TextBatch, check_scores
from bbprompt.prompts import ModularPrompt
from bbprompt.random_projection import random_prompt
from bbprompt.scoring import labelled
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.tasks.task import Task
from bbprompt.testing import OracleContract
from bbprompt.texts.cloze import word_tokens
from bbprompt.texts.forms import write

CAUSAL = ("gpt2", "llama", "qwen2")
KINDS = {
    "pair": (tiny_prompt.PAIR, tiny_prompt.pair_records),
    "single": (tiny_prompt.SINGLE, tiny_prompt.single_records),
    "choice": (tiny_prompt.CHOICE, tiny_prompt.choice_records),
}


def causal_dir(folder: Path, family: str, **changes: Any) -> Path:
    """Write a tiny causal language model of a family, with BERT's character vocabulary and no special tokens.

    `changes` are those of the sizes.
    """
    folder.mkdir(parents=True)
    vocabulary = tiny.write_bert_vocabulary(folder / "vocab.txt")
    sizes: dict[str, Any] = {"vocab_size": len(vocabulary), "initializer_range": 0.3}
    rotary = {
        "hidden_size": tiny.HIDDEN,
        "num_hidden_layers": tiny.LAYERS,
        "num_attention_heads": tiny.HEADS,
        "num_key_value_heads": 2,
        "intermediate_size": tiny.FFN,
        "max_position_embeddings": 128,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "gpt2":
            sizes |= {"n_embd": tiny.HIDDEN, "n_layer": tiny.LAYERS, "n_head": tiny.HEADS, "n_positions": 128}
            model: Any = GPT2LMHeadModel(GPT2Config(**sizes))
        elif family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**(sizes | rotary | changes)))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**sizes, **rotary))
        model.save_pretrained(folder)
    characters = BertTokenizer(vocab=str(folder / "vocab.txt"))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=characters.backend_tokenizer, **names).save_pretrained(folder)
    return folder


def language_models(root: Path) -> dict[str, Path]:
    """Write a tiny masked or causal language model of every family."""
    masked = {family: tiny.masked_dir(root / family, family, positions=128) for family in tiny.MASKED}
    return masked | {family: causal_dir(root / family, family) for family in CAUSAL}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return language_models(tmp_path_factory.mktemp("models"))


def load_tiny(folder: Path, layers: int | None = None) -> Backbone:
    """Load a tiny model; for some model types transformers puts another tokenizer in the place of the saved one."""
    backbone = load_backbone(str(folder), head=True, layers=layers)
    if not (folder / "vocab.txt").is_file():
        return backbone
    return replace(backbone, tokenizer=BertTokenizer(vocab=str(folder / "vocab.txt")))


def open_tiny(folder: Path, depth: str = "deep", **settings: Any) -> tuple[Oracle, ModularPrompt]:
    backbone = load_tiny(folder)
    layers: Literal["input", "all"] = "all" if depth == "deep" else "input"
    subspace = ProjectionConfig(readout="verbalizer", layers=layers, prompt_length=2, dim=4, scale=1.0, placeholder=300)
    prompt = random_prompt(subspace, facts_of(backbone), 3)
    assert backbone.head is not None
    return (LocalOracle if backbone.head.kind == "masked" else StockOracle)(backbone, prompt, **settings), prompt


def batch_for(kind: str) -> TextBatch:
    task = Task.model_validate(KINDS[kind][0])
    return labelled(task, [task.example(r) for r in KINDS[kind][1](7, 5)], for_loss=True, readout="verbalizer").batch


def points_for(prompt: ModularPrompt) -> np.ndarray:
    points = np.random.default_rng(0).normal(size=(3, *prompt.space.shape)).astype(np.float32)
    points[0] = 0.0
    return points


def masked_logits(stock: Any, states: torch.Tensor) -> torch.Tensor:
    """What the stock head says of last states."""
    if stock.config.model_type == "electra":
        return stock.generator_lm_head(stock.generator_predictions(states))
    return (stock.cls if hasattr(stock, "cls") else stock.lm_head)(states)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("family", tiny.MASKED)
def test_masked_models_equal_the_stock_forward(family: str, kind: str, depth: str, folders: dict[str, Path]) -> None:
    oracle, prompt = open_tiny(folders[family], depth, batch_tokens=64)
    backbone = load_backbone(str(folders[family]), head=True)
    stock: Any = AutoModelForMaskedLM.from_pretrained(folders[family], dtype=torch.float32).eval()
    tokenize, first = tokenize_with(backbone.tokenizer), backbone.tokenizer.cls_token_id
    batch, points = batch_for(kind), points_for(prompt)
    scores = check_scores(oracle.score(batch, points), batch, 3, channels=1)
    option = 0
    for form in batch.forms:
        words = [tokenize(word)[0] for word in form.options]
        gap = max(map(len, words))
        ids = [first, 300, 301, *tokenize("".join(p.text for p in form.parts))[0]]
        at = len(ids)
        ids += [backbone.tokenizer.mask_token_id] * gap + [backbone.tokenizer.sep_token_id]
        logits = []
        for n, point in enumerate(points):
            with torch.no_grad():
                if n == 0:
                    logits.append(stock(input_ids=torch.tensor([ids])).logits[0])
                else:
                    states = torch.from_numpy(plain_states(stock.base_model, [ids], prompt.prompts(point))[0])
                    logits.append(masked_logits(stock, states[None])[0])
        for word in words:
            for n in range(3):
                expected = np.mean([float(logits[n][at + j, token]) for j, token in enumerate(word)])
                assert scores.logits[n, option, 0] == pytest.approx(expected, abs=1e-5)
            option += 1


def injected_logits(stock: Any, ids: list[int], prompt: ModularPrompt, point: np.ndarray) -> torch.Tensor:
    """Logits of a causal model by the formula of BBTv2: before block l, `h + z_l A_l` at the two placeholders."""
    body = stock.base_model
    states, order = body.get_input_embeddings()(torch.tensor([ids])), torch.arange(len(ids))[None]
    if stock.config.model_type == "gpt2":
        blocks, norm, more = body.h, body.ln_f, {}
        states = states + body.wpe(order)
    else:
        blocks, norm, more = body.layers, body.norm, {"position_embeddings": body.rotary_emb(states, order)}
    for layer, block in enumerate(blocks):
        if layer < len(point):
            added = torch.from_numpy(point[layer] @ prompt.projection[layer]).view(2, -1)
            states = torch.cat([states[:, :1], states[:, 1:3] + added, states[:, 3:]], dim=1)
        states = block(states, **more)
    return stock.lm_head(norm(states))


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("family", CAUSAL)
def test_causal_models_equal_the_stock_forward(family: str, depth: str, folders: dict[str, Path]) -> None:
    oracle, prompt = open_tiny(folders[family], depth, batch_tokens=64)
    stock: Any = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).eval()
    tokenizer = load_tiny(folders[family]).tokenizer
    tokenize = tokenize_with(tokenizer)
    batch, points = batch_for("pair"), points_for(prompt)
    scores = check_scores(oracle.score(batch, points), batch, 3, channels=1)
    option = 0
    for form in batch.forms:
        ids = [tokenizer.cls_token_id, 300, 301, *tokenize("".join(p.text for p in form.parts))[0]]
        words = [tokenize(word)[0][0] for word in form.options]
        for n, point in enumerate(points):
            with torch.no_grad():
                logits = (
                    injected_logits(stock, ids, prompt, point) if n else stock(input_ids=torch.tensor([ids])).logits
                )
            for i, token in enumerate(words):
                assert scores.logits[n, option + i, 0] == pytest.approx(float(logits[0, -1, token]), abs=1e-5)
        option += len(words)


@pytest.mark.parametrize("family", CAUSAL)
def test_tokens_are_those_that_enter_a_causal_model(family: str, folders: dict[str, Path]) -> None:
    oracle, prompt = open_tiny(folders[family])
    batch, entered = batch_for("pair"), list[int]()
    alone = TextBatch(batch.forms[:1])  # texts together are padded, and share what stands before them
    body: Any = oracle._body  # type: ignore[attr-defined]
    hook = body._model.get_input_embeddings().register_forward_hook(
        lambda _module, given, _out: entered.append(given[0].numel())
    )
    oracle.score(alone, points_for(prompt)[:1])
    hook.remove()
    assert oracle.count_tokens(alone) == sum(entered) > 10  # type: ignore[attr-defined]
    assert oracle.count_tokens(batch) > oracle.count_tokens(alone)  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_batch_is_tokenized_once(family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    written = counted_texts(f"bbprompt.backends.{'stock' if family == 'llama' else 'local'}", monkeypatch)
    oracle, prompt = open_tiny(folders[family])
    batch, points = batch_for("pair"), points_for(prompt)
    oracle.score(batch, points)
    assert len(once := written.copy()) >= len(batch.forms)
    oracle.score(batch, points + 1.0)
    assert written == once


class TestMaskedContract(OracleContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folders: dict[str, Path]) -> None:
        self.folder = folders["bert"]

    def make(self) -> Oracle:
        return GapOracle(open_tiny(self.folder)[0])


class TestCausalContract(OracleContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folders: dict[str, Path]) -> None:
        self.folder = folders["llama"]

    def make(self) -> Oracle:
        return GapOracle(open_tiny(self.folder)[0])


class GapOracle:
    """Puts a gap at the end of the suite's texts, which have none."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle, self.info, self.close = oracle, oracle.info, oracle.close

    def score(self, batch: TextBatch, *more: Any) -> Any:
        if batch.extractive:
            return self._oracle.score(batch, *more)
        return self._oracle.score(TextBatch(tuple(replace(form, gap=len(form.parts)) for form in batch.forms)), *more)


def test_words_that_begin_alike_are_refused(folders: dict[str, Path]) -> None:
    task = Task.model_validate(tiny_prompt.PAIR | {"labels": {"0": "相同", "1": "相似"}})
    example = task.example({"text_a": "甲", "text_b": "乙", "label": "1"})
    batch = labelled(task, [example], for_loss=True, readout="verbalizer").batch
    point = np.zeros((1, tiny.LAYERS, 4))
    with pytest.raises(DataError, match="text 1: the option words '相同' and '相似' begin with the same token"):
        open_tiny(folders["llama"])[0].score(batch, point)
    open_tiny(folders["bert"])[0].score(batch, point)  # a mask for each token tells them apart


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_words_that_the_vocabulary_lacks_are_refused(family: str, folders: dict[str, Path]) -> None:
    task = Task.model_validate(tiny_prompt.PAIR | {"labels": {"0": "相☃", "1": "同样"}})
    example = task.example({"text_a": "甲", "text_b": "乙☃", "label": "1"})  # in a text it is just unknown
    batch = labelled(task, [example], for_loss=True, readout="verbalizer").batch
    with pytest.raises(DataError, match="text 1: the option word '相☃' is not in the vocabulary"):
        open_tiny(folders[family])[0].score(batch, np.zeros((1, tiny.LAYERS, 4)))


def test_cloze_forms() -> None:
    single = Task.model_validate(tiny_prompt.SINGLE)
    form = write(single, single.example({"text": "甲", "label": "l0"}), "verbalizer")
    assert ("".join(p.text for p in form.parts), form.gap, form.options) == ("甲的主题是", 2, single.options)
    choice = Task.model_validate(tiny_prompt.CHOICE)
    record = {"context": "文", "query": "问", "choices": ["一", "二"], "label": 0}
    form = write(choice, choice.example(record), "verbalizer")
    assert "".join(p.text for p in form.parts) == "文档文问题问？A、一；B、二；答案是"
    assert (form.gap, form.options) == (len(form.parts), ("A", "B"))
    words = dict(zip(single.labels, "一二三四五六七", strict=True))
    own = tiny_prompt.SINGLE | {"cloze": "{gap}新闻：{text}", "words": words}
    form = write(Task.model_validate(own), single.example({"text": "甲", "label": "l0"}), "verbalizer")
    assert (form.gap, form.parts[0].text, form.options) == (0, "新闻：", tuple("一二三四五六七"))


@pytest.mark.parametrize("keys", [{"cloze": "{text}"}, {"cloze": "{text}{gap}{gap}"}, {"words": {"l0": "一"}}])
def test_wrong_clozes_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(keys))):
        Task.model_validate(tiny_prompt.SINGLE | keys)


def test_a_causal_model_reads_nothing_behind_the_gap(folders: dict[str, Path]) -> None:
    task = Task.model_validate(tiny_prompt.SINGLE | {"cloze": "{gap}新闻：{text}"})
    batch = labelled(task, [task.example({"text": "甲", "label": "l0"})], for_loss=True, readout="verbalizer").batch
    with pytest.raises(DataError, match="text 1: text behind the gap"):
        open_tiny(folders["gpt2"])[0].score(batch, np.zeros((1, tiny.LAYERS, 4)))


def test_a_word_takes_the_space_before_it() -> None:
    def bytes_like(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        starts = [0, *(i for i, c in enumerate(text) if c == " " and i), len(text)]
        spans = [(a, b) for a, b in itertools.pairwise(starts) if b > a]
        return [hash(text[a:b]) for a, b in spans], spans

    assert word_tokens("It was ", "great", bytes_like) == (hash(" great"),)
    assert word_tokens("It was", "great", bytes_like) == (hash("great"),)  # "wasgreat" would be one piece


def test_with_its_head_a_model_has_another_digest(folders: dict[str, Path]) -> None:
    bare, headed = (load_backbone(str(folders["bert"]), head=head) for head in (False, True))
    assert bare.digest != headed.digest
    assert load_backbone(str(folders["bert"]), head=True).digest == headed.digest


def test_a_model_without_a_head_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from transformers import BertModel

    shutil.copytree(folders["bert"], tmp_path / "bare")
    BertModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(ArtifactError, match="no language model head"):
        load_backbone(str(tmp_path / "bare"), head=True)
