"""Methods without prompts on the tiny model: as runs, at work, resumed, refused, and beside a tuned prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import finished

from bbprompt import cli
from bbprompt.baselines.features import Reader, features, wordings
from bbprompt.baselines.method import PreparedBaseline
from bbprompt.baselines.rules import variants
from bbprompt.config import TuneConfig
from bbprompt.embedding import Embeddings
from bbprompt.errors import DiskError, Interrupted, ResumeMismatch, UsageError
from bbprompt.predict import load_prompt
from bbprompt.result import Result
from bbprompt.run import Watcher, default_directory, prepare, reopen, tune
from bbprompt.store.rundir import RunDirectory
from bbprompt.summary import notes, result_table
from bbprompt.tasks.task import load_task

RULES = ("majority", "zero-shot", "nearest-mean", "logistic", "threshold")


def config(data: Path, model: Path, method: str, **changes: Any) -> TuneConfig:
    settings = {
        "task": str(data / "task.yaml"),
        "data": str(data),
        "method": method,
        "backbone": str(model),
        "budget": 12,
        "device": "cpu",
        "threads": 1,
    }
    return TuneConfig.model_validate(settings | changes)


def begin(settings: TuneConfig, folder: Path, watcher: Watcher | None = None) -> Result:
    run = prepare(settings)
    assert isinstance(run, PreparedBaseline)
    assert run.method.name in str(default_directory(run))
    with RunDirectory.create(folder, run.manifest()) as directory:
        return tune(run, directory, watcher)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_of_each_rule(rule: str, tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    settings = config(tiny_pair_data, tiny_bert_dir, rule)
    result = begin(settings, tmp_path / "run")
    assert begin(settings, tmp_path / "again").digest == result.digest
    data = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert Result.model_validate(data) == result
    assert (result.method, result.prompts, result.test.n) == (rule, "none", 30)
    assert result.backbone == ("none" if rule == "majority" else str(tiny_bert_dir))
    ways = {"majority": 0, "zero-shot": 4, "nearest-mean": 3, "logistic": 3, "threshold": 2}[rule]
    assert result.calls.train == result.calls.dev == ways
    assert result.calls.train + result.calls.dev <= result.budget
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names - {"run.lock"} == {"manifest.json", "journal.log", "curve.csv", "prompt.safetensors", "result.json"}
    assert not any("not better" in line for line in notes(result)), "nothing was tuned"
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value
        records = [json.loads(line) for line in (tiny_pair_data / "test.jsonl").read_text("utf-8").splitlines()]
        found = used.predict(records)
        hits = [each.label == record["label"] for each, record in zip(found, records, strict=True)]
        assert float(np.mean(hits)) == result.test.value
        for each in found:
            assert sum(each.probabilities.values()) == pytest.approx(1.0)
            assert each.probabilities[each.label] == max(each.probabilities.values())


def test_many_labels_and_own_options(
    tiny_single_data: Path, tiny_choice_data: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    single = begin(config(tiny_single_data, tiny_bert_dir, "logistic"), tmp_path / "single")
    assert load_file(tmp_path / "single" / "prompt.safetensors")["weight"].shape == (7, 32)
    assert single.stages[0].optimizer == "logistic (text)"
    choice = begin(config(tiny_choice_data, tiny_bert_dir, "zero-shot"), tmp_path / "choice")
    assert choice.before.majority == 0.0
    with load_prompt(tmp_path / "choice") as used:
        (one,) = used.predict([{"context": "天地", "query": "人", "choices": ["甲", "乙乙"]}])
        assert set(one.probabilities) == {"甲", "乙乙"}
        assert used.evaluate().value == choice.test.value


def test_mixed_precision_is_float32_where_nothing_is_searched(
    tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    plain = begin(config(tiny_pair_data, tiny_bert_dir, "threshold", dtype="float32"), tmp_path / "plain")
    mixed = begin(config(tiny_pair_data, tiny_bert_dir, "threshold", dtype="mixed"), tmp_path / "mixed")
    assert mixed.digest == plain.digest


class Stopper(Watcher):
    """Stops a run at the second look."""

    looks = 0

    def comparing(self, done: int, total: int) -> None:
        assert 0 < done <= total
        self.looks += 1
        if self.looks == 2:
            raise Interrupted("stopped")


def test_threads_are_part_of_the_manifest(tiny_pair_data: Path, tiny_bert_dir: Path) -> None:
    run = prepare(config(tiny_pair_data, tiny_bert_dir, "majority", threads=None))
    assert run.manifest()["config"]["threads"] == run.manifest()["threads"] >= 1


def test_what_shares_work_out_is_said_to_do_nothing(
    tiny_pair_data: Path, tiny_bert_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(config(tiny_pair_data, tiny_bert_dir, "majority", ray="local", workers=2)).close()
    assert "--ray and --workers do nothing here" in caplog.text


def test_it_can_be_stopped_and_resumed(tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    settings = config(tiny_pair_data, tiny_bert_dir, "logistic")
    whole = begin(settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        begin(settings, tmp_path / "parts", Stopper())
    with pytest.raises(UsageError, match="not finished"):
        load_prompt(tmp_path / "parts")
    directory, known = reopen(tmp_path / "parts", writable=True)
    with directory:
        assert tune(prepare(known), directory).digest == whole.digest
    assert (tmp_path / "parts" / "journal.log").read_bytes().count(b"reserve") == whole.calls.train + whole.calls.dev


def test_other_numbers_than_the_journal_holds_are_refused(
    tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tiny_pair_data, tiny_bert_dir, "threshold")
    begin(settings, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.setattr(
        "bbprompt.backends.embedding.LocalEmbedder.embed",
        lambda self, texts: Embeddings(np.random.default_rng(0).normal(size=(len(texts), 32)).astype(np.float32), 0),
    )
    directory, known = reopen(tmp_path / "run", writable=True)
    with directory, pytest.raises(ResumeMismatch, match="other numbers"):
        tune(prepare(known), directory)


@pytest.mark.parametrize(
    ("kind", "rule", "changes", "message"),
    [
        ("extract", "zero-shot", {}, "spans"),
        ("choice", "logistic", {}, "options of its own"),
        ("single", "threshold", {}, "two labels"),
        ("pair", "logistic", {"prompts": "e5-small-mp2-deep"}, "uses no prompts"),
        ("pair", "logistic", {"budget": 5}, "needs 6 calls on"),
        ("pair", "logistic", {"backend": "http://nowhere"}, "only 'local' gives; leave out --backend"),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str, rule: str, changes: dict[str, Any], message: str, tiny_bert_dir: Path, request: pytest.FixtureRequest
) -> None:
    data = request.getfixturevalue(f"tiny_{kind}_data")
    with pytest.raises(UsageError, match=message):
        prepare(config(data, tiny_bert_dir, rule, **changes))


def test_a_damaged_file_is_refused(tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    begin(config(tiny_pair_data, tiny_bert_dir, "threshold"), tmp_path / "run")
    (tmp_path / "run" / "prompt.safetensors").write_bytes(b"nothing")
    with pytest.raises(DiskError, match="damaged"):
        load_prompt(tmp_path / "run")


@pytest.mark.parametrize("shapes", [((3, 1), (3,)), ((2, 1), (3,)), ((2,), (2,)), ((2, 1), (2, 1))])
def test_weights_of_other_sizes_than_the_task_s_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    begin(config(tiny_pair_data, tiny_bert_dir, "threshold"), tmp_path / "run")
    file = tmp_path / "run" / "prompt.safetensors"
    tensors = load_file(file)
    assert (tensors["weight"].shape, tensors["bias"].shape) == ((2, 1), (2,))
    save_file(tensors | {"weight": np.zeros(shapes[0]), "bias": np.zeros(shapes[1])}, file)
    with pytest.raises(DiskError, match=r"damaged \(weights .* are not those of 2 scores\); tune again"):
        load_prompt(tmp_path / "run")


def test_wordings_put_the_words_where_the_template_asks() -> None:
    assert wordings(load_task("chnsenticorp"))["template"] == ("情感分析：的情感是负面", "情感分析：的情感是正面")
    assert wordings(load_task("lcqmc"))["template"][0] == "意思判别：与的关系是矛盾"
    assert wordings(load_task("tnews"))["{}"][1] == "汽车"


def test_each_text_is_read_once(tiny_pair_data: Path) -> None:
    class Counting:
        texts: list[str] = []  # noqa: RUF012

        def embed(self, texts: list[str]) -> Embeddings:
            self.texts.extend(texts)
            return Embeddings(np.ones((len(texts), 2), dtype=np.float32), 0)

    task = load_task(tiny_pair_data / "task.yaml")
    records = [json.loads(line) for line in (tiny_pair_data / "test.jsonl").read_text("utf-8").splitlines()]
    examples = [task.example(record) for record in records]
    counting = Counting()
    read = Reader(counting)  # type: ignore[arg-type]
    assert features("cosine", task, examples, read).shape == (30, 1)
    assert features("pair", task, examples, read).shape == (30, 4)
    assert len(counting.texts) == len(set(counting.texts)) == read.count
    assert [str(way) for way in variants("logistic", task)] == ["pair", "text"]


def test_the_commands_work_with_them(
    tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, given = tmp_path / "run", ["--task", str(tiny_pair_data / "task.yaml"), "--data", str(tiny_pair_data)]
    more = ["--backbone", str(tiny_bert_dir), "--threads", "1", "--no-baselines", "--run-dir", str(folder), "--json"]
    assert cli.run(["tune", *given, "--method", "threshold", *more]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["method"], told["calls"]["test"], told["baselines"]) == ("threshold", 2, [])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["config"]["baselines"] is False
    assert cli.run(["resume", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["digest"] == told["digest"]
    assert cli.run(["eval", str(folder), "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["value"] == told["test"]["value"]
    labels = tmp_path / "labels.jsonl"
    elsewhere = ["--backend", "http://localhost:1"]
    for words in (["eval"], ["predict", "--input", str(tiny_pair_data / "test.jsonl"), "--output", str(labels)]):
        assert cli.run([words[0], str(folder), *words[1:], *elsewhere]) == 2
        assert "--backend http://localhost:1: threshold asks no server; leave it out" in capsys.readouterr().err
    assert (
        cli.run(["predict", str(folder), "--input", str(tiny_pair_data / "test.jsonl"), "--output", str(labels)]) == 0
    )
    assert len(labels.read_text(encoding="utf-8").splitlines()) == 30
    assert cli.run(["tune", *given, "--method", "logistic", "--prompts", "e5-small-mp2-deep"]) == 2
    assert "uses no prompts" in capsys.readouterr().err


# ---------------------------------------------------------------------------- beside a tuned prompt


def test_a_search_shows_them_and_does_not_use_them(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    shown = finished(tmp_path / "shown", tiny_pair_data, tiny_prompts)
    bare = finished(tmp_path / "bare", tiny_pair_data, tiny_prompts, baselines=False)
    result = Result.model_validate_json((shown / "result.json").read_bytes())
    without = Result.model_validate_json((bare / "result.json").read_bytes())
    assert without.baselines == ()
    assert [rival.name for rival in result.baselines] == ["threshold", "nearest-mean", "logistic"]
    assert result.digest == without.digest
    assert result.calls == without.calls
    assert all(0 <= rival.test <= 1 and rival.seconds >= 0 for rival in result.baselines)


def test_the_summary_says_when_tuning_was_not_worth_it(
    tiny_pair_data: Path, tiny_prompts: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    folder = finished(tmp_path / "run", tiny_pair_data, tiny_prompts)
    result = Result.model_validate_json((folder / "result.json").read_bytes())
    best = max(result.baselines, key=lambda rival: rival.test)
    same = begin(config(tiny_pair_data, tiny_bert_dir, "threshold", seed=7), tmp_path / "threshold")
    assert result.baselines[0].test == same.test.value
    assert result.baselines[0].dev == same.dev
    assert best.test > result.test.value
    (line,) = [line for line in notes(result) if "Without any tuning" in line]
    assert best.name in line
    assert f"{best.test:.3f}" in line
    first = next(iter(result_table(result).columns))
    assert {f"no prompt, {rival.name}" for rival in result.baselines} <= set(first.cells)
    better = result.model_copy(update={"test": result.test.model_copy(update={"value": 1.0})})
    assert not [line for line in notes(better) if "Without any tuning" in line]


def test_tasks_that_they_cannot_do(
    tiny_extract_data: Path, tiny_choice_data: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    folder = finished(tmp_path / "extract", tiny_extract_data, tiny_prompts)
    assert Result.model_validate_json((folder / "result.json").read_bytes()).baselines == ()
    folder = finished(tmp_path / "choice", tiny_choice_data, tiny_prompts)
    (only,) = Result.model_validate_json((folder / "result.json").read_bytes()).baselines
    assert only.name == "zero-shot"
