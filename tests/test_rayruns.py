"""`bbprompt sweep --ray` on a real Ray of this machine: runs as processes of its actors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_prompt
import yaml
from raylock import only_ray

import bbprompt
from bbprompt import cli
from bbprompt.backends.rayruns import RayRuns, _Runner, open_ray_runs
from bbprompt.errors import UsageError
from bbprompt.sweep.experiment import Cell, Experiment, experiment_from
from bbprompt.sweep.job import locked
from bbprompt.sweep.runner import write_sweep

# Ray is not imported here: it decides on tokens when it is loaded.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # waits for the other tests of Ray, too
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'bbprompt[ray]'"),
]

LONG = 1500
ROUTERLESS = {"router": None, "prompt.patience": None}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """While no other test uses Ray: a short folder for the files of one that is killed and cannot clear them away."""
    with only_ray():
        folder = Path(tempfile.mkdtemp(prefix="bb", dir="/tmp"))
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def flags(data: Path, prompts: Path, out: Path, **grid: str) -> list[str]:
    grid = {"tasks": "lcqmc", "methods": "mp2-deep", "seeds": "1", "budget": "44"} | grid
    words = ["sweep", "--data", str(data), "--prompts", str(prompts), "--out", str(out), "--set", "router=null"]
    words += ["--set", "prompt.patience=null"]
    return [*words, *(part for key, value in grid.items() for part in (f"--{key}", value))]


def start(words: list[str], temporary: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bbprompt", *words, "--ray", "local"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
    )


def until(reached: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 120.0) -> None:
    """Go on as soon as something has happened; it must happen before the process ends."""
    end = time.monotonic() + seconds
    while not reached():
        if process is not None and process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[1]}")
        if time.monotonic() > end:
            pytest.fail("nothing happened")
        time.sleep(0.02)


def rows(run: Path) -> int:
    curve = run / "curve.csv"
    return len(curve.read_bytes().splitlines()) if curve.exists() else 0


def digest(run: Path) -> str:
    found: str = json.loads((run / "result.json").read_text(encoding="utf-8"))["digest"]
    return found


def alone(data: Path, prompts: Path, budget: int, run: Path) -> str:
    """What the run finds undisturbed, in this process."""
    settings = {"task": "lcqmc", "data": str(data), "prompts": str(prompts), "seed": 1, "threads": 1}
    return bbprompt.tune(**settings, budget=budget, set=ROUTERLESS, run_dir=run).digest


def test_runs_on_ray_find_what_they_find_here_and_one_that_fails_is_named(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, temporary: Path
) -> None:
    task = tmp_path / "other.yaml"
    task.write_text(yaml.safe_dump(tiny_prompt.PAIR | {"labels": {"7": "x", "8": "y"}}, allow_unicode=True), "utf-8")
    out = tmp_path / "sweep"
    words = flags(tiny_pair_data, tiny_prompts, out, tasks=f"{task},lcqmc")
    done = start([*words, "--workers", "2", "--json"], temporary)
    told, said = done.communicate(timeout=200)
    assert done.returncode == 65, said
    (line,) = told.splitlines()
    assert json.loads(line)["counts"] | {"done": 1, "failed": 1} == json.loads(line)["counts"]
    (failed,) = json.loads(line)["failed"]
    assert (failed["run"], failed["exit"]) == ("other-mp2-deep-1", 65)
    assert "label" in failed["error"]
    assert digest(out / "lcqmc-mp2-deep-1") == alone(tiny_pair_data, tiny_prompts, 44, tmp_path / "alone")
    assert json.loads((out / "lcqmc-mp2-deep-1" / "manifest.json").read_text())["threads"] == 1
    assert not list(temporary.glob("bbray-*")), "its own Ray is cleared away"


def test_a_killed_driver_takes_its_runs_along_and_a_signal_stops_them(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, temporary: Path
) -> None:
    out = tmp_path / "sweep"
    run = out / "lcqmc-mp2-deep-1"
    killed = start(flags(tiny_pair_data, tiny_prompts, out, budget=str(LONG)), temporary)
    until(lambda: rows(run) > 3, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    until(lambda: not locked(run))
    assert not (run / "result.json").exists(), "finished before anything happened"
    before = rows(run)
    stopped = start(["sweep", "--out", str(out), "--json"], temporary)
    until(lambda: locked(run) and rows(run) > before + 1, stopped)
    stopped.send_signal(signal.SIGTERM)
    told, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, said
    assert json.loads(told.splitlines()[-1])["counts"]["stopped"] == 1
    assert not locked(run)
    log = (out / "logs" / "lcqmc-mp2-deep-1.log").read_text(encoding="utf-8")
    assert "stopped by SIGTERM" in log.splitlines()[-1]
    # To the end without Ray: where a run is worked on is not part of what it is.
    assert cli.run(["sweep", "--out", str(out), "--quiet", "--json"]) == 0
    assert digest(run) == alone(tiny_pair_data, tiny_prompts, LONG, tmp_path / "alone")


def grid(data: Path, prompts: Path, seeds: list[int], **more: object) -> Experiment:
    settings = {"data": str(data), "prompts": str(prompts), "budget": 20_000, "threads": 1, "set": ROUTERLESS}
    return experiment_from(None, {"tasks": ["lcqmc"], "methods": ["mp2-deep"], "seeds": seeds}, settings | more)


def test_what_happens_to_a_run(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, temporary: Path) -> None:
    """On one cluster of one CPU, for every Ray takes its time to start."""
    out = tmp_path / "sweep"
    experiment = grid(tiny_pair_data, tiny_prompts, [1, 2, 3])
    first, second, third = write_sweep(out, experiment, None)
    runs, at_once = open_ray_runs("local", {cell.name: cell for cell in (first, second, third)}, cores=1)
    try:
        assert at_once == 1
        job = runs.start(first, out)
        until(lambda: rows(out / first.name) > 2)
        # There is no room for a second one: it is given up at once when it is asked to stop.
        waiting = runs.start(second, out)
        assert waiting.poll() is None
        waiting.stop()
        assert (waiting.wait(), waiting.last_words()) == (75, "stopped before it began")
        assert not (out / second.name).exists()
        assert job.poll() is None
        job.kill()
        assert job.wait() == -9
        until(lambda: not locked(out / first.name))
        lost(runs, third, out)
    finally:
        runs.close()
        runs.close()


def lost(runs: RayRuns, cell: Cell, out: Path) -> None:
    """The process that holds a run is killed: Ray must start nothing again, and the run must stop."""
    job = runs.start(cell, out)
    until(lambda: rows(out / cell.name) > 2)
    pid = int((out / cell.name / "run.lock").read_text())
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert job.wait() == 69
    assert "was lost" in job.last_words()
    assert "sweep again to go on" in job.last_words()
    until(lambda: not locked(out / cell.name))
    assert not (out / cell.name / "result.json").exists()


def test_a_machine_that_sees_something_else(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    (cell,) = grid(tiny_pair_data, tiny_prompts, [1]).cells()
    runner = _Runner()
    code, words = runner.work(cell, str(tmp_path), "0" * 64, bbprompt.__version__, {})
    assert code == 74
    assert "--out must lie on a file system that all machines share" in words
    code, words = runner.work(cell, str(tmp_path), "0" * 64, "0.0.0", {})
    assert code == 69
    assert "install the same version on all machines" in words
    runner.stop()
    (tmp_path / "sweep.json").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of nothing
    assert runner.work(cell, str(tmp_path), empty, bbprompt.__version__, {}) == (75, "stopped before it began")


def test_runs_that_use_ray_themselves_are_refused(tiny_pair_data: Path, tiny_prompts: Path) -> None:
    (cell,) = grid(tiny_pair_data, tiny_prompts, [1], ray="local").cells()
    with pytest.raises(UsageError, match="use Ray themselves"):
        open_ray_runs("local", {cell.name: cell})
