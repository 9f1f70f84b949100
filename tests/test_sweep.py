"""Sweeps: what is started, skipped and noted, with scripted jobs; the grid's file."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bbprompt.errors import DiskError, Interrupted, UsageError
from bbprompt.sweep import job
from bbprompt.sweep import runner as sweep
from bbprompt.sweep.experiment import Cell, Experiment, experiment_from
from bbprompt.sweep.runner import Failure, Sweep, read_sweep, run_sweep, with_threads, write_sweep


def experiment(**changes: Any) -> Experiment:
    grid = {"tasks": ["lcqmc", "ocnli"], "methods": ["mp2-deep"], "seeds": [1, 2]}
    settings = {key: changes.pop(key) for key in list(changes) if key not in grid}
    return experiment_from(None, grid | changes, {"threads": 1, "budget": 50} | settings)


class Scripted:
    """A job that ends at the n-th look with a code, or runs on until it is stopped."""

    def __init__(self, run: Path, looks: int, code: int, words: str = "") -> None:
        self.run, self.looks, self.code, self.words = run, looks, code, words
        self.ended = self.killed = False

    def poll(self) -> int | None:
        self.looks -= 1
        return self.wait() if self.looks <= 0 else None

    def wait(self) -> int:
        if self.code == 0:
            self.run.mkdir(exist_ok=True)
            (self.run / "result.json").write_text("{}")
        return self.code

    def stop(self) -> None:
        if self.looks > 0:
            self.code = 75
        self.ended = True

    def kill(self) -> None:
        self.killed = True

    def last_words(self) -> str:
        return self.words


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_TICK", 0.0)


@pytest.fixture
def state(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path, {cell.name: cell for cell in experiment().cells()})


def scripts(state: Sweep, plan: dict[str, list[tuple[int, int, str]]], started: list[str]) -> Any:
    """A starter that follows a plan: run -> (looks, code, words) of each start; else two looks and success."""

    def start(cell: Cell, out: Path) -> Scripted:
        started.append(cell.name)
        looks, code, words = plan[cell.name].pop(0) if plan.get(cell.name) else (2, 0, "")
        return Scripted(out / cell.name, looks, code, words)

    return start


NAMES = ["lcqmc-mp2-deep-1", "ocnli-mp2-deep-1", "lcqmc-mp2-deep-2", "ocnli-mp2-deep-2"]


def test_everything_runs_at_most_so_many_at_a_time(state: Sweep) -> None:
    started: list[str] = []
    most: list[int] = []
    run_sweep(state, 2, lambda: None, lambda s: most.append(len(s.running)), scripts(state, {}, started))
    assert started == NAMES
    assert max(most) == 2
    assert state.done == set(NAMES)
    assert state.exit_code == 0
    assert state.counts()["done"] == 4


def test_finished_runs_are_skipped(state: Sweep) -> None:
    (state.out / NAMES[0]).mkdir()
    (state.out / NAMES[0] / "result.json").write_text("{}")
    started: list[str] = []
    run_sweep(state, 1, lambda: None, lambda s: None, scripts(state, {}, started))
    assert started == NAMES[1:]


def test_a_failed_run_stops_nothing_and_is_named(state: Sweep) -> None:
    plan = {NAMES[1]: [(1, 65, "error: bad: no such label")], NAMES[2]: [(1, -9, "")]}
    started: list[str] = []
    run_sweep(state, 1, lambda: None, lambda s: None, scripts(state, plan, started))
    assert started == NAMES
    assert state.failed[NAMES[1]] == Failure(65, "bad: no such label")
    assert "signal 9" in state.failed[NAMES[2]].error
    assert state.exit_code == 65
    assert [each["run"] for each in state.summary()["failed"]] == NAMES[1:3]
    state.failed.pop(NAMES[1])
    assert state.exit_code == 1  # killed by a signal


def test_stopping_asks_every_run_and_waits(state: Sweep) -> None:
    looks = iter(range(100))
    plan = {name: [(50, 0, "")] for name in NAMES}

    def check() -> None:
        if next(looks) == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        run_sweep(state, 2, check, lambda s: None, scripts(state, plan, []))
    assert state.stopped == set(NAMES[:2])
    assert not state.running
    assert state.exit_code == 75
    assert state.counts() == {"done": 0, "running": 0, "failed": 0, "stopped": 2, "elsewhere": 0, "waiting": 2}


def test_a_second_signal_kills(state: Sweep) -> None:
    jobs: list[Scripted] = []

    class Stubborn(Scripted):
        def wait(self) -> int:
            if not self.killed:
                raise KeyboardInterrupt
            return -9

    def start(cell: Cell, out: Path) -> Scripted:
        jobs.append(Stubborn(out / cell.name, 50, 0))
        return jobs[-1]

    def check() -> None:
        if jobs:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        run_sweep(state, 2, check, lambda s: None, start)
    assert all(each.killed for each in jobs)
    assert state.stopped == set(NAMES[:2])


@pytest.fixture
def held(state: Sweep) -> Iterator[list[Any]]:
    """The first run, locked by another process (a second descriptor counts as one)."""
    folder = state.out / NAMES[0]
    folder.mkdir()
    with (folder / "run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield [file]


def test_a_run_of_another_process_is_waited_for(state: Sweep, held: list[Any]) -> None:
    assert job.locked(state.out / NAMES[0])
    seen: list[str] = []

    def show(now: Sweep) -> None:
        seen.append(now.state(NAMES[0]))
        if len(now.done) == 3:
            held[0].close()

    started: list[str] = []
    run_sweep(state, 1, lambda: None, show, scripts(state, {}, started))
    assert started == [*NAMES[1:], NAMES[0]]
    assert "elsewhere" in seen
    assert state.exit_code == 0


def test_a_run_stopped_by_somebody_else_is_not_begun_again(state: Sweep) -> None:
    started: list[str] = []
    plan = {NAMES[0]: [(1, 75, "stopped by SIGTERM")]}
    run_sweep(state, 1, lambda: None, lambda s: None, scripts(state, plan, started))
    assert started == NAMES
    assert state.exit_code == 75


def test_the_grid_may_only_grow(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    first = experiment()
    assert read_sweep(out) is None
    assert len(write_sweep(out, first, None)) == 4
    assert read_sweep(out) == first
    assert len(write_sweep(out, first, first)) == 4
    grown = experiment(seeds=[1, 2, 3], methods=["mp2-shallow", "mp2-deep"])
    assert len(write_sweep(out, grown, first)) == 12
    assert read_sweep(out) == grown
    with pytest.raises(UsageError, match="the run lcqmc-mp2-shallow-1 is not in the grid"):
        write_sweep(out, first, grown)
    with pytest.raises(UsageError, match="budget of the run lcqmc-mp2-deep-1 was 50 and is 60 now"):
        write_sweep(out, experiment(budget=60), first)
    assert read_sweep(out) == grown
    assert [path.name for path in out.iterdir()] == ["sweep.json"]


def test_a_sweep_of_relative_paths_goes_on_from_anywhere(
    tmp_path: Path, tiny_pair_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_pair_data, tmp_path / "mine")
    (tmp_path / "head").mkdir()
    monkeypatch.chdir(tmp_path)
    grid = {"tasks": ["mine/task.yaml"], "methods": ["bbtv2-mrc"], "seeds": [1]}
    variants = {"h": {"set": {"projection.head": "head"}}}
    first = experiment_from(None, grid | {"variants": variants}, {"data": "mine", "threads": 1})
    cells = write_sweep(tmp_path / "sweep", first, None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = read_sweep(tmp_path / "sweep")
    assert again is not None
    assert again.cells() == cells
    config = cells[0].config
    assert (config.task, config.data) == (str(tmp_path / "mine" / "task.yaml"), str(tmp_path / "mine"))
    assert config.set == {"projection.head": str(tmp_path / "head")}
    assert cells[0].name == "task-bbtv2-mrc-h-1"


def test_threads_stay_as_the_sweep_began(tmp_path: Path) -> None:
    first = with_threads(experiment(threads=None), None, 2)
    assert first.settings["threads"] == 2
    assert with_threads(experiment(threads=None), first, 1).settings["threads"] == 2
    assert with_threads(experiment(threads=4), first, 1).settings["threads"] == 4


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"not empty \(thesis.tex\)"):
        write_sweep(tmp_path, experiment(), None)
    file = tmp_path / "sweep.json"
    file.write_text("[]")
    with pytest.raises(DiskError, match="damaged"):
        read_sweep(tmp_path)
    file.write_text(json.dumps({"format": 9, "experiment": {}}))
    with pytest.raises(UsageError, match="format 9"):
        read_sweep(tmp_path)
    with pytest.raises(DiskError, match="cannot make this folder"):
        write_sweep(file / "below", experiment(), None)


def test_progress_is_the_last_whole_row(tmp_path: Path) -> None:
    assert job.progress(tmp_path) == job.Progress(0, "", "")
    curve = tmp_path / "curve.csv"
    curve.write_text("calls,stage,train_loss,best_dev,seconds\n2,start,0.5,0.25,1.0\n14,pro")
    assert job.progress(tmp_path) == job.Progress(2, "start", "0.25")
    curve.write_text("calls,stage,train_loss,best_dev,seconds,oracle_seconds\n2,start,0.5,0.25,1.0,0.5\n")
    assert job.progress(tmp_path) == job.Progress(2, "start", "0.25")
    curve.write_text("calls,stage,train_loss,best_dev,seconds\n")
    assert job.progress(tmp_path) == job.Progress(0, "", "")


def test_a_run_that_goes_on_is_told_again_where_it_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(job.subprocess, "Popen", lambda words, **keys: started.append(words[3:]))
    [cell] = experiment(tasks=["lcqmc"], seeds=[1], ray="auto", workers=3).cells()
    job.start_local(cell, tmp_path)
    (tmp_path / cell.name).mkdir(exist_ok=True)
    (tmp_path / cell.name / "manifest.json").write_text("{}")
    job.start_local(cell, tmp_path)
    fresh, resumed = started
    assert fresh[0] == "tune"
    assert resumed == ["resume", str(tmp_path / cell.name), "--ray", "auto", "--workers", "3"]
