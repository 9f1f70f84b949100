"""Exported prompts: what other tools load gives what the run's own oracle gives, or the export is refused."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import runpy
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_prompt
import torch
import yaml
from reference import plain_states
from safetensors.numpy import load_file
from test_verbalizer import causal_dir
from tiny_run import finished
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import bbprompt
from bbprompt import cli
from bbprompt.backends.backbone import load_backbone
from bbprompt.errors import DiskError, UsageError
from bbprompt.export import ExportFormat, export_prompt
from bbprompt.predict import TunedPrompt, load_prompt, read_tuned
from bbprompt.run import reopen
from bbprompt.scoring import labelled

FAMILIES = ("gpt2", "llama")
RECORDS = tiny_prompt.pair_records(5, 9)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("causal")
    return {family: causal_dir(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def causal_runs(
    models: dict[str, Path], tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """Finished runs on tiny models, by model and layers, or "prepend"; on BERT at the input alone."""
    root = tmp_path_factory.mktemp("runs")
    method = {"name": "cloze", "summary": "s", "source": "s", "prompts": "none", "gates": "sigmoid"}
    method |= {"mixing": "normalized", "select": "both-losses"}
    projection = {"readout": "verbalizer", "prompt_length": 2, "dim": 4, "scale": 2.0}
    where: dict[str, Any] = {layers: {"layers": layers, "placeholder": 300} for layers in ("input", "all")}
    where["prepend"] = {"layers": "input", "injection": "prepend"}
    stage = {"popsize": 4, "sigma_first": 1.0, "sigma": 1.0, "keep": "improving", "dev_every": 8}
    runs = {}
    for family, layers in (*itertools.product(FAMILIES, where), ("bert", "input"), ("bert", "prepend")):
        file = root / f"cloze-{layers}.yaml"
        layout = {"layout": "layerwise" if layers == "all" else "joint"}
        described = method | {"projection": projection | where[layers], "prompt": stage | layout}
        file.write_text(yaml.safe_dump(described | {"name": file.stem}), encoding="utf-8")
        runs[family, layers] = root / f"{family}-{layers}"
        bbprompt.tune(
            task=str(tiny_pair_data / "task.yaml"),
            data=str(tiny_pair_data),
            method=str(file),
            backbone=str(tiny_bert_dir if family == "bert" else models[family]),
            budget=40,
            seed=3,
            threads=1,
            test_limit=4,
            run_dir=runs[family, layers],
        )
    return runs


@pytest.fixture(scope="module")
def deep_run(tmp_path_factory: pytest.TempPathFactory, tiny_pair_data: Path, tiny_prompts: Path) -> Path:
    return finished(tmp_path_factory.mktemp("run") / "deep", tiny_pair_data, tiny_prompts, test_limit=4)


@pytest.fixture
def tuned(causal_runs: dict[tuple[str, str], Path]) -> Iterator[Any]:
    """Opens a run, and closes it in the end."""
    opened: list[TunedPrompt] = []

    def open_(family: str, layers: str) -> TunedPrompt:
        opened.append(load_prompt(causal_runs[family, layers], device="cpu", threads=1))
        return opened[-1]

    yield open_
    for prompt in opened:
        prompt.close()


def facts_of(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "bbprompt.json").read_text(encoding="utf-8"))
    return facts


def text_of(facts: dict[str, Any], record: dict[str, Any]) -> str:
    return "".join(piece["literal"] if "literal" in piece else record[piece["field"]] for piece in facts["text"])


def agrees(prompt: TunedPrompt, record: dict[str, Any], facts: dict[str, Any], logits: torch.Tensor) -> None:
    """The logits behind a text are those of the run's own oracle, and its probabilities follow."""
    (expected,) = prompt.predict([record])
    words = logits[[option["token"] for option in facts["options"]]]
    assert [option["label"] for option in facts["options"]] == list(expected.probabilities)
    assert torch.softmax(words, dim=0).tolist() == pytest.approx(list(expected.probabilities.values()), abs=2e-5)
    oracle: Any = prompt._oracle
    batch = labelled(prompt.task, [prompt.example(record)], for_loss=False, readout="verbalizer").batch
    assert words.tolist() == pytest.approx(oracle.score(batch, prompt.point[None]).logits[0, :, 0].tolist(), abs=2e-5)


