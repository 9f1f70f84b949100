"""Data from the Hugging Face hub, without it: directories and a cache as its client knows them, and no network."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import constants

from bbprompt import cli
from bbprompt.errors import DataError, OracleError, UsageError
from bbprompt.tasks import hub
from bbprompt.tasks.data import open_data
from bbprompt.tasks.task import Task, load_task, task_names

PAIRS = [{"sentence1": f"问{i}", "sentence2": f"答{i}", "score": i % 2} for i in range(6)]

CLASSES = """---
dataset_info:
  features:
  - name: sentence1
    dtype: string
  - name: sentence2
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': neutral
          '1': entailment
          '2': contradiction
---
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client prepares goes into the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def stored(folder: Path, card: str = "", **splits: list[dict[str, Any]]) -> Path:
    """A directory as a repository of the hub looks: a file per split and a card."""
    folder.mkdir()
    for name, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def there(task: Task, folder: Path) -> Task:
    """The task with its data set in a directory instead of at the hub."""
    assert task.hub is not None
    return task.model_copy(update={"hub": task.hub.model_copy(update={"path": str(folder), "revision": None})})


def test_the_columns_of_lcqmc(tmp_path: Path) -> None:
    folder = stored(tmp_path / "lcqmc", train=PAIRS, validation=PAIRS[:2], test=PAIRS[2:])
    found = open_data(there(load_task("lcqmc"), folder), "hub", env={})
    assert (found.source, found.splits) == ("hub", ("train", "dev", "test"))
    first, second = found.split("train")[:2]
    assert first.fields == {"text_a": "问0", "text_b": "答0"}
    assert (first.label, second.label) == (0, 1)
    assert found.where(second.uid) == f"{folder}:train:2"


def test_classes_are_read_by_name_and_a_test_split_without_labels_is_left(tmp_path: Path) -> None:
    rows = [{"sentence1": f"问{i}", "sentence2": "答", "label": i % 3} for i in range(6)]
    folder = stored(tmp_path / "ocnli", CLASSES, train=rows, validation=rows[:3], test=[rows[0] | {"label": -1}])
    task = there(load_task("ocnli"), folder)
    assert task.hub is not None
    task = task.model_copy(update={"hub": task.hub.model_copy(update={"config": None})})
    found = open_data(task, "hub", env={})
    labels = [list(task.labels)[example.label] for example in found.split("test")]
    assert labels == ["neutral", "entailment", "contradiction"]


def test_answers_in_the_columns_of_squad(tmp_path: Path) -> None:
    row = {"context": "甲乙丙丁", "question": "谁？", "answers": {"text": ["乙丙", "丁"], "answer_start": [1, 3]}}
    files = "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in ("train", "trial", "validation"))
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
    folder = stored(tmp_path / "cmrc", card, train=[row], trial=[row], validation=[row, row])
    task = there(load_task("cmrc2018"), folder)
    assert task.hub is not None
    task = task.model_copy(update={"hub": task.hub.model_copy(update={"config": None})})
    found = open_data(task, "hub", env={})
    assert [len(found.split(name)) for name in ("train", "dev", "test")] == [1, 1, 2]
    assert [(each.text, each.start) for each in found.split("dev")[0].answers] == [("乙丙", 1), ("丁", 3)]


def test_every_bundled_hub_key_feeds_its_task() -> None:
    with_hub = [task for task in map(load_task, task_names()) if task.hub is not None]
    assert {"lcqmc", "ocnli", "cmrc2018"} <= {task.name for task in with_hub}
    for task in with_hub:
        assert task.hub is not None
        assert set(task.hub.fields) <= {*task.field_names, "label"}, task.name
        assert task.hub.path.count("/") == 1


def test_auto_goes_on_with_the_sample_where_the_hub_is_out_of_reach(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="bbprompt")
    found = open_data(load_task("lcqmc"), env={})
    assert found.source == "sample"
    warning, line = caplog.records[-2:]
    assert warning.levelname == "WARNING"
    assert "C-MTEB/LCQMC" in warning.message
    assert "the hub is out of reach" in warning.message
    assert line.message.startswith("data of task lcqmc: sample lcqmc (BBPROMPT_DATA is not set, the hub is out of")
    with pytest.raises(OracleError, match="give --data DIR"):
        open_data(load_task("sst2"), env={})  # there is no sample of it


def test_auto_goes_on_with_the_sample_where_the_package_for_the_hub_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="bbprompt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert open_data(load_task("lcqmc"), env={}).source == "sample"
    assert [line.levelname for line in caplog.records] == ["INFO"]
    assert "the hub needs the package datasets" in caplog.records[0].message
    with pytest.raises(UsageError, match="needs the package datasets"):
        open_data(load_task("lcqmc"), "hub", env={})


def test_an_unreachable_hub_is_exit_69_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tune", "--task", "lcqmc", "--data", "hub", "--run-dir", str(tmp_path / "run"), "--quiet"]) == 69
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1
    assert "hub data set C-MTEB/LCQMC@17f9b096" in err
    assert "check the network, or give --data DIR" in err
    assert not (tmp_path / "run").exists()


def test_without_a_network_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[bool] = []

    def names(*args: Any, **more: Any) -> list[str]:
        seen.append(constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("not cached")

    def head(url: str, timeout: float) -> None:
        raise httpx2.ConnectError(f"no way to {url}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(httpx2, "head", head)
    with pytest.raises(OracleError, match=r"not in the hub cache, .* \(no way to https://"):
        open_data(load_task("lcqmc"), "hub", env={})
    assert seen == [True]
    assert not constants.HF_HUB_OFFLINE, "and nobody else is kept from the hub"


def test_a_data_set_that_the_hub_does_not_know_is_wrong_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def names(*args: Any, **more: Any) -> list[str]:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    with pytest.raises(DataError, match=r"cannot be opened: Dataset 'x/y' .*; correct the `hub` key"):
        open_data(load_task("lcqmc"), "auto", env={})  # never a silent sample for a wrong name


def test_what_is_no_class_stays_as_it_is() -> None:
    assert hub._label("1", [], "x") == "1"
    assert hub._label(True, [], "x") is True
    assert hub._label(1.0, [], "x") == "1"
    assert hub._label(0.5, [], "x") == 0.5
