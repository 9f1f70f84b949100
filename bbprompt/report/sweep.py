"""The page of a sweep: the tables of `bbprompt compare`, and the curves of all methods."""

from __future__ import annotations

from pathlib import Path

from bbprompt.compare.comparison import Comparison, compare
from bbprompt.compare.runs import Curve, FinishedRun, read_runs
from bbprompt.compare.text import main_table, tables
from bbprompt.report.again import reproduce_sweep
from bbprompt.report.figures import method_curves
from bbprompt.report.page import Html, bullets, code, details, page, paragraph, section, table
from bbprompt.report.run import leaves
from bbprompt.sweep.runner import read_sweep

__all__ = ["sweep_page"]


def sweep_page(folder: Path, baseline: str | None) -> str:
    """The page of a directory of runs.

    Args:
        folder: Of a sweep, or any directory of run directories.
        baseline: As `bbprompt compare --baseline`.

    Raises:
        UsageError: Nothing is finished, or there is no such method.
        DiskError: A file of a run is damaged.
    """
    runs, missing = read_runs(folder)
    found = compare(runs, missing, baseline, stages=True)
    parts: list[Html] = []
    for number, (title, text, (head, rows)) in enumerate(tables(found)):
        body = [table(head, rows)] if number or len(found.groups) == 1 else _by_group(found)
        parts.append(section(title, paragraph(text.replace("`", ""), "note") if text else "", *body))
        if not number and found.notes:
            parts.append(section("What to know", bullets(found.notes)))
    curves = _curves(found)
    if curves:
        text = "Highest dev metric so far, in percent: mean over seeds, and each seed faintly; a point: no search."
        parts.append(section("Against calls", paragraph(text, "note"), method_curves(curves)))
    if missing:
        rows = [[run.name, run.state] for run in missing]
        parts.append(section("Missing runs", table(["run", "state"], rows)))
    experiment = read_sweep(folder)
    if experiment is not None:
        values = experiment.model_dump(mode="json")
        parts.append(
            section(
                "Do it again",
                paragraph("All settings of each run are in its manifest.json."),
                code(reproduce_sweep(experiment, folder)),
                details("The grid", table(["key", "value"], list(leaves(values)))),
            )
        )
    parts.append(section("Runs", details("Every run", table(*_runs(runs)))))
    lead = f"{len(runs)} finished runs, {len(missing)} missing"
    title = experiment.summary if experiment is not None and experiment.summary else f"Sweep {folder.resolve().name}"
    return page(title, lead, parts)


def _by_group(found: Comparison) -> list[Html]:
    """The main table in pieces that fit a page: one for each group of tasks, and one of the means."""
    return [table(*main_table(found, group)) for group in [*found.groups, ""]]


def _curves(found: Comparison) -> dict[str, dict[str, list[Curve]]]:
    """Task -> method -> curves, in the order of the tables."""
    curves: dict[str, dict[str, list[Curve]]] = {}
    for task in found.tasks:
        for cost in found.costs:
            own = [run for run in found.runs if (run.result.task, run.row) == (task, cost.method)]
            kept = [run.curve for run in own if run.curve is not None and run.curve.calls]
            if kept:
                curves.setdefault(task, {})[cost.method] = kept
    return curves


def _runs(runs: list[FinishedRun]) -> tuple[list[str], list[list[object]]]:
    head = ["run", "seed", "before, %", "test, %", "standard error", "calls", "seconds", "digest"]
    rows: list[list[object]] = [
        [
            run.name,
            run.result.seed,
            f"{100 * run.result.before.test:.1f}",
            f"{100 * run.result.test.value:.1f}",
            f"{100 * run.result.test.stderr:.1f}",
            run.result.calls.train + run.result.calls.dev,
            f"{run.result.seconds.total:.0f}",
            run.result.digest[:12],
        ]
        for run in runs
    ]
    return head, rows
