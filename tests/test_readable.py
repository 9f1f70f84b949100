"""Texts that the model cannot read: told by file and line, before a run begins, and in every way to a model."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_prompt
from servers import serving
from tiny_run import finished

import bbprompt
from bbprompt import cli
from bbprompt.errors import DataError, TextError, UsageError
from bbprompt.oracle import Oracle, OracleInfo, Scores, Support, TextBatch
from bbprompt.prompts import ModularPrompt
from bbprompt.readable import NamingOracle, can_check, check_readable
from bbprompt.tasks.data import open_data
from bbprompt.tasks.task import Task

LONG = "长" * 130
TASK = tiny_prompt.PAIR | {"cut": []}  # nothing may be cut, as where questions stand in the text


def spoiled(folder: Path, split: str, line: int) -> Path:
    """The pair task with a text of 130 tokens in one line of a split."""
    sizes = {"train": 90, "dev": 40, "test": 30}
    splits = {name: tiny_prompt.pair_records(size, seed) for seed, (name, size) in enumerate(sizes.items(), 1)}
    splits[split][line - 1]["text_a"] = LONG
    return tiny_prompt.data_dir(folder, TASK, splits)


def words(data: Path, prompts: Path, *more: str) -> list[str]:
    flags = ["tune", "--task", str(data / "task.yaml"), "--data", str(data), "--prompts", str(prompts)]
    return [*flags, "--budget", "44", "--threads", "1", "--set", "router=null", *more]


def test_the_number_survives_every_way_an_error_travels() -> None:
    error = TextError("text 26: question and options alone take 200 of 100 tokens")
    again = pickle.loads(pickle.dumps(error))
    assert (again.number, again.reason) == (26, "question and options alone take 200 of 100 tokens")
    assert str(again) == str(error)
    assert TextError("from somewhere else").number == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_text_too_long_is_named_and_leaves_no_directory(
    split: str, tmp_path: Path, tiny_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = spoiled(tmp_path / "data", split, 17)
    # All of train is drawn, so that the text is among what is scored.
    shots = ["--shots", "22"]
    line = data / f"{split}.jsonl"
    if split == "train":  # 90 records, 45 of a label, 44 of them drawn: take the one away that might be left out
        rows = line.read_text(encoding="utf-8").splitlines()
        line.write_text("\n".join(rows[:88]) + "\n", encoding="utf-8")
    run = tmp_path / "run"
    assert cli.run(words(data, tiny_prompts, *shots, "--run-dir", str(run))) == 65
    err = capsys.readouterr().err
    assert f"{line}:17: question and options alone take" in err
    assert "--max-tokens" in err
    assert "shorten" in err
    assert not run.exists()
    rows = line.read_text(encoding="utf-8").splitlines()
    rows[16] = json.dumps(json.loads(rows[16]) | {"text_a": "短一点"}, ensure_ascii=False)
    line.write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert cli.run(words(data, tiny_prompts, *shots, "--run-dir", str(run), "--quiet")) == 0


def test_predict_and_eval_name_the_line(
    tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_prompt.data_dir(
        tmp_path / "data",
        TASK,
        {name: tiny_prompt.pair_records(size, size) for name, size in (("train", 90), ("dev", 40), ("test", 30))},
    )
    run = finished(tmp_path / "run", data, tiny_prompts)
    texts = tmp_path / "texts.jsonl"
    rows = [{"text_a": "甲", "text_b": "乙"} for _ in range(100)]
    rows[70]["text_a"] = LONG
    texts.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert cli.run(["predict", str(run), "--input", str(texts), "--output", str(tmp_path / "out.jsonl")]) == 65
    assert f"{texts}:72: question and options alone take" in capsys.readouterr().err  # the first line is blank
    assert not (tmp_path / "out.jsonl").exists()
    with bbprompt.load_prompt(run) as prompt, pytest.raises(DataError, match=r"^input 71: question and options"):
        prompt.predict(rows)
    other = spoiled(tmp_path / "other", "test", 9)
    assert cli.run(["eval", str(run), "--data", str(other), "--quiet"]) == 65
    assert f"{other / 'test.jsonl'}:9: question and options alone take" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "changes"),
    [("mp2-gradient-deep", {}), ("bbt-mrc", {"projection.head": "prompts"})],
)
def test_other_methods_are_checked_before_they_begin(
    method: str, changes: dict[str, str], tmp_path: Path, tiny_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = spoiled(tmp_path / "data", "test", 3)
    flags = ["--method", method, "--run-dir", str(tmp_path / "run")]
    flags += [] if changes else ["--prompts", str(tiny_prompts)]
    flags += [word for key in changes for word in ("--set", f"{key}={tiny_prompts}")]
    command = ["tune", "--task", str(data / "task.yaml"), "--data", str(data), "--threads", "1", *flags]
    assert cli.run(command) == 65
    assert f"{data / 'test.jsonl'}:3: question and options alone take" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_directory_is_free_again_where_a_server_refuses_a_text(
    tmp_path: Path, tiny_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = spoiled(tmp_path / "data", "train", 17)
    file, run = data / "train.jsonl", tmp_path / "run"
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:88]), encoding="utf-8")
    oracle = bbprompt.open_oracle("local", ModularPrompt.load(tiny_prompts), dtype="float32", threads=1)
    with serving(oracle) as url:
        command = words(data, tiny_prompts, "--shots", "22", "--run-dir", str(run), "--backend", url)
        assert cli.run(command) == 65
        assert f"{file}:17: question and options alone take" in capsys.readouterr().err
        assert {path.name for path in run.iterdir()} <= {"run.lock"}
        file.write_text(file.read_text(encoding="utf-8").replace(LONG, "短一点"), encoding="utf-8")
        assert cli.run([*command, "--quiet"]) == 0


class Remote:
    """An oracle behind a wire: it says which text it cannot read only when it is asked."""

    info = OracleInfo("far", "", "", 1, 1, "float32", "there", 128)

    def score(
        self,
        batch: TextBatch,
        points: np.ndarray[Any, Any],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        raise TextError("text 2: too long")

    def close(self) -> None:
        """Nothing to let go of."""


def test_what_a_server_numbers_is_named(tmp_path: Path) -> None:
    task, folder = Task.model_validate(TASK), spoiled(tmp_path, "test", 5)
    data = open_data(task, folder)
    examples = data.split("test")
    oracle: Oracle = NamingOracle(Remote(), task, data, examples)
    assert not can_check(oracle)
    check_readable(oracle, "span", task, data, examples)  # what cannot tell is not asked
    batch = TextBatch(tuple(task.render(example) for example in examples[20:24]))
    with pytest.raises(DataError, match=r"test\.jsonl:22: too long$"):
        oracle.score(batch, np.zeros((1, 1, 1)))


def test_a_limit_above_the_models_is_said_once(
    tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="bbprompt"):
        finished(tmp_path / "run", tiny_pair_data, tiny_prompts, max_tokens=4000)
    told = [record.message for record in caplog.records if "--max-tokens" in record.message]
    assert len(told) == 1
    assert "--max-tokens 4000: " in told[0]
    assert "reads at most 128 tokens" in told[0]
    caplog.clear()
    finished(tmp_path / "other", tiny_pair_data, tiny_prompts, max_tokens=128)
    assert "--max-tokens" not in caplog.text


def test_a_limit_without_room_for_a_text(tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path) -> None:
    with pytest.raises(UsageError, match="--max-tokens: prompt and special tokens alone take 4 of 4 tokens"):
        finished(tmp_path / "run", tiny_pair_data, tiny_prompts, max_tokens=4)
