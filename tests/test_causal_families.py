"""Families of language models: logits as the model's own, prompts before the right blocks, and clear refusals."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_verbalizer import batch_for, causal_dir, load_tiny, open_tiny, points_for
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertTokenizer,
    PreTrainedTokenizerFast,
)

from bbprompt import cli
from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.body import blocks_of
from bbprompt.backends.families import check_model, longest_input
from bbprompt.backends.language import LocalLanguageModel
from bbprompt.backends.lm_head import head_of
from bbprompt.backends.scale import facts_of, measure
from bbprompt.backends.stock import StockOracle
from bbprompt.backends.tokens import tokenize_with
from bbprompt.backends.virtual_tokens import front_of, virtual_tokens
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.oracle import TextBatch, check_scores
from bbprompt.prompts import ModularPrompt
from bbprompt.random_projection import clipped_std, random_prompt
from bbprompt.stage_settings import ProjectionConfig

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
_USUAL: dict[str, Any] = {
    "hidden_size": tiny.HIDDEN,
    "num_hidden_layers": tiny.LAYERS,
    "num_attention_heads": tiny.HEADS,
    "intermediate_size": tiny.FFN,
    "max_position_embeddings": 128,
}
_LLAMA = _USUAL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_GEMMA = _LLAMA | {"head_dim": 8, "sliding_window": 6}
_BERT = _USUAL | {"is_decoder": True}
_OPT = _BERT | {"ffn_dim": tiny.FFN, "word_embed_proj_dim": tiny.HIDDEN}
_GPT = {"n_embd": tiny.HIDDEN, "n_layer": tiny.LAYERS, "n_head": tiny.HEADS}

#: Heads that are more than one matrix.
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", _LLAMA | {"logits_scaling": 8.0}),
    "granitemoe": ("granitemoe", _LLAMA | {"logits_scaling": 4.0, "num_local_experts": 2}),
    "cohere": ("cohere", _LLAMA | {"logit_scale": 0.0625}),
    "hyperclovax": ("hyperclovax", _LLAMA | {"logits_scaling": 0.25}),
    "gemma2": ("gemma2", _GEMMA | {"final_logit_softcapping": 0.5}),
    "gemma3": ("gemma3_text", _GEMMA | {"final_logit_softcapping": 0.5}),
    "electra": ("electra", _BERT | {"embedding_size": 16}),
    "camembert": ("camembert", _BERT),
}
#: Blocks by other names than most, or no longest input in config.json.
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", _OPT),
    "opt-projected": ("opt", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bert": ("bert", _BERT),
    "roberta": ("roberta", _BERT),
    "bloom": ("bloom", {"hidden_size": tiny.HIDDEN, "n_layer": tiny.LAYERS, "n_head": tiny.HEADS}),
    "mpt": ("mpt", {"d_model": tiny.HIDDEN, "n_layers": tiny.LAYERS, "n_heads": tiny.HEADS, "max_seq_len": 100}),
}
#: What cannot be supported, and how it is said.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("mamba", _USUAL, "keeps no keys and values"),
    "gpt1": ("openai-gpt", _GPT | {"n_positions": 128}, "keeps no keys and values"),
    "falcon": (
        "falcon_h1",
        _LLAMA | {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4},
        "go on behind",
    ),
    "modernbert": ("modernbert-decoder", _LLAMA, "logits are not what its output matrix gives"),
    "cpmant": ("cpmant", _USUAL | {"dim_head": 8, "dim_ff": 32}, "blocks are none of h, layers"),
}


def family_dir(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    """Write a tiny causal model of a kind with the tokenizer of `causal_dir`."""
    folder.mkdir(parents=True)
    vocabulary = tiny.write_bert_vocabulary(folder / "vocab.txt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(vocabulary), **settings))
        for value in model.parameters():  # several families begin with zeros, ones or values too small to see
            value.data.normal_(0.0, 0.2) if value.ndim > 1 else value.data.add_(0.1 * torch.randn_like(value))
        model.save_pretrained(folder)
    characters = BertTokenizer(vocab=str(folder / "vocab.txt"))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=characters.backend_tokenizer, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a model, written when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    def find(name: str) -> Path:
        kind, settings = (HEADS | BLOCKS | {key: value[:2] for key, value in REFUSED.items()})[name]
        return root / name if (root / name).is_dir() else family_dir(root / name, kind, settings)

    return find


def stock_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def written(backbone: Any, form: Any, *front: int) -> list[int]:
    """Token ids of a text that ends in its gap."""
    text = "".join(part.text for part in form.parts[: form.gap])
    return [backbone.tokenizer.cls_token_id, *front, *tokenize_with(backbone.tokenizer)(text)[0]]


# ------------------------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("name", [*HEADS, *BLOCKS])
def test_without_a_prompt_it_is_the_stock_model(name: str, folders: Callable[[str], Path]) -> None:
    backbone, stock, batch = load_tiny(folders(name)), stock_model(folders(name)), batch_for("pair")
    asked = LocalLanguageModel(backbone, batch_tokens=64)
    scores, whole = asked.words(batch.forms), asked.vocabulary(batch.forms)
    tokenize = tokenize_with(backbone.tokenizer)
    for number, form in enumerate(batch.forms):
        with torch.no_grad():
            logits = stock(input_ids=torch.tensor([written(backbone, form)])).logits[0, -1]
        words = [tokenize(word)[0][0] for word in form.options]
        np.testing.assert_allclose(scores.logits[0, 2 * number : 2 * number + 2, 0], logits[words], **CLOSE)
        np.testing.assert_allclose(whole.logs[number], logits.log_softmax(-1), **CLOSE)


# ----------------------------------------------------------------------------------------------- blocks


def injected(stock: Any, ids: list[int], prompt: ModularPrompt, point: np.ndarray) -> torch.Tensor:
    """Logits by the formula of BBTv2, block by block: before block l, `h + z_l A_l` at the two placeholders."""
    body, kind, tokens = stock.base_model, stock.config.model_type, torch.tensor([ids])
    ahead = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)[None, None]
    if kind == "opt":
        inner = body.decoder
        blocks, states = inner.layers, inner.embed_tokens(tokens)
        states = inner.project_in(states) if inner.project_in is not None else states
        states, more = states + inner.embed_positions(torch.ones_like(tokens), 0), {}
        ends = [end for end in (inner.final_layer_norm, inner.project_out) if end is not None]
    elif kind in ("bert", "roberta"):
        blocks, states, more, ends = body.encoder.layer, body.embeddings(input_ids=tokens), {}, []
    elif kind == "bloom":
        alibi = body.build_alibi_tensor(torch.ones_like(tokens), body.num_heads, torch.float32)
        masked = torch.zeros(ahead.shape).masked_fill(ahead, torch.finfo(torch.float32).min)
        blocks, states = body.h, body.word_embeddings_layernorm(body.word_embeddings(tokens))
        more, ends = {"alibi": alibi, "attention_mask": masked}, [body.ln_f]
    else:
        alibi = body.build_mpt_alibi_tensor(body.num_heads, body.config.max_seq_len)
        blocks, states = body.blocks, body.wte(tokens)
        more, ends = {"position_bias": alibi, "attention_mask": ahead}, [body.norm_f]
    for layer, block in enumerate(blocks):
        if layer < len(point):
            added = torch.from_numpy(point[layer] @ prompt.projection[layer]).view(2, -1)
            states = torch.cat([states[:, :1], states[:, 1:3] + added, states[:, 3:]], dim=1)
        out = block(states, **more)
        states = out if isinstance(out, torch.Tensor) else out[0]
    for end in ends:
        states = end(states)
    return stock.cls(states) if kind == "bert" else stock.lm_head(states)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_prompts_stand_where_the_formula_puts_them(name: str, depth: str, folders: Callable[[str], Path]) -> None:
    oracle, prompt = open_tiny(folders(name), depth, batch_tokens=64)
    stock, backbone = stock_model(folders(name)), load_tiny(folders(name))
    tokenize = tokenize_with(backbone.tokenizer)
    batch, points = batch_for("pair"), points_for(prompt)
    scores = check_scores(oracle.score(batch, points), batch, 3, channels=1)
    for number, form in enumerate(batch.forms):
        ids = written(backbone, form, 300, 301)
        words = [tokenize(word)[0][0] for word in form.options]
        for n, point in enumerate(points):
            with torch.no_grad():  # the zero prompt: nothing but the placeholders
                logits = injected(stock, ids, prompt, point) if n else stock(input_ids=torch.tensor([ids])).logits
            found = scores.logits[n, 2 * number : 2 * number + 2, 0]
            np.testing.assert_allclose(found, logits[0, -1, words], **CLOSE)
    assert np.abs(scores.logits[0] - scores.logits[1]).max() > 1e-3, "the prompt matters"


@pytest.mark.parametrize("name", list(BLOCKS))
def test_states_that_scale_a_projection_are_those_that_enter_the_blocks(
    name: str, folders: Callable[[str], Path]
) -> None:
    backbone, stock, forms = load_tiny(folders(name)), stock_model(folders(name)), batch_for("single").forms
    entering: list[np.ndarray] = []
    blocks_of(stock.base_model)[2].register_forward_pre_hook(
        lambda _module, args, more: entering.append((args[0] if args else more["hidden_states"]).numpy().ravel()),
        with_kwargs=True,
    )
    facts = measure(backbone, forms, 2)
    with torch.no_grad():
        for form in forms:
            stock(input_ids=torch.tensor([written(backbone, form, 1000, 1001)]))
    assert len(facts.stds) == tiny.LAYERS
    assert facts.stds[2] == pytest.approx(clipped_std(np.concatenate(entering)), rel=1e-4)


@pytest.mark.parametrize("name", list(BLOCKS))
def test_rows_stand_before_the_first_token(name: str, folders: Callable[[str], Path]) -> None:
    backbone, stock, form = load_tiny(folders(name)), stock_model(folders(name)), batch_for("pair").forms[0]
    config = ProjectionConfig(
        readout="verbalizer", layers="input", prompt_length=2, dim=4, scale=1.0, injection="prepend"
    )
    prompt = random_prompt(config, facts_of(backbone), 3)
    scores = StockOracle(backbone, prompt).score(TextBatch((form,)), np.zeros((1, *prompt.space.shape)))
    rows = stock.get_input_embeddings()(torch.tensor([written(backbone, form)])).detach()
    with torch.no_grad():
        logits = stock(inputs_embeds=torch.cat([torch.zeros_like(rows[:, :2]), rows], dim=1)).logits[0, -1]
    words = [tokenize_with(backbone.tokenizer)(word)[0][0] for word in form.options]
    np.testing.assert_allclose(scores.logits[0, :, 0], logits[words], **CLOSE)


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_a_method_runs_on_it(
    name: str, folders: Callable[[str], Path], tiny_pair_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", "--task", str(tiny_pair_data / "task.yaml"), "--data", str(tiny_pair_data), "--method", "bbtv2"]
    words += ["--backbone", str(folders(name)), "--budget", "40", "--threads", "1", "--run-dir", str(tmp_path / "run")]
    for change in ("projection.dim=6", "projection.prompt_length=3", "prompt.popsize=4", "prompt.dev_every=8"):
        words += ["--set", change]
    assert cli.run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["calls"]["train"] > 0


@pytest.mark.parametrize(("name", "exact"), [("opt", True), ("opt-projected", False)])
def test_a_prompt_behind_a_projection_of_the_embeddings_is_no_row_of_them(
    name: str, exact: bool, folders: Callable[[str], Path]
) -> None:
    _, prompt = open_tiny(folders(name), "shallow", batch_tokens=64)
    front = front_of(load_tiny(folders(name)), prompt, points_for(prompt)[1])
    if exact:
        assert virtual_tokens(front).shape[-1] == tiny.HIDDEN
        return
    with pytest.raises(UsageError, match=f"embeddings have 16 units and its layers {tiny.HIDDEN}"):
        virtual_tokens(front)


# ------------------------------------------------------------------------------------------- longest input


@pytest.mark.parametrize(
    ("name", "told", "expected"),
    [
        ("bloom", {}, 2048),
        ("bloom", {"seq_length": 90}, 90),
        ("bloom", {"max_position_embeddings": 70}, 70),
        ("mpt", {}, 100),
        ("opt", {}, 128),
        ("roberta", {}, 126),
    ],
)
def test_the_longest_input(
    name: str, told: dict[str, int], expected: int, folders: Callable[[str], Path], tmp_path: Path, caplog: Any
) -> None:
    shutil.copytree(folders(name), tmp_path / name)
    config = tmp_path / name / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | told), "utf-8")
    with caplog.at_level(logging.WARNING, logger="bbprompt"):
        backbone = load_backbone(str(tmp_path / name), head=True)
    assert backbone.max_positions == expected
    assert backbone.limit(60) == 60
    assert ("does not say how long an input may be" in caplog.text) is (expected == 2048)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_supported_is_refused(name: str, folders: Callable[[str], Path]) -> None:
    with pytest.raises(
        ArtifactError, match=rf"backbone .*{name}.*{REFUSED[name][2]}.*use another --backbone"
    ) as caught:
        load_backbone(str(folders(name)), head=True)
    assert "\n" not in str(caught.value)


def test_a_refusal_ends_a_command_as_other_wrong_files_do(
    folders: Callable[[str], Path], tiny_pair_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", "--task", str(tiny_pair_data / "task.yaml"), "--data", str(tiny_pair_data), "--method", "bbt"]
    words += ["--backbone", str(folders("mamba")), "--budget", "40", "--run-dir", str(tmp_path / "run")]
    assert cli.run(words) == ArtifactError.exit_code == 65
    assert "keeps no keys and values" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


LOADERS: dict[str, tuple[Any, Any]] = {
    "causal": (AutoModelForCausalLM, lambda folder: causal_dir(folder, "llama")),
    "masked": (AutoModelForMaskedLM, tiny.bert_dir),
    "sentinel": (AutoModelForSeq2SeqLM, tiny.t5_dir),
}
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "factor": lambda logits: 1.01 * logits,
    "constant": lambda logits: logits + 1.0,
    "cap": lambda logits: logits.tanh(),
    "bias": lambda logits: logits + torch.linspace(0, 1, logits.shape[-1]),
    "masked word": lambda logits: logits.index_fill(-1, logits[0, -1].argmax()[None], -torch.inf),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("kind", list(LOADERS))
def test_any_other_head_is_refused(kind: Any, change: str, tmp_path: Path) -> None:
    loader, write = LOADERS[kind]
    model = loader.from_pretrained(write(tmp_path / kind), dtype=torch.float32).eval()
    check_model("mine", model, head_of(model, kind))

    def changed(_module: Any, _given: Any, out: Any) -> Any:
        out.logits = CHANGES[change](out.logits)
        return out

    model.register_forward_hook(changed)
    with pytest.raises(ArtifactError, match=r"backbone mine of type .* scored wrongly; use another --backbone"):
        check_model("mine", model, head_of(model, kind))


@pytest.mark.parametrize("fault", ["twice", "wide", "raises", "no width", "shared", "nan"])
def test_models_that_run_otherwise_are_refused(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(causal_dir(tmp_path / "m", "llama"), dtype=torch.float32).eval()
    head, reason = head_of(model, "causal"), "not run one after the other on a state a token"
    if fault == "twice":
        model.model.layers[1] = model.model.layers[0]
    elif fault == "wide":
        plain = model.model.layers[1].forward
        model.model.layers[0].register_forward_hook(lambda _module, _given, out: out[None])
        monkeypatch.setattr(model.model.layers[1], "forward", lambda states, **more: plain(states[0], **more))
    elif fault == "raises":
        monkeypatch.setattr(model.model.layers[1], "forward", lambda states, **more: {}["one\ntwo"])
        reason = r"cannot be run, tried on a few tokens \(KeyError: .*\); use another"
    elif fault == "no width":
        small = SimpleNamespace(model_type="fuyu", text_config=model.config)
        monkeypatch.setattr(model, "config", small)
        reason = "no hidden_size and no num_hidden_layers and no vocab_size.*save the language model alone"
    elif fault == "shared":
        plain = model.model.layers[1].forward
        turned: Any = lambda states, past_key_values=None, **more: plain(states, **more)  # noqa: E731
        monkeypatch.setattr(model.model.layers[1], "forward", turned)  # forgets what it has seen
        reason = "(cannot go on behind its own keys and values|has other states than the same text in one piece)"
    else:
        model.model.norm.weight.data.fill_(float("nan"))
        reason = "its logits are not numbers; check the checkpoint"
    with pytest.raises(ArtifactError, match=reason):
        check_model("mine", model, head)


def test_an_output_that_is_no_matrix_is_refused() -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="odd"), get_output_embeddings=lambda: None)
    with pytest.raises(ArtifactError, match="type 'odd': its language model head has no single output matrix"):
        head_of(model, "causal")


def test_the_longest_input_of_a_t5() -> None:
    assert longest_input(SimpleNamespace(), sentinel=True) == 512
