"""A sweep: the runs of an experiment, several at a time, resumable as a whole.

What is done is in the run directories alone; `sweep.json` only says what the grid is. So a sweep can be killed at
any moment: the next one skips finished runs, goes on with begun ones and starts the others. Two sweeps of one
directory share the work, for a run that another process has locked is waited for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bbprompt.errors import DiskError, UsageError
from bbprompt.jsontext import parse_json
from bbprompt.oneline import one_line
from bbprompt.store.disk import RealDisk, disk_error
from bbprompt.sweep.experiment import Cell, Experiment
from bbprompt.sweep.job import Job, finished, locked, put, start_local

__all__ = ["SWEEP", "Failure", "Sweep", "read_sweep", "run_sweep", "with_threads", "write_sweep"]

SWEEP = "sweep.json"
FORMAT = 1
_ELSEWHERE = ("ray", "workers")  # settings that say where a run is worked on, not what it is
_TICK = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that ended with an error: its exit code and its last line."""

    exit: int
    error: str


@dataclass(slots=True)
class Sweep:
    """How the runs of a grid stand.

    Attributes:
        out: The directory.
        cells: All runs by name, in order.
        unfit: Task and row of the tables -> why there are no runs of it.
        done: Finished runs.
        running: Runs of this process, with the time each was started.
        failed: Runs that ended with an error.
        stopped: Runs that were stopped and can be resumed.
        elsewhere: Runs that another process works on.
    """

    out: Path
    cells: dict[str, Cell]
    unfit: Mapping[tuple[str, str], str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    running: dict[str, float] = field(default_factory=dict)
    failed: dict[str, Failure] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)

    def state(self, name: str) -> str:
        """One of done, running, failed, stopped, elsewhere and waiting."""
        for state in ("done", "running", "failed", "stopped", "elsewhere"):
            if name in getattr(self, state):
                return state
        return "waiting"

    def counts(self) -> dict[str, int]:
        """State -> number of runs."""
        counts = dict.fromkeys(("done", "running", "failed", "stopped", "elsewhere", "waiting"), 0)
        for name in self.cells:
            counts[self.state(name)] += 1
        return counts

    @property
    def exit_code(self) -> int:
        """0, or that of the first failed run in the grid's order; 75 if nothing failed but something is left."""
        for name in self.cells:
            if name in self.failed:
                return self.failed[name].exit if 0 < self.failed[name].exit < 126 else 1
        return 0 if len(self.done) == len(self.cells) else 75

    def summary(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        return {
            "out": str(self.out),
            "counts": self.counts(),
            "unfit": [{"task": task, "method": name, "reason": why} for (task, name), why in self.unfit.items()],
            "failed": [
                {"run": name, "exit": failure.exit, "error": failure.error}
                for name, failure in sorted(self.failed.items(), key=lambda item: list(self.cells).index(item[0]))
            ],
            "runs": [{"run": name, "state": self.state(name), "run_dir": str(self.out / name)} for name in self.cells],
        }


def run_sweep(
    sweep: Sweep,
    workers: int,
    check: Callable[[], None],
    show: Callable[[Sweep], None],
    start: Callable[[Cell, Path], Job] = start_local,
) -> None:
    """Work through the grid; the sweep is kept up to date.

    Args:
        sweep: What to do and how it stands.
        workers: Runs at a time.
        check: Raises to stop everything; the runs are then asked to stop, and waited for.
        show: Told after every look at the processes.
        start: Starts a run; another one may spread the runs over machines that share the file system.

    Raises:
        DiskError: A file of the sweep cannot be written.
    """
    sweep.done |= {name for name in sweep.cells if finished(sweep.out / name)}
    jobs: dict[str, Job] = {}
    try:
        while (waiting := _waiting(sweep)) or jobs:
            check()
            for name in waiting:
                if len(jobs) >= workers:
                    break
                _begin(sweep, name, jobs, start)
            for name in list(jobs):
                code = jobs[name].poll()
                if code is not None:
                    _settle(sweep, name, code, jobs.pop(name))
            show(sweep)
            time.sleep(_TICK)
    finally:
        _stop(sweep, jobs)
        show(sweep)


def _waiting(sweep: Sweep) -> list[str]:
    """Runs to start, those that another process works on last."""
    names = [name for name in sweep.cells if sweep.state(name) in ("waiting", "elsewhere")]
    return sorted(names, key=lambda name: name in sweep.elsewhere)


def _begin(sweep: Sweep, name: str, jobs: dict[str, Job], start: Callable[[Cell, Path], Job]) -> None:
    run = sweep.out / name
    sweep.elsewhere.discard(name)
    if finished(run):
        sweep.done.add(name)
    elif locked(run):
        sweep.elsewhere.add(name)
    else:
        jobs[name] = start(sweep.cells[name], sweep.out)
        sweep.running[name] = time.monotonic()


def _settle(sweep: Sweep, name: str, code: int, job: Job) -> None:
    """Note how a run ended."""
    del sweep.running[name]
    job.stop()
    words = job.last_words()
    if finished(sweep.out / name):
        sweep.done.add(name)
    elif code and locked(sweep.out / name):
        sweep.elsewhere.add(name)  # another sweep was quicker; to be looked at again
    elif code == 75:
        sweep.stopped.add(name)
    else:
        said = words.removeprefix("error: ") or "nothing was said"
        sweep.failed[name] = Failure(code, f"killed by signal {-code}; sweep again to go on" if code < 0 else said)


def _stop(sweep: Sweep, jobs: dict[str, Job]) -> None:
    """Ask all runs to stop and wait for them; a further signal ends them at once."""
    try:
        for job in jobs.values():
            job.stop()
        for name in list(jobs):
            _settle(sweep, name, jobs[name].wait(), jobs[name])
            del jobs[name]
    except KeyboardInterrupt:
        for name, job in jobs.items():
            job.kill()
            job.wait()
            sweep.running.pop(name, None)
            sweep.stopped.add(name)


def read_sweep(out: Path) -> Experiment | None:
    """The experiment of a directory, None where there is none.

    Raises:
        DiskError: The file is damaged.
    """
    file = out / SWEEP
    if not file.is_file():
        return None
    try:
        data = parse_json(RealDisk().read(file))
        if data["format"] != FORMAT:
            found = one_line(str(data["format"]))[:80]
            raise UsageError(f"{file}: format {found} is not {FORMAT}; use a matching version of bbprompt")
        return Experiment.model_validate(data["experiment"])
    except (ValueError, LookupError, TypeError, ValidationError):
        raise DiskError(f"{file}: damaged or edited; restore it or choose another --out") from None


def with_threads(experiment: Experiment, before: Experiment | None, threads: int) -> Experiment:
    """The experiment with its threads said: they belong to the settings of a run, for they may change its result."""
    settings = dict(experiment.settings)
    if settings.get("threads") is None:
        settings["threads"] = threads if before is None else before.settings.get("threads", threads)
    return experiment.model_copy(update={"settings": settings})


def write_sweep(out: Path, experiment: Experiment, before: Experiment | None) -> tuple[Cell, ...]:
    """Write what the grid is, or grow it; the runs.

    Raises:
        UsageError: The directory's grid has runs or settings that this one has not, or it is no sweep's directory.
        DiskError: It cannot be written.
    """
    cells = experiment.cells()
    file = out / SWEEP
    if before is not None:
        _refuse_changes(file, before.cells(), cells)
        if before == experiment:
            return cells
    elif out.is_dir() and (found := sorted(path.name for path in out.iterdir() if not path.name.startswith("."))):
        raise UsageError(f"--out {out}: not empty ({found[0]}) and no {SWEEP} in it; choose another directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, "make this folder", out) from error
    put(file, {"format": FORMAT, "experiment": experiment.model_dump(mode="json")})
    return cells


def _refuse_changes(file: Path, before: Sequence[Cell], now: Sequence[Cell]) -> None:
    known = {cell.name: cell for cell in now}
    advice = "runs may be added, not changed or dropped; repeat the grid as it was or choose another --out"
    for old in before:
        if old.name not in known:
            raise UsageError(f"{file}: the run {old.name} is not in the grid that was given; {advice}")
        then, here = old.config.model_dump(mode="json"), known[old.name].config.model_dump(mode="json")
        for key in then:
            if then[key] != here[key] and key not in _ELSEWHERE:
                raise UsageError(
                    f"{file}: {key} of the run {old.name} was {json.dumps(then[key], ensure_ascii=False)} and is "
                    f"{json.dumps(here[key], ensure_ascii=False)} now; {advice}"
                )
