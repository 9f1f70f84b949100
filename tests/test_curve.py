"""Seconds across resumes: summed over the parts of a run, whatever is left of its curve."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbprompt.store.curve import CurveClock
from bbprompt.store.rundir import RunDirectory

HEAD = "calls,stage,train_loss,best_dev,seconds,oracle_seconds\n"


def clock_of(folder: Path, curve: str) -> CurveClock:
    with RunDirectory.create(folder, {"a": 1}) as directory:
        (folder / "curve.csv").write_text(curve, encoding="utf-8")
        return CurveClock(directory)


def test_replayed_rows_keep_theirs_and_new_ones_count_on(tmp_path: Path) -> None:
    clock = clock_of(tmp_path / "run", HEAD + '2,"a, b",0.5,,1.5,1.0\n4,a,0.5,,3.0,2.25\n')
    assert clock.row(True, 0.0) == (1.5, 1.0)
    assert clock.row(True, 0.0) == (3.0, 2.25)
    total, oracle = clock.row(False, 0.5)
    assert 3.0 <= total <= clock.total
    assert oracle == clock.oracle(0.5) == 2.75


@pytest.mark.parametrize(
    ("curve", "left"),
    [
        ("", 0.0),
        (HEAD, 0.0),
        (HEAD + "2,a,0.5,,1.5,1.0\n4,a,0.5,,3.0,2.2", 1.0),
        (HEAD + "2,a,0.5,,1.5,1.0\n4,a,0.5,,3.0,0.5\n6,a,0.5,,4.0,3.0\n", 1.0),
        (HEAD + "2,a,0.5,,1.5,1.0\n4,a,0.5,,1.0,2.0\n", 1.0),
        (HEAD + "2,a,0.5,,1.5,1.0\n\0\0\0\n", 1.0),
        (HEAD + "2,a,0.5,,nan,1.0\n", 0.0),
        (HEAD + "2,a,0.5,,1.5,inf\n", 0.0),
        ("nonsense\n2,a,0.5,,1.5,1.0\n", 0.0),
    ],
)
def test_what_is_left_of_a_curve(curve: str, left: float, tmp_path: Path) -> None:
    clock = clock_of(tmp_path / "run", curve)
    assert clock.oracle(0.0) == left
    assert clock.total >= left


def test_a_curve_of_an_earlier_version_keeps_its_total(tmp_path: Path) -> None:
    clock = clock_of(tmp_path / "run", "calls,stage,train_loss,best_dev,seconds\n2,a,0.5,,1.5\n4,a,0.5,,2.5\n6,a,0.5")
    assert clock.row(True, 0.0) == (1.5, 0.0)
    assert 2.5 <= clock.total < 1000.0
