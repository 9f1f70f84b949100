"""Runs side by side: what lies in a directory of runs, read for tables and curves."""

from __future__ import annotations

import csv
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbprompt.errors import DiskError, UsageError
from bbprompt.result import Result, read_result
from bbprompt.store.rundir import CURVE, CURVE_COLUMNS, MANIFEST, RunDirectory
from bbprompt.sweep.experiment import row_name
from bbprompt.sweep.runner import SWEEP, read_sweep
from bbprompt.tasks.task import load_task

__all__ = ["Curve", "FinishedRun", "Missing", "read_curve", "read_runs"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Curve:
    """The curve of a run, a value a row; `dev` is NaN before the first look."""

    calls: tuple[int, ...]
    stage: tuple[str, ...]
    loss: tuple[float, ...]
    dev: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A finished run.

    Attributes:
        place: Where it stands among all runs, missing ones included.
        name: Of its directory.
        row: Method, with the variant of the sweep.
        track: Of the task: "seen", "unseen", ... or "".
        split: Digest of its few-shot split.
        test: Digest of its test examples.
        baseline: Whether its method tunes no prompt.
        result: What it found.
        curve: Its curve; None if the file is not there.
    """

    place: int
    name: str
    row: str
    track: str
    split: str
    test: str
    baseline: bool
    result: Result
    curve: Curve | None


@dataclass(frozen=True, slots=True)
class Missing:
    """A run without a result; `state` is "stopped" or "not begun"."""

    place: int
    name: str
    row: str
    task: str
    track: str
    seed: int
    state: str


def read_runs(*folders: Path) -> tuple[list[FinishedRun], list[Missing]]:
    """Read all runs of one or more directories; what is missing in one and finished in another is not missing.

    Args:
        folders: Each that of a sweep, which says what there should be, or any directory with run directories in it.

    Raises:
        UsageError: There are no runs, or two of the same task, method and seed.
        DiskError: A file of a run is damaged.
    """
    found: list[FinishedRun] = []
    missing: list[Missing] = []
    known: dict[tuple[str, str, int], Path] = {}
    for folder in folders:
        runs, absent = _read_folder(folder, len(found) + len(missing))
        for run in runs:
            key = (run.result.task, run.row, run.result.seed)
            if key in known:
                raise UsageError(
                    f"{known[key]} and {folder / run.name} are both {key[1]} on {key[0]} with seed {key[2]}; move one "
                    "of them away, or let `bbprompt sweep` name variants"
                )
            known[key] = folder / run.name
        found += runs
        missing += absent
    return found, [run for run in missing if (run.task, run.row, run.seed) not in known]


def _read_folder(folder: Path, begin: int) -> tuple[list[FinishedRun], list[Missing]]:
    """The runs of one directory; the first has the place `begin`."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such directory; give one that `bbprompt sweep --out` wrote")
    experiment = read_sweep(folder)
    found: list[FinishedRun] = []
    missing: list[Missing] = []
    if experiment is not None:
        for place, cell in enumerate(experiment.cells(), begin):
            run = _read(place, folder / cell.name, cell.row) if (folder / cell.name / MANIFEST).is_file() else None
            if run is not None:
                found.append(run)
                continue
            state = "stopped" if (folder / cell.name / MANIFEST).is_file() else "not begun"
            task = load_task(cell.config.task)
            missing.append(Missing(place, cell.name, cell.row, task.name, task.track or "", cell.config.seed, state))
        return found, missing
    paths = sorted(path for path in folder.iterdir() if (path / MANIFEST).is_file())
    if not paths:
        raise UsageError(f"{folder}: no {SWEEP} and no run directories in it")
    for place, path in enumerate(paths, begin):
        run = _read(place, path, None)
        if run is not None:
            found.append(run)
        else:
            missing.append(_unfinished(place, path))
    return found, missing


def _read(place: int, path: Path, row: str | None) -> FinishedRun | None:
    """A run, or None if it is not finished."""
    with RunDirectory.open(path, writable=False) as directory:
        if not directory.finished:
            return None
        manifest, result = directory.manifest, read_result(directory)
        curve = read_curve(directory)
    if curve is None:
        _log.warning("%s: the file is missing or damaged; this run is left out of the curves", path / CURVE)
    return FinishedRun(
        place=place,
        name=path.name,
        row=row or row_name(result.method, ""),
        track=_text(manifest, "task", "track"),
        split=_text(manifest, "data", "few_shot"),
        test=_text(manifest, "data", "test"),
        baseline=bool(_text(manifest, "method", "baseline")),
        result=result,
        curve=curve,
    )


def _unfinished(place: int, path: Path) -> Missing:
    with RunDirectory.open(path, writable=False) as directory:
        manifest = directory.manifest
    seed = _text(manifest, "config", "seed")
    task, method = _text(manifest, "task", "name"), _text(manifest, "method", "name")
    track = _text(manifest, "task", "track")
    return Missing(place, path.name, method, task, track, int(seed) if seed.isdecimal() else 0, "stopped")


def read_curve(directory: RunDirectory) -> Curve | None:
    """The curve of a run; None if there is none or it is not one."""
    try:
        text = directory.read_bytes(CURVE).decode("utf-8", "replace")
    except DiskError:
        return None
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or tuple(rows[0]) not in (CURVE_COLUMNS, CURVE_COLUMNS[:-1]):  # the latter in runs of earlier versions
        return None
    try:
        values = [(int(a), b, float(c), float(d) if d else float("nan")) for a, b, c, d, *_ in rows[1:]]
    except ValueError:
        return None
    calls, stages, losses, devs = zip(*values, strict=True) if values else ((), (), (), ())
    return Curve(calls, stages, losses, devs)


def _text(manifest: dict[str, Any], part: str, key: str) -> str:
    value = manifest.get(part)
    found = value.get(key) if isinstance(value, dict) else None
    return "" if found is None else str(found)
