"""`bbprompt sweep` at work on tiny models: real processes, real kills."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_prompt
import yaml
from processes import rows, start, until
from rich.console import Console

import bbprompt
from bbprompt import cli
from bbprompt.commands.sweepview import SweepView
from bbprompt.sweep.experiment import experiment_from
from bbprompt.sweep.job import locked
from bbprompt.sweep.runner import Failure, Sweep, read_sweep

pytestmark = pytest.mark.slow

BUDGET = 600


def flags(data: Path, prompts: Path, out: Path, **grid: str) -> list[str]:
    grid = {"tasks": "lcqmc", "methods": "mp2-deep", "seeds": "1,2", "budget": "44"} | grid
    words = ["sweep", "--data", str(data), "--prompts", str(prompts), "--out", str(out), "--threads", "1"]
    return [*words, "--set", "router=null", *(part for key, value in grid.items() for part in (f"--{key}", value))]


def digests(out: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["digest"] for path in sorted(out.glob("*/result.json"))}


def test_killed_stopped_and_gone_on_with(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    run = out / "lcqmc-mp2-deep-1"
    # The sweep is killed while a run is under way: the run notices, stops, and leaves nothing half written.
    killed = start(flags(tiny_pair_data, tiny_prompts, out, budget=str(BUDGET), seeds="1"))
    until(killed, lambda: rows(run) > 3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    # Stopped by a signal: exit code 75, the result says so, and how to go on. If the run of the killed sweep is not
    # gone yet, it is waited for.
    log = out / "logs" / "lcqmc-mp2-deep-1.log"
    stopped = start(["sweep", "--out", str(out), "--json"])
    until(stopped, lambda: log.read_bytes().count(b"budget: ") == 2 and rows(run) > 6)
    assert "stopped by SIGTERM" in log.read_text(encoding="utf-8")
    stopped.send_signal(signal.SIGTERM)
    told, said = stopped.communicate()
    assert stopped.returncode == 75, said
    assert said.splitlines()[-1] == f"stopped by SIGTERM; go on with: bbprompt sweep --out {out}"
    assert json.loads(told.splitlines()[-1])["counts"]["stopped"] == 1
    assert not locked(run)
    assert digests(out) == {}
    # And to the end, with nothing said but where.
    assert cli.run(["sweep", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["counts"]["done"] == 1
    # The run found what it finds undisturbed.
    found = bbprompt.tune(
        task="lcqmc",
        data=str(tiny_pair_data),
        prompts=str(tiny_prompts),
        budget=BUDGET,
        seed=1,
        threads=1,
        set={"router": None},
        run_dir=tmp_path / "alone",
    )
    assert digests(out) == {"lcqmc-mp2-deep-1": found.digest}


def test_a_failed_run_and_a_grown_grid(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "other.yaml"
    task.write_text(yaml.safe_dump(tiny_prompt.PAIR | {"labels": {"7": "x", "8": "y"}}, allow_unicode=True), "utf-8")
    out = tmp_path / "sweep"
    words = flags(tiny_pair_data, tiny_prompts, out, tasks=f"{task},lcqmc", seeds="1")
    assert cli.run([*words, "--workers", "2"]) == 65
    told, said = capsys.readouterr()
    assert told.startswith("2 runs: 1 done, 1 failed\nfailed: other-mp2-deep-1: ")
    assert "(exit 65)" in told
    assert "other-mp2-deep-1: failed: " in said
    assert list(digests(out)) == ["lcqmc-mp2-deep-1"]
    # Another grid in the same directory is refused, but it may grow; what is done stays as it is.
    assert cli.run(flags(tiny_pair_data, tiny_prompts, out, seeds="1")) == 2
    assert "the run other-mp2-deep-1 is not in the grid" in capsys.readouterr().err
    before = (out / "lcqmc-mp2-deep-1" / "result.json").stat().st_mtime_ns
    (tmp_path / "right").mkdir()
    right = tmp_path / "right" / "sweep"
    (out / "sweep.json").unlink()
    out.rename(right)
    assert cli.run(flags(tiny_pair_data, tiny_prompts, right, seeds="1")) == 2
    assert "not empty" in capsys.readouterr().err
    assert (right / "lcqmc-mp2-deep-1" / "result.json").stat().st_mtime_ns == before


def test_done_runs_are_not_repeated_and_paired(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    assert cli.run([*flags(tiny_pair_data, tiny_prompts, out, seeds="1"), "--quiet"]) == 0
    capsys.readouterr()
    before = (out / "lcqmc-mp2-deep-1" / "result.json").stat().st_mtime_ns
    more = flags(tiny_pair_data, tiny_prompts, out, seeds="1", methods="mp2-deep,mp2-deep-code")
    assert cli.run([*more, "--json", "--quiet"]) == 0
    told, said = capsys.readouterr()
    assert said == ""
    assert [run["state"] for run in json.loads(told)["runs"]] == ["done", "done"]
    assert (out / "lcqmc-mp2-deep-1" / "result.json").stat().st_mtime_ns == before
    splits = {
        json.loads((out / f"lcqmc-{name}-1" / "manifest.json").read_text(encoding="utf-8"))["data"]["few_shot"]
        for name in ("mp2-deep", "mp2-deep-code")
    }
    assert len(splits) == 1
    assert cli.run(["compare", str(out)]) == 0
    assert "| mp2-deep-code | mp2-deep |" in capsys.readouterr().out
    assert cli.run(["report", str(out), "--out", str(tmp_path / "r.html"), "--quiet"]) == 0


def test_the_flags_of_tune_are_settings_of_every_run(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bbprompt.sweep.runner.run_sweep", lambda *_: None)
    more = ["--allow-overlap", "--on-doubt", "charge", "--no-baselines", "--quiet"]
    assert cli.run([*flags(tiny_pair_data, tiny_prompts, tmp_path / "out"), *more]) == 75  # nothing is done yet
    experiment = read_sweep(tmp_path / "out")
    assert experiment is not None
    for cell in experiment.cells():
        config = cell.config
        assert (config.allow_overlap, config.on_doubt, config.baselines) == (True, "charge", False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "lcqmc", "--methods", "mp2-deep"], "--seeds is missing"),
        (["--tasks", "lcqmc", "--methods", "mp2-deep", "--seeds", "1,x"], "--seeds 1,x: expected whole numbers"),
        (["--tasks", "lcqmcc", "--methods", "mp2-deep", "--seeds", "1"], "lcqmcc"),
        (["--tasks", "lcqmc", "--methods", "mp2-deep", "--seeds", "1", "--ray", "nowhere"], "expected local, auto or"),
        (["--config", "main-tabel"], "did you mean 'main-table'"),
        (["--config", "main-table", "--set", "prompt.sigmaa=1"], "prompt.sigmaa"),
    ],
)
def test_wrong_use_begins_nothing(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["sweep", *words, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_live_table(tmp_path: Path) -> None:
    grid: dict[str, Any] = {"tasks": ["lcqmc"], "methods": ["mp2-deep"], "seeds": [1, 2, 3]}
    cells = {cell.name: cell for cell in experiment_from(None, grid, {"budget": 50}).cells()}
    state = Sweep(tmp_path, cells)
    first, second, third = cells
    (tmp_path / first).mkdir()
    (tmp_path / first / "curve.csv").write_text("calls,stage,train_loss,best_dev,seconds\n14,prompt,0.5,0.25,1.0\n")
    state.running = {first: 0.0, second: 90.0}
    state.failed[third] = Failure(65, "[bold]no such label")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with SweepView(console, clock=lambda: 100.0) as view:
        view.show(state)
    text = stream.getvalue()
    assert "3 runs: 0 done, 2 running, 1 failed" in text
    for part in ("prompt", "14/50", "0.250", "2 min", "loading", "10 s", f"failed: {third}: [bold]no such label"):
        assert part in text
