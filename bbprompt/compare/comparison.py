"""The comparison of methods over tasks and seeds: the papers' table, paired differences, cost, anytime curves.

Scores are test scores. Beside the methods stand what costs nothing: the most frequent label, and the same model and
prompts with nothing tuned ("before").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bbprompt.compare.cheap import best_cheap
from bbprompt.compare.runs import Curve, FinishedRun, Missing
from bbprompt.compare.statistics import Paired, holm, mean_sd, paired, step_values
from bbprompt.errors import UsageError
from bbprompt.yamlfile import closest

__all__ = ["AnytimeRow", "Comparison", "CostRow", "DifferenceRow", "Row", "Spread", "compare"]

MAJORITY = "most frequent label"  # on test; the method `majority` counts labels in the training split
BEFORE = "before"
CHEAP = "best cheap method"  # see `bbprompt.compare.cheap`
#: Tracks that get an average of their own, in the papers' order.
_TRACKS = ("seen", "unseen", "unseen-relative", "upstream", "")

Scores = dict[tuple[str, int], float]


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation over n seeds; NaN for the deviation of one."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the main table.

    Attributes:
        name: The method, or what stands beside the methods.
        cells: Task -> spread over its seeds.
        averages: Name of a group of tasks -> spread, over the seeds that have all its tasks, of the mean over them; a
            group of which no seed is whole is not there.
    """

    name: str
    cells: Mapping[str, Spread]
    averages: Mapping[str, Spread]


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """A method against another on the same tasks and seeds; `group` says which tasks, `p` is corrected by Holm."""

    method: str
    against: str
    group: str
    found: Paired
    p: float


@dataclass(frozen=True, slots=True)
class CostRow:
    """What a run of a method takes: means over its runs of budgeted calls, wall seconds and seconds of the model."""

    method: str
    runs: int
    calls: float
    seconds: float
    oracle_seconds: float


@dataclass(frozen=True, slots=True)
class AnytimeRow:
    """Highest dev metric that was seen after so many calls: mean over the tasks and seeds that all searches have.

    Attributes:
        method: The method.
        runs: Runs that it is the mean of, as many in every row.
        values: Calls -> mean; a run that ended earlier keeps its last value.
        area: Mean of the curve from the first to the last call of the table.
    """

    method: str
    runs: int
    values: Mapping[int, float]
    area: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that is compared.

    Attributes:
        tasks: Columns of the main table, grouped by track.
        groups: Name of an average -> its tasks.
        metrics: Task -> metric.
        rows: Of the main table.
        differences: Paired differences.
        costs: A row a method.
        anytime: A row a method.
        runs: The runs that this rests on.
        missing: The runs without a result.
        notes: What a reader has to know.
    """

    tasks: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    metrics: Mapping[str, str]
    rows: tuple[Row, ...]
    differences: tuple[DifferenceRow, ...]
    costs: tuple[CostRow, ...]
    anytime: tuple[AnytimeRow, ...]
    runs: tuple[FinishedRun, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]


def compare(
    runs: Sequence[FinishedRun],
    missing: Sequence[Missing],
    baseline: str | None = None,
    stages: bool = False,
) -> Comparison:
    """Compare finished runs.

    Args:
        runs: Read by `bbprompt.compare.runs.read_runs`.
        missing: Runs that are not finished, which are named in the notes.
        baseline: Method that all others are compared with; None for the first one.
        stages: Add a row for the prompt chosen at the end of each earlier stage.

    Raises:
        UsageError: Nothing is finished, or there is no such method.
    """
    if not runs:
        raise UsageError(f"no run is finished, {len(missing)} are missing; go on with `bbprompt sweep`")
    every: list[FinishedRun | Missing] = [*runs, *missing]
    rows = dict.fromkeys(run.row for run in sorted(every, key=_place))
    methods = [name for name in rows if any(run.row == name for run in runs)]
    if baseline is not None and baseline not in methods:
        raise UsageError(f"--baseline {baseline}: no finished run of that name{closest(baseline, methods)}")
    scores = {name: _scores((run for run in runs if run.row == name), _final) for name in methods}
    others = _untuned(runs, methods) | (_after_stages(runs, methods) if stages else {})
    groups = _groups(runs, missing)
    seeds = sorted({run.result.seed for run in runs})
    table = {**others, **scores}
    differences = tuple(_differences(methods, scores, runs, groups, baseline or methods[0]))
    anytime = tuple(_anytime(runs, methods))
    apart = () if anytime or all(run.curve is None for run in runs) else (_APART,)
    return Comparison(
        tasks=_tasks(groups),
        groups=groups,
        metrics={run.result.task: run.result.test.metric for run in runs},
        rows=tuple(_row(name, values, groups, seeds) for name, values in table.items()),
        differences=differences,
        costs=tuple(_cost(name, [run for run in runs if run.row == name]) for name in methods),
        anytime=anytime,
        runs=tuple(runs),
        missing=tuple(missing),
        notes=(*_notes(runs, missing), *apart, *_beaten(differences, groups), *_behind(runs, methods)),
    )


def _place(run: FinishedRun | Missing) -> int:
    return run.place


def _final(run: FinishedRun) -> float:
    return run.result.test.value


def _before(run: FinishedRun) -> float:
    return run.result.before.test


def _majority(run: FinishedRun) -> float:
    return run.result.before.majority


def _scores(runs: Iterable[FinishedRun], value: Callable[[FinishedRun], float]) -> Scores:
    return {(run.result.task, run.result.seed): value(run) for run in runs}


def _cheap(runs: Iterable[FinishedRun], best: Mapping[int, tuple[str, float]]) -> Scores:
    """The best cheap method beside some runs, a score a task and seed; the highest where their examples differ."""
    found: Scores = {}
    for run in runs:
        if run.place in best:
            key = run.result.task, run.result.seed
            found[key] = max(best[run.place][1], found.get(key, -math.inf))
    return found


def _untuned(runs: Sequence[FinishedRun], methods: Sequence[str]) -> dict[str, Scores]:
    """The rows that cost nothing; methods whose untuned scores are the same share one row of them."""
    majority = _scores((run for run in runs if run.result.before.majority), _majority)
    shared: list[tuple[list[str], Scores]] = []
    for name in methods:
        values = _scores((run for run in runs if run.row == name), _before)
        for names, held in shared:
            both = held.keys() & values.keys()
            if both and all(held[key] == values[key] for key in both):
                names.append(name)
                held.update(values)
                break
        else:
            shared.append(([name], values))
    cheap = _cheap(runs, best_cheap(runs))
    before = {BEFORE if len(shared) == 1 else f"{BEFORE} ({', '.join(names)})": values for names, values in shared}
    return ({MAJORITY: majority} if majority else {}) | ({CHEAP: cheap} if cheap else {}) | before


def _after_stages(runs: Sequence[FinishedRun], methods: Sequence[str]) -> dict[str, Scores]:
    """A row for each stage that is not the last one of all runs of its method: there it is the method's own row."""
    rows: dict[str, Scores] = {}
    for name in methods:
        own = [run.result for run in runs if run.row == name]
        for stage in dict.fromkeys(stage.name for result in own for stage in result.stages[:-1]):
            rows[f"{name}, after {stage}"] = {
                (result.task, result.seed): each.test for result in own for each in result.stages if each.name == stage
            }
    return rows


