"""`bbprompt.tune`, the whole run in one call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import finished

import bbprompt
from bbprompt.errors import Interrupted, UsageError
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
    with pytest.raises(UsageError, match="begun already"):
        finished(tmp_path / "run", tiny_pair_data, tiny_prompts)
