"""The page of a sweep: the tables of `bbprompt compare`, and the curves of all methods."""

from __future__ import annotations

from pathlib import Path

from bbprompt.compare import compare
from bbprompt.comparetext import tables
from bbprompt.report.figures import method_curves
from bbprompt.report.page import Html, bullets, code, details, page, paragraph, section, table
from bbprompt.report.run import leaves
from bbprompt.runs import Curve, FinishedRun, read_runs
from bbprompt.sweep import read_sweep

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
        parts.append(section(title, paragraph(text.replace("`", ""), "note") if text else "", table(head, rows)))
        if not number and found.notes:
            parts.append(section("What to know", bullets(found.notes)))
    curves = _curves(runs)
    if curves:
        text = "Dev metric of the prompt that would be returned, in percent: mean over seeds, and each seed faintly."
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
                paragraph("The grid is in sweep.json; each run's settings are in its manifest.json."),
                code(f"bbprompt sweep --out {folder}"),
                details("The grid", table(["key", "value"], list(leaves(values)))),
            )
        )
    parts.append(section("Runs", details("Every run", table(*_runs(runs)))))
    lead = f"{len(runs)} finished runs, {len(missing)} missing"
    title = experiment.summary if experiment is not None and experiment.summary else f"Sweep {folder.resolve().name}"
    return page(title, lead, parts)


def _curves(runs: list[FinishedRun]) -> dict[str, dict[str, list[Curve]]]:
    curves: dict[str, dict[str, list[Curve]]] = {}
    for run in runs:
        if run.curve is not None and run.curve.calls:
            curves.setdefault(run.result.task, {}).setdefault(run.row, []).append(run.curve)
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
