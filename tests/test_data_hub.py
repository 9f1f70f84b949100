"""Data sets of the hub with a stand-in for its package."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from toytask import toy

from bbprompt.errors import DataError, UsageError
from bbprompt.tasks.data import open_data


class FakeTable(list[dict[str, Any]]):
    """As much of a `datasets.Dataset` as is used."""

    def __init__(self, rows: list[dict[str, Any]], names: list[str]) -> None:
        super().__init__(rows)
        self.features = {"y": type("ClassLabel", (), {"names": names})()}


def fake_hub(rows: list[dict[str, Any]]) -> Any:
    """Return a stand-in for the package `datasets` that holds one data set."""

    class Fake:
        class exceptions:  # noqa: N801
            DatasetsError = RuntimeError

        class config:  # noqa: N801
            HF_HUB_OFFLINE = True

        @staticmethod
        def get_dataset_split_names(path: str, config: str | None, revision: str | None) -> list[str]:
            if path != "a/b":
                raise FileNotFoundError("no such\ndata set")
            return ["train", "validation", "extra"]

        @staticmethod
        def load_dataset(path: str, config: str | None, split: str, revision: str | None) -> FakeTable:
            assert (config, revision) == ("c", "abc")
            return FakeTable(rows if split == "train" else rows[:1], ["0", "1"])

    return Fake


HUB = {
    "path": "a/b",
    "config": "c",
    "revision": "abc",
    "fields": {"text_a": "s1", "text_b": "s2", "label": "y"},
}


def test_hub_columns_and_class_labels_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"s1": "甲", "s2": "乙", "y": 1}, {"s1": "甲", "s2": "丙", "y": 0}]
    monkeypatch.setitem(sys.modules, "datasets", fake_hub(rows))
    found = open_data(toy(hub=HUB), env={})
    assert (found.source, found.id, found.splits) == ("hub", "a/b:c@abc", ("train", "dev"))
    assert [example.label for example in found.split("train")] == [1, 0]
    assert len(found.split("test")) == 1


@pytest.mark.parametrize(
    ("hub", "rows", "error", "words"),
    [
        (HUB, [{"s1": "甲", "s2": "乙", "y": -1}], DataError, "a/b:c@abc:train:1: the record has no label"),
        (HUB, [{"s1": "甲", "s2": "", "y": 1}], DataError, "a/b:c@abc:train:1: the field 'text_b' is empty"),
        (HUB | {"path": "x/y"}, [], DataError, "cannot be opened: no such"),
        (HUB | {"splits": dict.fromkeys(("train", "dev", "test"), "q")}, [], DataError, "hub.splits"),
        (None, [], UsageError, "add a `hub` key"),
    ],
)
def test_hub_defects(
    monkeypatch: pytest.MonkeyPatch, hub: Any, rows: list[dict[str, Any]], error: type[Exception], words: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_hub(rows))
    with pytest.raises(error) as caught:
        open_data(toy(hub=hub), "hub").split("train")
    assert words in str(caught.value)


def test_missing_datasets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"bbprompt\[data\]"):
        open_data(toy(hub=HUB), "hub")
