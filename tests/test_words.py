"""Methods that ask a language model without prompt vectors, as runs on tiny models: at work, resumed, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_baselines import begin
from test_baselines import config as settings_for
from test_verbalizer import causal_dir

from bbprompt import cli
from bbprompt.backends.language import LocalLanguageModel
from bbprompt.config import TuneConfig
from bbprompt.errors import DiskError, Interrupted, ResumeMismatch, UsageError
from bbprompt.language import VocabularyScores
from bbprompt.predict import load_prompt
from bbprompt.run import Watcher, prepare, reopen, tune
from bbprompt.summary import notes

METHODS = ("zero-shot-lm", "in-context", "promptboosting")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_dir(tmp_path_factory.mktemp("causal") / "llama", "llama")


def config(data: Path, model: Path, method: str, **changes: Any) -> TuneConfig:
    return settings_for(data, model, method, **{"budget": 40} | changes)


@pytest.mark.parametrize(
    ("method", "family", "candidates"),
    [
        ("zero-shot-lm", "bert", 1),
        ("zero-shot-lm", "llama", 1),
        ("in-context", "llama", 5),
        ("promptboosting", "bert", 11),
        ("promptboosting", "llama", 11),
    ],
)
def test_a_run_of_each(
    method: str, family: str, candidates: int, tiny_pair_data: Path, tiny_bert_dir: Path, llama: Path, tmp_path: Path
) -> None:
    backbone = {"bert": tiny_bert_dir, "llama": llama}[family]
    settings = config(tiny_pair_data, backbone, method)
    result = begin(settings, tmp_path / "run")
    assert begin(settings, tmp_path / "again").digest == result.digest
    assert result.calls.train == result.calls.dev == candidates
    assert (result.method, result.prompts, result.backbone, result.test.n) == (method, "none", str(backbone), 30)
    assert not any("not better" in line for line in notes(result)), "nothing was searched"
    zero = begin(config(tiny_pair_data, backbone, "zero-shot-lm"), tmp_path / "zero")
    assert result.before == zero.before
    assert zero.before.test == zero.test.value
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names - {"run.lock"} == {"manifest.json", "journal.log", "curve.csv", "prompt.safetensors", "result.json"}
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value
        records = [json.loads(line) for line in (tiny_pair_data / "test.jsonl").read_text("utf-8").splitlines()]
        found = used.predict(records)
        hits = [each.label == record["label"] for each, record in zip(found, records, strict=True)]
        assert float(np.mean(hits)) == result.test.value
        for each in found:
            assert sum(each.probabilities.values()) == pytest.approx(1.0)
            assert each.probabilities[each.label] == max(each.probabilities.values())


def test_options_of_their_own_are_asked_by_letter(tiny_choice_data: Path, llama: Path, tmp_path: Path) -> None:
    for method in ("zero-shot-lm", "in-context"):
        result = begin(config(tiny_choice_data, llama, method), tmp_path / method)
        with load_prompt(tmp_path / method) as used:
            assert used.evaluate().value == result.test.value
            (one,) = used.predict([{"context": "天地", "query": "人", "choices": ["甲", "乙乙"]}])
            assert set(one.probabilities) == {"甲", "乙乙"}


def test_dev_chooses_among_the_orders_and_none(tiny_pair_data: Path, llama: Path, tmp_path: Path) -> None:
    losses: list[dict[str, float]] = []
    result = begin(config(tiny_pair_data, llama, "in-context", seed=1, set={"baseline.orders": 6}), tmp_path / "run")
    for line in (tmp_path / "run" / "journal.log").read_text("utf-8").splitlines():
        losses += json.loads(line[: line.rindex("}") + 1])["record"].get("values", [])
    looks = [{name: float.fromhex(str(value[name])) for name in value} for value in losses if "metric" in value]
    assert len(looks) == 7
    best = min(range(7), key=lambda i: (-looks[i]["metric"], looks[i]["loss"]))
    assert best != min(range(7), key=lambda i: looks[i]["loss"]), "the loss alone would choose another"
    shown = f"order {best})" if best else "(no demonstrations)"
    assert shown in result.stages[0].optimizer
    before = load_file(tmp_path / "run" / "prompt.safetensors")["before"]
    assert (len(before) > 0) == (best > 0)


def test_a_small_budget_takes_fewer_candidates(tiny_pair_data: Path, llama: Path, tmp_path: Path) -> None:
    for method in ("in-context", "promptboosting"):
        result = begin(config(tiny_pair_data, llama, method, budget=7), tmp_path / method)
        assert result.calls.train + result.calls.dev == 6


class Stopper(Watcher):
    """Stops a run at a look."""

    def __init__(self, last: int) -> None:
        self.left = last

    def comparing(self, done: int, total: int) -> None:
        assert 0 < done <= total
        self.left -= 1
        if not self.left:
            raise Interrupted("stopped")


def test_examples_that_do_not_fit_in_front_are_said_once(
    tiny_pair_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    roomy = causal_dir(tmp_path / "roomy", "llama", max_position_embeddings=2048)
    for name, limit in (("whole", None), ("short", 128)):
        caplog.clear()
        result = begin(config(tiny_pair_data, roomy, "in-context", max_tokens=limit), tmp_path / name)
        assert result.calls.train == 5
        told = [message for message in caplog.messages if "few-shot examples fit" in message]
        if limit is None:
            assert not told
            continue
        (line,) = told
        assert re.match(r"in-context: only \d of 32 few-shot examples fit into half of the 128 tokens", line)
        assert "raise --max-tokens, or, where that is all it can read, take a --backbone" in line


@pytest.mark.parametrize("method", ["in-context", "promptboosting"])
def test_it_can_be_stopped_and_resumed(method: str, tiny_pair_data: Path, llama: Path, tmp_path: Path) -> None:
    settings = config(tiny_pair_data, llama, method)
    whole = begin(settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        begin(settings, tmp_path / "parts", Stopper(5))
    for looks in (4, 1000):
        directory, known = reopen(tmp_path / "parts", writable=True)
        with directory:
            if looks == 4:
                with pytest.raises(Interrupted):
                    tune(prepare(known), directory, Stopper(looks))
            else:
                assert tune(prepare(known), directory, Stopper(looks)).digest == whole.digest
    assert (tmp_path / "parts" / "journal.log").read_bytes().count(b"reserve") == whole.calls.train + whole.calls.dev


def test_other_numbers_than_the_journal_holds_are_refused(
    tiny_pair_data: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(config(tiny_pair_data, llama, "promptboosting"), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()

    def other(self: LocalLanguageModel, forms: list[Any], tokens: list[int] | None = None) -> VocabularyScores:
        return VocabularyScores(np.log(np.random.default_rng(0).dirichlet(np.ones(50), len(forms))), 0)

    monkeypatch.setattr(LocalLanguageModel, "vocabulary", other)
    directory, known = reopen(tmp_path / "run", writable=True)
    with directory, pytest.raises(ResumeMismatch, match="other numbers"):
        tune(prepare(known), directory)


@pytest.mark.parametrize(
    ("kind", "method", "changes", "message"),
    [
        ("pair", "in-context", {"backbone": "bert"}, "is no causal language model"),
        ("pair", "in-context", {"max_tokens": 20}, "not one demonstration fits"),
        ("pair", "promptboosting", {"backend": "http://nowhere"}, "only 'local' gives; leave out --backend"),
        ("pair", "promptboosting", {"prompts": "e5-small-mp2-deep"}, "uses no prompts"),
        ("pair", "promptboosting", {"budget": 3}, "needs at least 4"),
        ("pair", "in-context", {"set": {"baseline.rounds": 2}}, "no such setting"),
        ("extract", "zero-shot-lm", {}, "spans"),
        ("choice", "promptboosting", {}, "none of its own"),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str,
    method: str,
    changes: dict[str, Any],
    message: str,
    tiny_bert_dir: Path,
    llama: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    data: Path = request.getfixturevalue(f"tiny_{kind}_data")
    if changes.get("backbone"):
        changes = changes | {"backbone": str({"bert": tiny_bert_dir, "llama": llama}[changes["backbone"]])}
    with pytest.raises(UsageError, match=message):
        begin(config(data, llama, method, **changes), tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_file_is_refused(method: str, tiny_pair_data: Path, llama: Path, tmp_path: Path) -> None:
    begin(config(tiny_pair_data, llama, method), tmp_path / "run")
    file = tmp_path / "run" / "prompt.safetensors"
    tensors = load_file(file)
    wrong: list[dict[str, Any]] = [{}]
    if method == "promptboosting":
        wrong += [tensors | {"prompt": tensors["prompt"] + 10}, tensors | {"alpha": tensors["alpha"] * np.nan}]
        wrong += [tensors | {"words": tensors["words"][:, :1]}, tensors | {"words": -1 - tensors["words"]}]
    else:
        wrong += [{"before": np.array([-1])}, {"before": np.array([0.5])}]
    for each in wrong:
        save_file({name: np.ascontiguousarray(array) for name, array in each.items()}, file)
        with pytest.raises(DiskError, match="damaged"):
            load_prompt(tmp_path / "run")


def test_the_commands_work_with_them(
    tiny_single_data: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, given = tmp_path / "run", ["--task", str(tiny_single_data / "task.yaml"), "--data", str(tiny_single_data)]
    more = ["--backbone", str(llama), "--threads", "1", "--run-dir", str(folder), "--json", "--budget", "30"]
    few = ["--method", "promptboosting", "--set", "baseline.combinations=200", "--set", "baseline.rounds=20"]
    assert cli.run(["tune", *given, *few, *more]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["calls"], told["stages"][0]["name"]) == ({"train": 11, "dev": 11, "test": 2}, "fit")
    assert cli.run(["resume", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["digest"] == told["digest"]
    assert cli.run(["eval", str(folder), "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["value"] == told["test"]["value"]
    labels = tmp_path / "labels.jsonl"
    test = str(tiny_single_data / "test.jsonl")
    assert cli.run(["predict", str(folder), "--input", test, "--output", str(labels)]) == 0
    assert len(labels.read_text(encoding="utf-8").splitlines()) == 30
    assert cli.run(["export", str(folder), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 2
    assert "tunes no prompt" in capsys.readouterr().err