def _groups(runs: Sequence[FinishedRun], missing: Sequence[Missing]) -> dict[str, tuple[str, ...]]:
    """Track -> its tasks in the order of the runs; tasks without a finished run count, or averages would shift."""
    found = [(run.place, run.result.task, run.track) for run in runs]
    found += [(run.place, run.task, run.track) for run in missing]
    tracks = {task: track if track in _TRACKS else "" for _, task, track in sorted(found)}
    groups = {track: tuple(task for task, own in tracks.items() if own == track) for track in _TRACKS}
    return {track or "other": tasks for track, tasks in groups.items() if tasks}


def _tasks(groups: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(task for tasks in groups.values() for task in tasks)


def _row(name: str, scores: Scores, groups: Mapping[str, tuple[str, ...]], seeds: Sequence[int]) -> Row:
    cells = {}
    for task in _tasks(groups):
        values = [scores[task, seed] for seed in seeds if (task, seed) in scores]
        if values:
            cells[task] = Spread(*mean_sd(values), len(values))
    averages = {}
    sets = {**groups, "all": _tasks(groups)} if len(groups) > 1 else groups
    for group, tasks in sets.items():
        whole = [seed for seed in seeds if all((task, seed) in scores for task in tasks)]
        if whole:
            means = [float(np.mean([scores[task, seed] for task in tasks])) for seed in whole]
            averages[group] = Spread(*mean_sd(means), len(means))
    return Row(name, cells, averages)


def _differences(
    methods: Sequence[str],
    scores: Mapping[str, Scores],
    runs: Sequence[FinishedRun],
    groups: Mapping[str, tuple[str, ...]],
    baseline: str,
) -> Iterable[DifferenceRow]:
    sets = {**groups, "all": _tasks(groups)} if len(groups) > 1 else groups
    best = best_cheap(runs)
    found: list[tuple[str, str, str, Paired]] = []
    for name in methods:
        own = [run for run in runs if run.row == name]
        rivals: list[tuple[str, Scores]] = [
            (BEFORE, _scores(own, _before)),
            (MAJORITY, _scores((run for run in own if run.result.before.majority), _majority)),
        ]
        if not any(run.baseline for run in own):
            rivals.append((CHEAP, _cheap(own, best)))
        if name != baseline:
            rivals.append((baseline, scores[baseline]))
        for against, values in rivals:
            for group, tasks in sets.items():
                by_task = [_minus(scores[name], values, task) for task in tasks]
                if kept := [differences for differences in by_task if differences]:
                    found.append((name, against, group, paired(kept)))
    corrected = holm([each[3].p for each in found])
    return [DifferenceRow(*each, p) for each, p in zip(found, corrected, strict=True)]


def _minus(scores: Scores, others: Scores, task: str) -> list[float]:
    """Differences on a task, a seed each; rounded, so that equal ones are equal for the ranks."""
    return [
        round(value - others[own, seed], 12)
        for (own, seed), value in scores.items()
        if own == task and (own, seed) in others
    ]


def _cost(name: str, runs: Sequence[FinishedRun]) -> CostRow:
    calls = [run.result.calls.train + run.result.calls.dev for run in runs]
    seconds = [run.result.seconds.total for run in runs]
    oracle = [run.result.seconds.oracle for run in runs]
    return CostRow(name, len(runs), float(np.mean(calls)), float(np.mean(seconds)), float(np.mean(oracle)))


def _anytime(runs: Sequence[FinishedRun], methods: Sequence[str]) -> Iterable[AnytimeRow]:
    """Over the tasks and seeds that all searches have, or rows would differ by them; cheap methods that have them."""
    curves: dict[str, dict[tuple[str, int], Curve]] = {name: {} for name in methods}
    for run in runs:
        if run.curve is not None and run.curve.calls:
            curves[run.row][run.result.task, run.result.seed] = run.curve
    cheap = {run.row for run in runs if run.baseline}
    rows = {name: own for name, own in curves.items() if own}
    searched = [own.keys() for name, own in rows.items() if name not in cheap] or [own.keys() for own in rows.values()]
    shared = sorted(set.intersection(*map(set, searched))) if searched else []
    kept = {name: [own[key] for key in shared] for name, own in rows.items() if own.keys() >= set(shared)}
    if not shared:
        return
    first = max(curve.calls[0] for own in kept.values() for curve in own)
    last = max(curve.calls[-1] for own in kept.values() for curve in own)
    marks = sorted({first, last, *(mark for mark in _MARKS if first < mark < last)})
    fine = np.arange(first, last + 1, dtype=np.float64)
    for name, own in kept.items():
        mean = np.mean([step_values(curve.calls, curve.dev, fine) for curve in own], axis=0)
        yield AnytimeRow(name, len(own), {mark: float(mean[mark - first]) for mark in marks}, float(mean.mean()))


_APART = "No task and seed has a curve of every search, so that there is no table of dev scores after so many calls."
_MARKS = (10, 20, 50, 100, 200, 300, 500, 1000, 2000, 4000, 8000, 16000)


def _beaten(differences: Sequence[DifferenceRow], groups: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    """Which methods are not worth their calls, as their mean over all tasks has it."""
    whole = "all" if len(groups) > 1 else next(iter(groups))
    lost = [
        f"{row.method} (by {-100 * row.found.mean:.1f} points)"
        for row in differences
        if (row.against, row.group) == (CHEAP, whole) and row.found.mean < 0
    ]
    if lost:
        yield f"On average below the best cheap method, which tunes no prompt: {', '.join(lost)}."


def _behind(runs: Sequence[FinishedRun], methods: Sequence[str]) -> Iterable[str]:
    """On which tasks that is so, which an average hides, as the means over seeds have it."""
    best, found = best_cheap(runs), []
    for name in methods:
        own = [run for run in runs if run.row == name and not run.baseline]
        values, cheap = _scores(own, _final), _cheap(own, best)
        tasks = [
            task for task in dict.fromkeys(task for task, _ in cheap) if round(sum(_minus(values, cheap, task)), 12) < 0
        ]
        if tasks:
            found.append(f"{name} on {', '.join(tasks)}")
    if found:
        yield f"Below the best cheap method on single tasks: {'; '.join(found)}."


def _notes(runs: Sequence[FinishedRun], missing: Sequence[Missing]) -> Iterable[str]:
    if missing:
        yield f"{len(missing)} of {len(runs) + len(missing)} runs are missing, see below."
    if any(run.result.data.source == "sample" for run in runs):
        yield "Some data are the bundled sample: good for trying things out, no evidence about a method."
    tests: dict[tuple[str, int], set[str]] = {}
    splits: dict[tuple[str, int], set[str]] = {}
    for run in runs:
        key = (run.result.task, run.result.seed)
        tests.setdefault(key, set()).add(run.test)
        splits.setdefault(key, set()).add(run.split)
    for what, found in (("test", tests), ("few-shot", splits)):
        unlike = sorted({task for (task, _), digests in found.items() if len(digests) > 1})
        if unlike:
            yield f"Not paired: the {what} examples differ between runs of the same seed on {', '.join(unlike)}."
    budgets = {run.result.budget for run in runs}
    if len(budgets) > 1:
        yield f"The budgets differ: {', '.join(map(str, sorted(budgets)))} calls."
    fewest = min(len({run.result.seed for run in runs if run.row == row}) for row in {run.row for run in runs})
    if fewest < 5:
        yield (f"{fewest} seed{'s' if fewest > 1 else ''} only: an interval over so few says little about other seeds.")
    worst = [run.result.test.stderr for run in runs if not math.isnan(run.result.test.stderr)]
    if worst:
        yield (
            f"The standard error of one test score, from the number of test examples alone, is up to "
            f"{100 * max(worst):.1f} points."
        )
