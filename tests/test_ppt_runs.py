"""Hybrid and unified PPT as whole runs on tiny models that were pre-trained on text, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_prompt
import yaml
from safetensors.numpy import load_file
from test_gradient_runs import Stopper, begin, go_on, settings, single_prompt
from test_pretrain_ppt import recipe
from test_verbalizer import causal_dir
from tinytrain import corpus

from bbprompt import cli
from bbprompt.config import load_method
from bbprompt.errors import Interrupted, UsageError
from bbprompt.export import export_prompt
from bbprompt.predict import load_prompt
from bbprompt.pretrain.run import pretrain
from bbprompt.run import prepare
from bbprompt.tasks.task import Task
from bbprompt.texts.ppt import in_pattern

pytestmark = pytest.mark.usefixtures("token_cache")

FEW = {"gradient.prompt.epochs": 4, "gradient.prompt.dev_every": 2, "gradient.prompt.rate": 0.05}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ppt")


@pytest.fixture(scope="module")
def backbones(root: Path, tiny_bert_dir: Path) -> dict[str, Path]:
    return {"bert": tiny_bert_dir, "gpt2": causal_dir(root / "gpt2", "gpt2"), "t5": tiny.t5_dir(root / "t5")}


@pytest.fixture(scope="module")
def prompts(root: Path, backbones: dict[str, Path]) -> dict[str, Path]:
    """The artifact of a short training on text for each family and format, and of other ones for BERT."""
    file, made = corpus(root / "corpus.txt", 60), {}

    def train(name: str, family: str, *, readout: str = "verbalizer", **ppt: Any) -> None:
        values = {"corpus": [str(file)], "window": 16, "options": [2, 10], "formats": ["choice"]} | ppt
        pretrain(recipe(file, backbones[family], readout=readout, steps=2, ppt=values), root / name, None, _silent)
        made[name] = root / name / "artifact"

    for family in backbones:
        train(f"{family}-choice", family)
        train(f"{family}-pair", family, formats=["pair"], hybrid=True)
    train("span", "bert", readout="span")
    train("english", "bert", language="en")
    train("hard", "bert", hybrid=True)
    train("few", "bert", options=[2, 4])
    return made


def _silent(*_: Any) -> None:
    """Nothing is shown."""


def test_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    plain = load_method("ppt").model_dump()
    for form in ("hybrid", "unified"):
        method = load_method(f"ppt-{form}").model_dump()
        assert method["gradient"] == plain["gradient"] | {"form": form}
        assert method["select"] == "dev-metric"
        assert cli.run(["methods", f"ppt-{form}", "--set", "gradient.prompt.epochs=7"]) == 0
        told = yaml.safe_load(capsys.readouterr().out)["gradient"]
        assert (told["form"], told["start"], told["prompt"]["epochs"]) == (form, "ppt", 7)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("form", ["hybrid", "unified"])
def test_a_run(
    form: Any, family: str, tiny_pair_data: Path, prompts: dict[str, Path], backbones: dict[str, Path], tmp_path: Path
) -> None:
    artifact = prompts[f"{family}-{'pair' if form == 'hybrid' else 'choice'}"]
    config = settings(tiny_pair_data, f"ppt-{form}", FEW, prompts=str(artifact))
    result = begin(config, tmp_path / "run")
    assert (result.calls.train, result.calls.dev) == (1 + 4 + 2, 1 + 2)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    wanted = in_pattern(Task.model_validate(tiny_prompt.PAIR), form, causal=family == "gpt2")
    assert manifest["task"] == wanted.model_dump(mode="json")
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value
        found = used.predict([{"text_a": "天气", "text_b": "天空"}])[0]
        assert found.label in ("0", "1")
        assert sum(found.probabilities.values()) == pytest.approx(1)
    assert export_prompt(tmp_path / "run", "safetensors", tmp_path / "out").files
    # The very run of plain prompt tuning on a task that says itself how it reads.
    task = wanted.model_dump(mode="json")
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task, allow_unicode=True), encoding="utf-8")
    same = settings(tiny_pair_data, "ppt", FEW, prompts=str(artifact), task=str(tmp_path / "task.yaml"))
    assert begin(same, tmp_path / "same").digest == result.digest
    own = begin(settings(tiny_pair_data, "ppt", FEW, prompts=str(artifact)), tmp_path / "own")
    assert own.digest != result.digest


@pytest.mark.parametrize("kind", ["single", "choice"])
def test_every_task_is_a_choice(
    kind: str, prompts: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data: Path = request.getfixturevalue(f"tiny_{kind}_data")
    config = settings(data, "ppt-unified", FEW, prompts=str(prompts["bert-choice"]))
    result = begin(config, tmp_path / "run")
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value
        record = tiny_prompt.choice_records(1, 9)[0] if kind == "choice" else {"text": "天气"}
        labels = record["choices"] if kind == "choice" else list(tiny_prompt.SINGLE["labels"])
        assert used.predict([record])[0].label in labels


def test_stopped_and_gone_on_with(tiny_pair_data: Path, prompts: dict[str, Path], tmp_path: Path) -> None:
    config = settings(tiny_pair_data, "ppt-unified", FEW, prompts=str(prompts["bert-choice"]))
    with pytest.raises(Interrupted):
        begin(config, tmp_path / "run", Stopper(6))
    assert go_on(tmp_path / "run").digest == begin(config, tmp_path / "whole").digest
    one, other = (load_file(tmp_path / name / "prompt.safetensors") for name in ("run", "whole"))
    assert one["prompt"].tobytes() == other["prompt"].tobytes()


def test_prompt_tuning_from_scratch_takes_a_form(
    tiny_pair_data: Path, backbones: dict[str, Path], tmp_path: Path
) -> None:
    """Hybrid PT, and PT in the format of a choice."""
    changes = FEW | {"gradient.soft.prompt_length": 2, "gradient.soft.readout": "verbalizer"}
    keys = {"backbone": str(backbones["bert"])}
    digests = set()
    for form in (None, "plain", "hybrid", "unified"):
        config = settings(tiny_pair_data, "prompt-tuning", changes | {"gradient.form": form}, **keys)
        digests.add(begin(config, tmp_path / str(form)).digest)
        with load_prompt(tmp_path / str(form)) as used:
            assert used.result is not None
            assert used.evaluate().value == used.result.test.value
    assert len(digests) == 4
    with pytest.raises(UsageError, match=r"gradient\.form=hybrid: .* add --set gradient\.soft\.readout=verbalizer"):
        prepare(settings(tiny_pair_data, "prompt-tuning", {"gradient.form": "hybrid"}))


REFUSED = [
    ("hybrid", "span", "pair", 'a span readout fills no gap .* readout: "verbalizer", or take --method ppt'),
    ("unified", "span", "pair", "a span readout fills no gap in a text"),
    ("unified", "bert-pair", "pair", r'ppt\.formats: \["pair"\], but --method ppt-unified .*: \["choice"\]; name'),
    ("hybrid", "bert-choice", "pair", r'ppt\.formats: \["choice"\], but --method ppt-hybrid .*: \["pair"\]; name'),
    ("unified", "english", "pair", r'ppt\.language: "en", but .* as with ppt\.language: "zh"'),
    ("unified", "hard", "pair", r"ppt\.hybrid: true, but .* as with ppt\.hybrid: false"),
    ("unified", "few", "single", r"ppt\.options: \[2, 4\], but .* the task tiny-single as with ppt\.options: \[2, 7\]"),
    ("unified", "bert-choice", "extract", "task tiny-extract: PPT's patterns have no gap for an answer"),
]


@pytest.mark.parametrize(("form", "name", "kind", "message"), REFUSED)
def test_refused(
    form: str, name: str, kind: str, message: str, prompts: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    data: Path = request.getfixturevalue(f"tiny_{kind}_data")
    with pytest.raises(UsageError, match=message) as error:
        prepare(settings(data, f"ppt-{form}", {}, prompts=str(prompts[name])))
    assert "\n" not in str(error.value)


def test_options_of_examples_count_too(prompts: dict[str, Path], tmp_path: Path) -> None:
    """A choice has no labels; its examples say how many letters are needed."""
    records = tiny_prompt.choice_records(140, 3)
    for record in records:
        record["choices"] = [*record["choices"], *(f"天{i}" for i in range(6 - len(record["choices"])))]
    parts = {"train": records[:100], "dev": records[100:], "test": records[100:]}
    data = tiny_prompt.data_dir(tmp_path / "data", tiny_prompt.CHOICE, parts)
    with pytest.raises(UsageError, match=r"ppt\.options: \[2, 4\], but .* as with ppt\.options: \[2, 6\]"):
        prepare(settings(data, "ppt-unified", {}, prompts=str(prompts["few"]), allow_overlap=True))
    prepare(settings(data, "ppt-unified", {}, prompts=str(prompts["bert-choice"]), allow_overlap=True)).close()


def test_prompts_of_another_kind_or_of_nowhere_are_refused(
    tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    spot = single_prompt(tmp_path / "spot", tiny_bert_dir, "spot")
    with pytest.raises(UsageError, match="of the kind spot, but the method ppt-unified begins with one of"):
        prepare(settings(tiny_pair_data, "ppt-unified", {}, prompts=str(spot)))
    with pytest.raises(UsageError, match=r"name it with --prompts .`bbprompt pretrain ppt` makes one"):
        prepare(settings(tiny_pair_data, "ppt-hybrid", {}))


def test_prompts_that_do_not_say_how_they_were_trained_are_refused(
    tiny_pair_data: Path, prompts: dict[str, Path], tmp_path: Path
) -> None:
    tmp_path.joinpath("model.safetensors").write_bytes((prompts["bert-choice"] / "model.safetensors").read_bytes())
    told = json.loads((prompts["bert-choice"] / "config.json").read_text(encoding="utf-8"))
    for training in ({}, {"recipe": {"ppt": None}}, {"recipe": {"ppt": {"formats": ["choice"], "options": "many"}}}):
        (tmp_path / "config.json").write_text(json.dumps(told | {"training": training}), encoding="utf-8")
        with pytest.raises(UsageError, match="do not say in which form they were pre-trained"):
            prepare(settings(tiny_pair_data, "ppt-unified", {}, prompts=str(tmp_path)))


def test_a_hard_prompt_may_be_added_to_what_was_trained_without(
    tiny_choice_data: Path, prompts: dict[str, Path]
) -> None:
    run = prepare(settings(tiny_choice_data, "ppt-hybrid", {}, prompts=str(prompts["bert-choice"])))
    assert run.task.cloze == "问题：{context}；{query}？{options}。答案是：{gap}。"
