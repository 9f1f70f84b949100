"""A tuned prompt at work, on tiny models."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_prompt
from safetensors.numpy import save
from tiny_run import finished

import bbprompt
from bbprompt.commands.use import _json
from bbprompt.errors import ArtifactError, DataError, DiskError, UsageError
from bbprompt.predict import TunedPrompt, load_prompt


@pytest.fixture(scope="module")
def pair_run(tmp_path_factory: pytest.TempPathFactory, tiny_pair_data: Path, tiny_prompts: Path) -> Path:
    return finished(tmp_path_factory.mktemp("run") / "pair", tiny_pair_data, tiny_prompts)


@pytest.fixture(scope="module")
def pair(pair_run: Path) -> TunedPrompt:
    return load_prompt(pair_run, device="cpu", threads=1)


def test_probabilities_are_those_of_all_labels(pair: TunedPrompt) -> None:
    found = pair.predict(tiny_prompt.pair_records(70, 5))
    assert len(found) == 70
    for prediction in found:
        assert list(prediction.probabilities) == ["0", "1"]
        assert sum(prediction.probabilities.values()) == pytest.approx(1.0)
        assert prediction.probabilities[prediction.label] == max(prediction.probabilities.values())
    assert {prediction.label for prediction in found} == {"0", "1"}


def test_a_prediction_depends_on_its_text_alone(pair: TunedPrompt) -> None:
    records = tiny_prompt.pair_records(70, 5)
    together = pair.predict(records)
    for i in (0, 63, 64, 69):
        (alone,) = pair.predict([records[i]])
        assert alone.label == together[i].label
        assert alone.probabilities == pytest.approx(together[i].probabilities, abs=1e-4)


def test_a_label_in_the_input_is_not_looked_at(pair: TunedPrompt) -> None:
    record = {"text_a": "天气", "text_b": "气天"}
    assert pair.predict([record]) == pair.predict([record | {"label": "no such label"}])


def test_nothing_gives_nothing(pair: TunedPrompt) -> None:
    assert pair.predict([]) == []


def test_predictions_agree_with_the_score_of_the_run(pair: TunedPrompt) -> None:
    records = tiny_prompt.pair_records(30, 3)  # the test split of the data
    right = [found.label == record["label"] for found, record in zip(pair.predict(records), records, strict=True)]
    evaluation = pair.evaluate()
    assert evaluation.value == pytest.approx(float(np.mean(right)))
    assert evaluation.value == pytest.approx(pair.result.test.value)
    assert evaluation.stderr == pytest.approx(pair.result.test.stderr)
    assert (evaluation.split, evaluation.n, evaluation.majority) == ("test", 30, 0.5)


def test_other_splits_and_data(pair: TunedPrompt, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert pair.evaluate("dev").n == 40
    assert pair.evaluate("train", limit=10).n == 10
    more = tiny_prompt.data_dir(tmp_path / "more", tiny_prompt.PAIR, {"test": tiny_prompt.pair_records(12, 9)})
    seen: list[tuple[int, int]] = []
    found = pair.evaluate(data=str(more), report=lambda done, total: seen.append((done, total)))
    assert (found.n, found.id, found.source) == (12, str(more), "path")
    assert seen == [(12, 12)]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.raises(DataError, match="'train'"):
        pair.evaluate("train", data=str(more))


def test_changed_test_data_are_noticed(
    tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = shutil.copytree(tiny_pair_data, tmp_path / "lcqmc")
    run = finished(tmp_path / "run", data, tiny_prompts, test_limit=20)
    with load_prompt(run, device="cpu", threads=1) as prompt:
        assert prompt.evaluate().n == 20
        assert "test data are not those" not in caplog.text
    lines = (data / "test.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "test.jsonl").write_text("\n".join(lines[:25]) + "\n", encoding="utf-8")
    with load_prompt(run, device="cpu", threads=1) as prompt:
        prompt.evaluate()
    assert "test data are not those" in caplog.text


def test_bare_texts(tmp_path: Path, tiny_single_data: Path, tiny_prompts: Path) -> None:
    run = finished(tmp_path / "run", tiny_single_data, tiny_prompts)
    with bbprompt.load_prompt(run, device="cpu", threads=1) as prompt:
        found = prompt.predict(["今天的球赛", "房子"])
        assert found == prompt.predict([{"text": "今天的球赛"}, {"text": "房子"}])
        assert list(found[0].probabilities) == [f"l{i}" for i in range(7)]
        with pytest.raises(UsageError, match="brackets"):
            prompt.predict("今天的球赛")
        with pytest.raises(DataError, match=r"input 2: .*'text' is empty"):
            prompt.predict(["天", " "])


def test_choices_of_their_own(tmp_path: Path, tiny_choice_data: Path, tiny_prompts: Path) -> None:
    run = finished(tmp_path / "run", tiny_choice_data, tiny_prompts)
    with load_prompt(run, device="cpu", threads=1) as prompt:
        records = tiny_prompt.choice_records(5, 4)
        for found, record in zip(prompt.predict(records), records, strict=True):
            assert found.label in record["choices"]
            assert list(found.probabilities) == record["choices"]
            assert sum(found.probabilities.values()) == pytest.approx(1.0)
        (twice,) = prompt.predict([records[0] | {"choices": ["甲", "甲", "乙"]}])
        assert list(twice.probabilities) == ["甲", "乙"]
        assert sum(twice.probabilities.values()) == pytest.approx(1.0)
        assert prompt.evaluate().majority == 0.0
        with pytest.raises(UsageError, match="context, query, choices"):
            prompt.predict(["bare"])


def test_extraction_answers_from_the_context(tmp_path: Path, tiny_extract_data: Path, tiny_prompts: Path) -> None:
    run = finished(tmp_path / "run", tiny_extract_data, tiny_prompts)
    with load_prompt(run, device="cpu", threads=1) as prompt:
        records = [{key: row[key] for key in ("context", "question")} for row in tiny_prompt.extract_records(6, 4)]
        for found, record in zip(prompt.predict(records), records, strict=True):
            assert found.label
            assert found.label in record["context"]
            assert found.probabilities == {}
        assert prompt.evaluate().value == pytest.approx(prompt.result.test.value)


def test_records_lacking_a_field(pair: TunedPrompt) -> None:
    with pytest.raises(DataError, match="input 1: the field 'text_b' is missing"):
        pair.predict([{"text_a": "天"}])
    with pytest.raises(UsageError, match="text_a, text_b"):
        pair.predict(["bare"])


@pytest.fixture
def copy(pair_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pair_run, tmp_path / "copy")


def test_a_run_stopped_in_its_search_is_refused(copy: Path) -> None:
    for name in ("result.json", "prompt.safetensors"):
        (copy / name).unlink()
    with pytest.raises(UsageError, match=r"prompt.safetensors: not there, .* go on with `bbprompt resume"):
        load_prompt(copy)


def test_manifest_and_prompt_are_enough_to_predict_and_not_to_score(copy: Path, pair: TunedPrompt) -> None:
    text = {"text_a": "天", "text_b": "气"}
    for file in copy.iterdir():
        if file.name not in ("manifest.json", "prompt.safetensors"):
            file.unlink()
    with load_prompt(copy, device="cpu", threads=1) as prompt:
        assert prompt.result is None
        assert prompt.predict([text]) == pair.predict([text])
        with pytest.raises(UsageError, match=r"result.json: not there, .* go on with `bbprompt resume"):
            prompt.evaluate()


def test_a_finished_run_without_its_prompt_is_damaged(copy: Path) -> None:
    (copy / "prompt.safetensors").unlink()
    with pytest.raises(DiskError, match=r"prompt.safetensors: missing from a finished run"):
        load_prompt(copy)


def test_a_read_only_run_can_be_used(copy: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in copy.iterdir()}
    load_prompt(copy, device="cpu", threads=1).close()
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir()} == before


@pytest.mark.parametrize(
    "content",
    [
        b"junk",
        b"",
        save({"other": np.zeros((3, 4), np.float32)}),
        save({"point": np.zeros((3, 5), np.float32)}),
        save({"point": np.full((3, 4), np.nan, np.float32)}),
    ],
)
def test_a_damaged_prompt_is_refused(copy: Path, content: bytes) -> None:
    (copy / "prompt.safetensors").write_bytes(content)
    with pytest.raises(DiskError, match=r"prompt.safetensors"):
        load_prompt(copy)


@pytest.mark.parametrize("content", [b"junk", b"{}"])
def test_a_damaged_result_is_refused(copy: Path, content: bytes) -> None:
    (copy / "result.json").write_bytes(content)
    with pytest.raises(DiskError, match=r"result.json: damaged"):
        load_prompt(copy, device="cpu", threads=1)


def test_other_prompts_of_the_same_name_are_refused(
    tmp_path: Path, tiny_pair_data: Path, tiny_bert_dir: Path, tiny_prompts: Path
) -> None:
    prompts = shutil.copytree(tiny_prompts, tmp_path / "prompts")
    run = finished(tmp_path / "run", tiny_pair_data, prompts)
    config = json.loads((prompts / "config.json").read_text(encoding="utf-8"))
    other = tiny_prompt.artifact(tiny_bert_dir, config["backbone_digest"], seed=1)
    other.save(prompts)
    with pytest.raises(ArtifactError, match=r"not those that .* was tuned with"):
        load_prompt(run)


@pytest.mark.parametrize(
    ("value", "written"), [("\ud83d", "\\ud83d"), (float("inf"), None), ([1.0, float("nan")], [1.0, None])]
)
def test_what_passes_through_is_json_whatever_it_is(value: object, written: object) -> None:
    """Half an emoji, as cut JavaScript has it, and numbers that JSON has no word for."""
    line = _json({"text": "好吃", "x": value})
    found = json.loads(line)
    assert found["text"] == "好吃"
    assert found["x"] == (value if isinstance(value, str) else written)
    assert "好吃" in line