def stock_logits(model: Any, prompt: TunedPrompt, first: int, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the whole vocabulary behind [CLS] (`first`), placeholders and `ids`, by the stock forward.

    The prompt is added before the blocks, as the run did it; a prepended one stands before [CLS].
    """
    directory, config = reopen(prompt.path, writable=False)
    with directory:
        artifact, point = read_tuned(directory, config)
    if artifact.config.injection == "prepend":
        known = model.get_input_embeddings()(torch.cat([torch.tensor([[first]]), ids], dim=1))
        embeds = torch.cat([torch.from_numpy(artifact.prompts(point)), known], dim=1)
        return torch.as_tensor(model(inputs_embeds=embeds).logits[0, -1])
    front = [first, *artifact.config.placeholders]
    blocks = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    hooks = []
    for block, rows in zip(blocks, torch.from_numpy(artifact.prompts(point)), strict=False):

        def add(module: Any, args: Any, rows: torch.Tensor = rows) -> Any:
            states = args[0].clone()
            states[:, 1 : len(front)] += rows
            return (states, *args[1:])

        hooks.append(block.register_forward_pre_hook(add))
    logits = model(input_ids=torch.cat([torch.tensor([front]), ids], dim=1)).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return torch.as_tensor(logits)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by PEFT
@pytest.mark.parametrize("layers", ["input", "all", "prepend"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_it_and_computes_the_same(
    family: str,
    layers: str,
    models: dict[str, Path],
    causal_runs: dict[tuple[str, str], Path],
    tuned: Any,
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed: pip install 'bbprompt[peft]'")
    out = tmp_path / "adapter"
    done = export_prompt(causal_runs[family, layers], "peft", out)
    facts = facts_of(out)
    kind = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    assert kind == ("PREFIX_TUNING" if layers == "all" else "PROMPT_TUNING")
    assert done.length == facts["rows"]["count"] == 3, "[CLS] and two placeholders"
    last = "The last 1 stand for the tokenizer's own" in (out / "README.md").read_text(encoding="utf-8")
    assert last == (layers == "prepend")
    names: dict[str, Any] = {}
    exec(code_in(out / "README.md"), names)
    model = names["load"](str(models[family]), str(out))
    tokenizer = AutoTokenizer.from_pretrained(models[family])
    bare = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32).eval()
    prompt = tuned(family, layers)
    for record in RECORDS:
        ids = tokenizer(text_of(facts, record), add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
            assert float((bare(input_ids=ids).logits[0, -1] - logits).abs().max()) > 0.01, "the prompt does something"
            assert float((stock_logits(bare, prompt, tokenizer.cls_token_id, ids) - logits).abs().max()) < 2e-5
        agrees(prompt, record, facts, logits)


@pytest.mark.parametrize("layers", ["input", "prepend"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_before_the_text_are_what_the_run_saw(
    family: str,
    layers: str,
    models: dict[str, Path],
    causal_runs: dict[tuple[str, str], Path],
    tuned: Any,
    tmp_path: Path,
) -> None:
    out = tmp_path / "rows"
    done = export_prompt(causal_runs[family, layers], "prompt-embeds", out)
    assert sorted(done.files) == sorted(path.name for path in out.iterdir())
    facts, rows = facts_of(out), torch.from_numpy(load_file(out / "prompt_embeds.safetensors")["prompt_embeds"])
    tokenizer = AutoTokenizer.from_pretrained(models[family])
    model = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32).eval()
    embed, prompt = model.get_input_embeddings(), tuned(family, layers)
    for record in RECORDS:
        ids = tokenizer(text_of(facts, record), add_special_tokens=False, return_tensors="pt").input_ids[0]
        with torch.no_grad():
            logits = model(inputs_embeds=torch.cat([rows, embed(ids)])[None]).logits[0, -1]
        agrees(prompt, record, facts, logits)


class Reply(io.BytesIO):
    """What `urlopen` gives."""


def test_the_client_asks_for_the_options_alone(
    models: dict[str, Path],
    causal_runs: dict[tuple[str, str], Path],
    tuned: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Against a stand-in that computes what vLLM is asked for, in the form in which it answers."""
    out, record = tmp_path / "rows", RECORDS[1]
    export_prompt(causal_runs["llama", "input"], "prompt-embeds", out)
    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32).eval()
    known, sent = True, list[Any]()

    def answer(request: Any, timeout: float) -> Reply:
        assert request.full_url == "http://127.0.0.1:9/v1/completions"
        sent.append(request)
        body = json.loads(request.data)
        assert (body["max_tokens"], body["temperature"], body["logprobs"]) == (1, 0, 0)
        rows = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        with torch.no_grad():
            logprobs = model(inputs_embeds=rows[None]).logits[0, -1].log_softmax(-1)
        tokens = body["logprob_token_ids"] if known else [5]
        top = {f"token_id:{token}": float(logprobs[token]) for token in tokens}
        return Reply(json.dumps({"choices": [{"text": "x", "logprobs": {"top_logprobs": [top]}}]}).encode())

    monkeypatch.delenv("BBPROMPT_TOKEN", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    words = ["client.py", "http://127.0.0.1:9/", *(f"{key}={record[key]}" for key in ("text_a", "text_b"))]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(out / "client.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    (expected,) = tuned("llama", "input").predict([record])
    assert found["label"] == expected.label
    assert found["probabilities"] == pytest.approx(dict(expected.probabilities), abs=2e-5)
    assert not sent[-1].has_header("Authorization")
    monkeypatch.setenv("BBPROMPT_TOKEN", "of-the-server")
    runpy.run_path(str(out / "client.py"), run_name="__main__")
    assert "set the environment variable `BBPROMPT_TOKEN`" in (out / "README.md").read_text(encoding="utf-8")
    assert sent[-1].get_header("Authorization") == "Bearer of-the-server"
    assert "Authorization" not in sent[-1].headers, "which go along to where a server redirects to"
    known = False
    with pytest.raises(SystemExit, match="logprob_token_ids"):
        runpy.run_path(str(out / "client.py"), run_name="__main__")


def code_in(readme: Path) -> str:
    """The code that a README shows."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(code)


def test_plain_tensors_are_applied_as_the_readme_says(
    deep_run: Path, tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tensors"
    done = export_prompt(deep_run, "safetensors", out)
    assert (done.layers, done.length, done.files) == (3, 2, ("prompt.safetensors", "bbprompt.json", "README.md"))
    tensors = load_file(out / "prompt.safetensors")
    directory, config = reopen(deep_run, writable=False)
    with directory:
        prompt, point = read_tuned(directory, config)
    assert np.array_equal(tensors["prompt"], prompt.prompts(point))
    assert np.array_equal(tensors["head.weight"], prompt.head_weight)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code_in(out / "README.md"), names)
    model = AutoModel.from_pretrained(tiny_bert_dir, dtype=torch.float32).eval()
    ids = [2, *tensors["placeholders"].tolist(), 400, 401, 402, 3]
    expected = plain_states(
        AutoModel.from_pretrained(tiny_bert_dir, dtype=torch.float32).eval(), [ids], tensors["prompt"]
    )
    assert len(names["add_prompt"](model.encoder.layer)) == 3
    with torch.no_grad():
        found = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    assert np.abs(found - expected[0]).max() < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_every_run_has_plain_tensors(family: str, causal_runs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    export_prompt(causal_runs[family, "input"], "safetensors", tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "prompt.safetensors")) == {"prompt", "placeholders"}
    facts = facts_of(tmp_path / "out")
    assert facts["readout"]["kind"] == "verbalizer"
    assert facts["test"]["n"] == 4


def refused(run: Path, form: ExportFormat, out: Path, words: str) -> None:
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    with pytest.raises(UsageError, match=words):
        export_prompt(run, form, out)
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else []) == before


@pytest.mark.parametrize("form", ["peft", "prompt-embeds"])
def test_what_a_form_cannot_represent_is_refused(
    form: ExportFormat, deep_run: Path, causal_runs: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    refused(
        deep_run, form, tmp_path / "out", f"--format {form}: a 'span' readout is of an encoder.*--format safetensors"
    )
    refused(
        causal_runs["bert", "input"], form, tmp_path / "out", "is no causal model: its prompt is added .* LayerNorm"
    )
    refused(causal_runs["bert", "prepend"], form, tmp_path / "out", "no causal model: its prompt has rows .* LayerNorm")
    if form == "prompt-embeds":
        refused(causal_runs["gpt2", "all"], form, tmp_path / "out", "before 3 layers, and rows before the text reach")


@pytest.mark.parametrize("layers", ["input", "all"])
def test_a_model_that_does_something_of_its_own_is_refused(
    layers: str, causal_runs: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that scales embeddings it is given, or looks at positions another way when it is given keys and values."""
    real = load_backbone

    def scaled(name: str, **settings: Any) -> Any:
        backbone = real(name, **settings)
        forward = backbone.model.forward

        def own(**inputs: Any) -> Any:
            if "inputs_embeds" in inputs:
                inputs["inputs_embeds"] = inputs["inputs_embeds"] * 1.01
            if "past_key_values" in inputs:
                inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
            return forward(**inputs)

        backbone.model.forward = own
        return backbone

    monkeypatch.setattr("bbprompt.backends.backbone.load_backbone", scaled)
    refused(causal_runs["llama", layers], "peft", tmp_path / "out", r"this backbone changes .* \(states differ by")


def test_nothing_is_overwritten_and_nothing_half_written(
    deep_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    refused(deep_run, "safetensors", tmp_path / "there", "exists already")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(deep_run, "safetensors", tmp_path / "link", "exists already")
    refused(deep_run, "safetensors", tmp_path / "no" / "parent", "there is no directory")
    before = sorted(tmp_path.iterdir())

    def full(self: Any, file: Any, data: bytes) -> None:
        raise DiskError("no space")

    monkeypatch.setattr("bbprompt.store.disk.RealDisk.write", full)
    with pytest.raises(DiskError, match="no space"):
        export_prompt(deep_run, "safetensors", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_runs_without_a_prompt(deep_run: Path, tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    bbprompt.tune(
        task=str(tiny_pair_data / "task.yaml"),
        data=str(tiny_pair_data),
        method="majority",
        run_dir=tmp_path / "run",
        test_limit=4,
    )
    refused(tmp_path / "run", "safetensors", tmp_path / "out", "majority tunes no prompt")
    refused(tmp_path, "safetensors", tmp_path / "out", "no run|manifest")


def test_from_the_command_line(deep_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["export", str(deep_run), "--format", "safetensors", "--out", str(out), "--json"]
    assert cli.run(words) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["format"] == "safetensors"
    assert told["out"] == str(out)
    assert sorted(told["files"]) == sorted(path.name for path in out.iterdir())
    assert cli.run(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.run([*words[:3], "peft", "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.run([*words[:3], "onnx", "--out", str(tmp_path / "other")]) == 2
