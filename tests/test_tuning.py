"""`bbprompt.tune`, the whole run in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import finished

import bbprompt
from bbprompt.errors import Interrupted, ResumeMismatch, UsageError
from bbprompt.run import Watcher
from bbprompt.search.tuner import Status


def test_settings_by_name_and_as_a_value_are_the_same(
    tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {
        "task": "lcqmc",
        "data": str(tiny_pair_data),
        "prompts": str(tiny_prompts),
        "budget": 44,
        "threads": 1,
        "set": {"router": None},
    }
    first = bbprompt.tune(bbprompt.TuneConfig(**settings))
    (default,) = (tmp_path / "runs").iterdir()
    assert default.name.startswith("lcqmc-mp2-deep-42-")
    second = bbprompt.tune(run_dir=tmp_path / "here", **settings)
    assert first.digest == second.digest
    stored = json.loads((tmp_path / "here" / "result.json").read_text(encoding="utf-8"))
    assert bbprompt.Result.model_validate(stored) == second


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tune: unknown key 'budgett'; did you mean 'budget'"):
        bbprompt.tune(task="lcqmc", budgett=3)
    with pytest.raises(UsageError, match="not both \\(budget\\)"):
        bbprompt.tune(bbprompt.TuneConfig(task="lcqmc"), budget=3)
    assert not list(tmp_path.iterdir())


def test_a_watcher_may_stop_the_run(tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path) -> None:
    class Stopper(Watcher):
        def status(self, status: Status) -> None:
            if status.calls > 20:
                raise Interrupted("enough")

    settings = {"prompts": str(tiny_prompts), "budget": 44, "threads": 1, "set": {"router": None}}
    with pytest.raises(Interrupted, match="enough"):
        bbprompt.tune(task="lcqmc", data=str(tiny_pair_data), run_dir=tmp_path / "run", watcher=Stopper(), **settings)
    assert (tmp_path / "run" / "journal.log").is_file()
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(ResumeMismatch, match=r"config\.seed was 42 when the run began and is 7 now"):
        bbprompt.tune(task="lcqmc", data=str(tiny_pair_data), run_dir=tmp_path / "run", seed=7, **settings)


class Meeting(Watcher):
    """Notes how many calls are settled, and stops a run after some."""

    def __init__(self, most: int) -> None:
        self.most, self.calls = most, 0

    def status(self, status: Status) -> None:
        self.calls = status.calls
        if self.calls > self.most:
            raise Interrupted("enough")


@pytest.mark.parametrize("named", [False, True])
def test_the_same_call_goes_on_with_a_run_and_returns_a_finished_one(
    named: bool, tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {
        "task": "lcqmc",
        "data": str(tiny_pair_data),
        "prompts": str(tiny_prompts),
        "budget": 44,
        "set": {"router": None},
    }
    monkeypatch.setattr("bbprompt.run.cores", lambda: 1)
    whole = bbprompt.tune(run_dir=tmp_path / "whole", **settings)
    if named:
        settings["run_dir"] = "here"
    with pytest.raises(Interrupted):
        bbprompt.tune(watcher=Meeting(20), **settings)
    if named:  # what it chose for itself stays as it was
        monkeypatch.setattr("bbprompt.run.cores", lambda: 7)
    found = bbprompt.tune(**settings)
    assert found.digest == whole.digest
    folder = tmp_path / "here" if named else next((tmp_path / "runs").iterdir())
    journal = (folder / "journal.log").read_bytes()
    assert journal == (tmp_path / "whole" / "journal.log").read_bytes(), "no call is made twice"
    watcher = Meeting(0)
    assert bbprompt.tune(watcher=watcher, **settings) == found
    assert watcher.calls == 0, "nothing runs"
    assert (folder / "journal.log").read_bytes() == journal
    if named:
        with pytest.raises(ResumeMismatch, match=r"config\.budget was 44 when the run began and is 60 now"):
            bbprompt.tune(**settings | {"budget": 60})


def test_a_directory_that_holds_something_else_is_refused(
    tmp_path: Path, tiny_pair_data: Path, tiny_prompts: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"not empty \(notes.txt\)"):
        finished(tmp_path, tiny_pair_data, tiny_prompts)
