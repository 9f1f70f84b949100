"""Comparisons: the table, the differences and what they rest on, against numbers by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from fakeruns import fake_run

from bbprompt import cli
from bbprompt.compare.comparison import Comparison, Row, compare
from bbprompt.compare.runs import read_runs
from bbprompt.compare.text import as_json, csv_files, markdown
from bbprompt.errors import DiskError, UsageError
from bbprompt.sweep.experiment import experiment_from
from bbprompt.sweep.runner import write_sweep

#: Deep and shallow test scores by task and seed; thucnews is seen, lcqmc and tnews are unseen, drcd (F1) too.
SCORES = {
    ("thucnews", 1): (0.60, 0.50),
    ("thucnews", 2): (0.64, 0.58),
    ("lcqmc", 1): (0.70, 0.72),
    ("lcqmc", 2): (0.80, 0.71),
    ("tnews", 1): (0.40, 0.40),
    ("tnews", 2): (0.50, 0.41),
}
METHODS = ("mp2-deep", "mp2-shallow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for (task, seed), values in SCORES.items():
        for method, value in zip(METHODS, values, strict=True):
            before = 0.55 if method == "mp2-deep" else 0.45
            fake_run(tmp_path, task, method, seed, value, before=before, upstream=value - 0.01)
    return tmp_path


def compared(folder: Path, **keys: Any) -> Comparison:
    return compare(*read_runs(folder), **keys)


def row(found: Comparison, name: str) -> Row:
    return next(each for each in found.rows if each.name == name)


def test_the_table(folder: Path) -> None:
    found = compared(folder)
    assert found.tasks == ("thucnews", "lcqmc", "tnews")
    assert found.groups == {"seen": ("thucnews",), "unseen": ("lcqmc", "tnews")}
    assert [each.name for each in found.rows] == [
        "most frequent label",
        "before (mp2-deep)",
        "before (mp2-shallow)",
        *METHODS,
    ]
    deep = row(found, "mp2-deep")
    assert deep.cells["lcqmc"].mean == pytest.approx(0.75)
    assert deep.cells["lcqmc"].sd == pytest.approx(0.05 * math.sqrt(2))
    # The average's deviation is over seeds: seed 1 has (.70 + .40) / 2, seed 2 (.80 + .50) / 2.
    assert deep.averages["unseen"].mean == pytest.approx(0.60)
    assert deep.averages["unseen"].sd == pytest.approx(0.05 * math.sqrt(2))
    assert deep.averages["all"].mean == pytest.approx((0.62 + 0.75 + 0.45) / 3)
    assert row(found, "before (mp2-deep)").averages["all"].mean == pytest.approx(0.55)


def test_the_best_cheap_method_is_a_row(tmp_path: Path) -> None:
    for seed, cheap in ((1, {"zero-shot": 0.6, "logistic": 0.7}), (2, {"zero-shot": 0.66, "logistic": 0.5})):
        fake_run(tmp_path, "tnews", "mp2-deep", seed, 0.5, baselines=cheap)
    found = compared(tmp_path)
    assert [each.name for each in found.rows] == ["most frequent label", "best cheap method", "before", "mp2-deep"]
    assert row(found, "best cheap method").cells["tnews"].mean == pytest.approx(0.68)
    against = next(each for each in found.differences if each.against == "best cheap method")
    assert against.found.mean == pytest.approx(-0.18)


def test_runs_of_cheap_methods_count_among_them(tmp_path: Path) -> None:
    for seed, (zero, mean, deep, shallow) in {1: (0.6, 0.55, 0.5, 0.8), 2: (0.5, 0.62, 0.7, 0.6)}.items():
        fake_run(tmp_path, "tnews", "zero-shot", seed, zero)
        fake_run(tmp_path, "tnews", "nearest-mean", seed, mean)
        fake_run(tmp_path, "tnews", "mp2-deep", seed, deep, baselines={"logistic": 0.52})
        fake_run(tmp_path, "tnews", "mp2-shallow", seed, shallow, baselines={"logistic": 0.64})
    found = compared(tmp_path)
    cheap = row(found, "best cheap method").cells["tnews"]
    assert (cheap.mean, cheap.n) == (pytest.approx(0.64), 2)
    against = {each.method: each.found.mean for each in found.differences if each.against == "best cheap method"}
    assert against == {"mp2-deep": pytest.approx(0.6 - 0.64), "mp2-shallow": pytest.approx(0.7 - 0.64)}
    assert [note for note in found.notes if "elow" in note] == [
        "On average below the best cheap method, which tunes no prompt: mp2-deep (by 4.0 points).",
        "Below the best cheap method on single tasks: mp2-deep on tnews.",
    ]
    lines = {line["run"]: line for line in csv.DictReader(io.StringIO(csv_files(found)["runs.csv"]))}
    assert (lines["tnews-mp2-deep-2"]["cheap_method"], lines["tnews-mp2-deep-2"]["cheap_test"]) == ("logistic", "0.64")
    # One that saw other few-shot examples says nothing about this run.
    fake_run(tmp_path, "tnews", "logistic", 1, 0.9, split="another")
    against = {
        each.method: each.found.mean for each in compared(tmp_path).differences if each.against == "best cheap method"
    }
    assert against["mp2-deep"] == pytest.approx(0.6 - 0.64)


def test_no_method_is_named_where_none_is_below_the_cheap_ones(tmp_path: Path) -> None:
    fake_run(tmp_path, "lcqmc", "threshold", 1, 0.6)
    fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6)
    assert not [note for note in compared(tmp_path).notes if "elow" in note]
    # What is behind on one task and ahead on average is named where it is behind.
    for task, cheap, tuned in (("tnews", 0.5, 0.9), ("ocnli", 0.5, 0.4)):
        fake_run(tmp_path, task, "zero-shot", 1, cheap)
        fake_run(tmp_path, task, "mp2-deep", 1, tuned)
    (note,) = [note for note in compared(tmp_path).notes if "elow" in note]
    assert note == "Below the best cheap method on single tasks: mp2-deep on ocnli."


def test_what_a_run_takes(tmp_path: Path) -> None:
    for seed, (calls, seconds) in {1: (80, 10.0), 2: (95, 30.0)}.items():
        fake_run(tmp_path, "lcqmc", "mp2-deep", seed, 0.7, train_calls=calls, seconds=seconds)
        fake_run(tmp_path, "lcqmc", "threshold", seed, 0.7, train_calls=1, seconds=2.0)
    found = compared(tmp_path)
    costs = {each.method: (each.runs, each.calls, each.seconds, each.oracle_seconds) for each in found.costs}
    assert costs == {"mp2-deep": (2, 97.5, 20.0, 7.0), "threshold": (2, 11.0, 2.0, 7.0)}
    assert "| mp2-deep | 2 | 98 | 20 | 7 |" in markdown(found)
    written = {line["method"]: line for line in csv.DictReader(io.StringIO(csv_files(found)["costs.csv"]))}
    assert (written["mp2-deep"]["calls"], written["mp2-deep"]["seconds"]) == ("97.5", "20.0")


def test_methods_with_the_same_start_share_a_row(tmp_path: Path) -> None:
    for method in METHODS:
        fake_run(tmp_path, "lcqmc", method, 1, 0.6)
    assert [each.name for each in compared(tmp_path).rows] == ["most frequent label", "before", *METHODS]


def test_stages_are_rows(folder: Path) -> None:
    found = compared(folder, stages=True)
    assert row(found, "mp2-deep, after upstream").cells["lcqmc"].mean == pytest.approx(0.74)
    assert "mp2-deep, after prompt" not in [each.name for each in found.rows]


def test_a_stage_that_is_the_last_one_of_some_runs_is_whole(tmp_path: Path) -> None:
    fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6, prompt=0.55)
    fake_run(tmp_path, "drcd", "mp2-deep", 1, 0.7)
    found = compared(tmp_path, stages=True)
    after = row(found, "mp2-deep, after prompt").cells
    assert after["lcqmc"].mean == pytest.approx(0.55)
    assert after["drcd"].mean == pytest.approx(0.7)
    assert "mp2-deep, after calibration" not in [each.name for each in found.rows]


def test_differences_are_paired(folder: Path) -> None:
    found = {(each.method, each.against, each.group): each for each in compared(folder).differences}
    deep = found["mp2-shallow", "mp2-deep", "all"].found
    differences = [round(b - a, 12) for a, b in SCORES.values()]
    assert (deep.pairs, deep.tasks, deep.better, deep.worse) == (6, 3, 1, 4)
    assert deep.mean == pytest.approx(sum(differences) / 6)
    assert deep.p == scipy.stats.wilcoxon([value for value in differences if value]).pvalue
    assert deep.low < deep.mean < deep.high
    assert found["mp2-deep", "before", "unseen"].found.mean == pytest.approx(0.60 - 0.55)
    assert ("mp2-deep", "mp2-deep", "all") not in found
    assert all(each.p >= each.found.p for each in found.values())
    other = compared(folder, baseline="mp2-shallow").differences
    assert {(each.method, each.against) for each in other} >= {("mp2-deep", "mp2-shallow")}


def test_missing_runs_are_named_and_change_no_average(folder: Path) -> None:
    whole = row(compared(folder), "mp2-deep")
    (folder / "tnews-mp2-deep-2" / "result.json").unlink()
    found = compared(folder)
    assert [(run.name, run.state) for run in found.missing] == [("tnews-mp2-deep-2", "stopped")]
    deep = row(found, "mp2-deep")
    assert deep.cells["tnews"].n == 1
    assert deep.averages["unseen"].n == 1  # seed 1 alone has both tasks
    assert deep.averages["unseen"].mean == pytest.approx(0.55)
    assert deep.averages["seen"] == whole.averages["seen"]
    pairs = {each.found.pairs for each in found.differences if each.group == "all" and each.method == "mp2-deep"}
    assert pairs == {5}
    text = markdown(found)
    assert "1 of 12 runs are missing" in text
    assert "- tnews-mp2-deep-2: stopped" in text
    assert "40.0 n=1" in text


def test_a_sweep_knows_what_there_should_be(tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid = {"tasks": ["lcqmc", "tnews"], "methods": ["mp2-deep"], "seeds": [1]}
    variants = {"variants": {"full": {}, "few": {"shots": 4}}}
    write_sweep(out, experiment_from(None, grid | variants, {}), None)
    fake_run(out, "lcqmc", "mp2-deep", 1, 0.8, named="lcqmc-mp2-deep-full-1", split="one")
    fake_run(out, "lcqmc", "mp2-deep", 1, 0.7, named="lcqmc-mp2-deep-few-1", split="another")
    fake_run(out, "tnews", "mp2-deep", 1, None, named="tnews-mp2-deep-full-1")
    found = compared(out)
    assert [each.name for each in found.rows] == ["most frequent label", "before", "mp2-deep full", "mp2-deep few"]
    assert [(run.name, run.state) for run in found.missing] == [
        ("tnews-mp2-deep-full-1", "stopped"),
        ("tnews-mp2-deep-few-1", "not begun"),
    ]
    # No average over the one task of two that is there.
    assert row(found, "mp2-deep full").averages == {}
    assert any("few-shot examples differ" in note and "lcqmc" in note for note in found.notes)


def test_rows_stand_in_the_order_of_the_grid(tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid = {"tasks": ["tnews", "lcqmc"], "methods": ["mp2-shallow", "mp2-deep"], "seeds": [1, 2]}
    write_sweep(out, experiment_from(None, grid, {}), None)
    fake_run(out, "lcqmc", "mp2-deep", 1, 0.8)
    fake_run(out, "tnews", "mp2-shallow", 2, 0.8)
    found = compared(out)
    assert [each.name for each in found.rows][-2:] == ["mp2-shallow", "mp2-deep"]
    assert found.tasks == ("tnews", "lcqmc")


def test_curves_hold_their_last_value(tmp_path: Path) -> None:
    fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6, curve=[(2, "start", 0.7, 0.5), (40, "prompt", 0.4, 0.75)])
    fake_run(tmp_path, "lcqmc", "mp2-deep", 2, 0.6, curve=[(4, "start", 0.7, 0.25), (20, "prompt", 0.4, 1.0)])
    (found,) = compared(tmp_path).anytime
    assert found.values == {4: 0.375, 10: 0.375, 20: 0.75, 40: 0.875}
    assert found.area == pytest.approx((16 * 0.375 + 20 * 0.75 + 0.875) / 37)


def test_curves_are_over_the_tasks_that_all_searches_have(tmp_path: Path) -> None:
    for method, tasks in {"mp2-deep": ("lcqmc", "drcd"), "mp2-proto": ("lcqmc",), "threshold": ("lcqmc",)}.items():
        for task in tasks:
            fake_run(tmp_path, task, method, 1, 0.6, curve=[(2, "start", 0.7, 0.7 if task == "lcqmc" else 0.1)])
    fake_run(tmp_path, "tnews", "zero-shot", 1, 0.6, curve=[(2, "start", 0.7, 0.9)])
    found = {each.method: (each.runs, each.area) for each in compared(tmp_path).anytime}
    assert found == {"mp2-deep": (1, 0.7), "mp2-proto": (1, 0.7), "threshold": (1, 0.7)}
    assert not any("no table" in note for note in compared(tmp_path).notes)
    fake_run(tmp_path, "tnews", "mp2-shallow", 1, 0.6)
    assert not compared(tmp_path).anytime
    assert any("no table of dev scores" in note for note in compared(tmp_path).notes)


def test_methods_without_a_shared_run_have_rows_of_their_own_before(tmp_path: Path) -> None:
    fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6, before=0.6)
    fake_run(tmp_path, "lcqmc", "mp2-shallow", 2, 0.6, before=0.8)
    rows = {each.name: each.cells["lcqmc"].mean for each in compared(tmp_path).rows if each.name.startswith("before")}
    assert rows == {"before (mp2-deep)": 0.6, "before (mp2-shallow)": 0.8}


def test_a_lost_curve_costs_the_curve_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "lcqmc-mp2-deep-1" / "curve.csv").write_text("nonsense")
    found = compared(folder)
    assert {each.method: each.runs for each in found.anytime} == {"mp2-deep": 5, "mp2-shallow": 5}
    assert "left out of the curves" in caplog.text


def test_what_a_reader_must_know(tmp_path: Path) -> None:
    fake_run(tmp_path, "lcqmc", "mp2-deep", 1, 0.6, source="sample", budget=50, majority=0.0)
    fake_run(tmp_path, "lcqmc", "mp2-shallow", 1, 0.6, split="other")
    notes = " ".join(compared(tmp_path).notes)
    for said in ("bundled sample", "few-shot examples differ", "budgets differ: 50, 100", "1 seed only", "4.0 points"):
        assert said in notes


def test_wrong_directories(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no run directories"):
        read_runs(tmp_path)
    path = fake_run(tmp_path, "lcqmc", "mp2-deep", 1, None)
    with pytest.raises(UsageError, match="no run is finished, 1 are missing"):
        compared(tmp_path)
    (path / "result.json").write_text("{}")
    with pytest.raises(DiskError, match=r"result.json: damaged"):
        compared(tmp_path)
    (path / "result.json").unlink()
    fake_run(tmp_path, "lcqmc", "mp2-deep", 2, 0.5, named="a")
    fake_run(tmp_path, "lcqmc", "mp2-deep", 2, 0.5, named="b")
    with pytest.raises(UsageError, match=r"/a and .*/b are both mp2-deep on lcqmc with seed 2"):
        compared(tmp_path)


def test_several_directories_are_read_as_one(tmp_path: Path) -> None:
    grid = {"tasks": ["lcqmc"], "methods": ["mp2-deep"], "seeds": [1, 2]}
    write_sweep(tmp_path / "a", experiment_from(None, grid, {}), None)
    first = fake_run(tmp_path / "a", "lcqmc", "mp2-deep", 1, 0.6)
    second = fake_run(tmp_path / "b", "lcqmc", "mp2-deep", 2, 0.7)
    fake_run(tmp_path / "b", "lcqmc", "bbt", 3, None)
    runs, missing = read_runs(tmp_path / "a", tmp_path / "b")
    assert [run.result.seed for run in runs] == [1, 2]
    assert [run.name for run in missing] == ["lcqmc-bbt-3"]  # seed 2 is missing in the first alone
    assert len({each.place for each in [*runs, *missing]}) == 3
    assert row(compare(runs, missing), "mp2-deep").cells["lcqmc"].mean == pytest.approx(0.65)
    # Directories of the same name in different sweeps are different runs.
    fake_run(tmp_path / "c", "lcqmc", "mp2-shallow", 1, 0.5, named="x", baselines={"threshold": 0.8})
    fake_run(tmp_path / "d", "tnews", "mp2-shallow", 1, 0.5, named="x", baselines={"zero-shot": 0.4})
    cheap = row(compare(*read_runs(tmp_path / "c", tmp_path / "d")), "best cheap method").cells
    assert {task: spread.mean for task, spread in cheap.items()} == {"lcqmc": 0.8, "tnews": 0.4}
    shutil.copytree(first, tmp_path / "b" / first.name)
    with pytest.raises(UsageError, match=f"{first} and {second.with_name(first.name)} are both"):
        read_runs(tmp_path / "a", tmp_path / "b")


def test_csv_and_json_hold_fractions(folder: Path) -> None:
    files = csv_files(compared(folder))
    table = {line["method"]: line for line in csv.DictReader(io.StringIO(files["table.csv"]))}
    assert float(table["mp2-deep"]["lcqmc"]) == pytest.approx(0.75)
    assert float(table["mp2-deep"]["mean unseen sd"]) == pytest.approx(0.05 * math.sqrt(2))
    runs = list(csv.DictReader(io.StringIO(files["runs.csv"])))
    assert len(runs) == 12
    assert {line["test"] for line in runs if line["run"] == "lcqmc-mp2-deep-2"} == {"0.8"}
    assert {line["test_after_upstream"] for line in runs if line["run"] == "lcqmc-mp2-deep-2"} == {"0.79"}
    assert {line["test_after_prompt"] for line in runs if line["run"] == "lcqmc-mp2-deep-2"} == {"0.8"}
    assert len(list(csv.DictReader(io.StringIO(files["differences.csv"])))) == 15
    values = as_json(compared(folder))
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path.parent / f"{tmp_path.name}-tables"
    words = ["compare", str(folder), "--baseline", "mp2-shallow"]
    assert cli.run([*words, "--out", str(out), "--csv", str(out) + ".csv"]) == 0
    text = capsys.readouterr().out
    assert "| mp2-deep | 62.0 (2.8) | 62.0 (2.8) | 75.0 (7.1) | 45.0 (7.1) | 60.0 (7.1) | 60.7 (5.7) |" in text
    names = ["compare.md", "costs.csv", "curves.csv", "differences.csv", "runs.csv", "table.csv"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "compare.md").read_text(encoding="utf-8") == text
    assert (out / "table.csv").read_text() == Path(str(out) + ".csv").read_text()
    assert cli.run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"] == 12
    assert cli.run(["compare", str(folder), "--baseline", "mp2-deeq"]) == 2
    assert "did you mean 'mp2-deep'" in capsys.readouterr().err
    assert cli.run([*words, "--csv", str(tmp_path)]) == 74
