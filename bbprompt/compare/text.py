"""A comparison written out: Markdown for people, CSV and JSON for programs.

Markdown is in percent, as the papers print their tables; CSV and JSON are in fractions, as `result.json` is.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bbprompt.compare.cheap import best_cheap
from bbprompt.compare.comparison import Comparison, Row, Spread

__all__ = ["as_json", "csv_files", "main_table", "markdown", "tables"]

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def markdown(found: Comparison) -> str:
    """Everything as Markdown."""
    parts = []
    for title, text, (head, rows) in tables(found):
        parts += [f"## {title}", "", *([text, ""] if text else []), _grid(head, rows), ""]
    if found.notes:
        parts += ["## Notes", "", *(f"- {note}" for note in found.notes), ""]
    if found.missing:
        parts += ["## Missing runs", "", *(f"- {run.name}: {run.state}" for run in found.missing), ""]
    return "\n".join(parts).rstrip("\n")


def tables(found: Comparison) -> list[tuple[str, str, Table]]:
    """Title, explanation, and head and rows of each table."""
    result = [("Test scores", _scores_text(), main_table(found))]
    result.append(
        (
            "Paired differences",
            "In points, method minus what it stands against, on the same tasks and seeds. The 95 % interval is a "
            "bootstrap over tasks and seeds (over seeds where there is one task, BCa); p is Wilcoxon's signed-rank "
            "test over all pairs, corrected for the number of rows (Holm).",
            _differences(found),
        )
    )
    result.append(("Cost of a run", "Means; calls are train and dev calls together.", _costs(found)))
    if found.anytime:
        result.append(
            (
                "Dev score after so many calls",
                f"In percent: mean over the {found.anytime[0].runs} tasks and seeds that all searches have of the "
                "highest few-shot dev metric so far, which need not be that of the prompt that is returned; it "
                "flatters. The area is the mean of the curve.",
                _anytime(found),
            )
        )
    return result


def main_table(found: Comparison, group: str | None = None) -> Table:
    """Rows methods, columns tasks and averages, as in the papers.

    Args:
        found: The comparison.
        group: The tasks of this group alone; "" for the averages of all groups alone; None for everything.
    """
    most = max(spread.n for row in found.rows for spread in row.cells.values())
    columns: list[tuple[str, str]] = []
    for name, tasks in found.groups.items():
        if group is None or group == name:
            columns += [("cell", task) for task in tasks]
        if not group:
            columns.append(("average", name))
    if len(found.groups) > 1 and not group:
        columns.append(("average", "all"))
    head = ["", *(_task(found, key) if kind == "cell" else f"mean {key}" for kind, key in columns)]
    rows = [
        [row.name, *(_spread((row.cells if kind == "cell" else row.averages).get(key), most) for kind, key in columns)]
        for row in found.rows
    ]
    return head, rows


def csv_files(found: Comparison) -> dict[str, str]:
    """Name -> content of the CSV files."""
    return {
        "table.csv": _csv(*_wide(found)),
        "runs.csv": _csv(*_long(found)),
        "differences.csv": _csv(*_plain([_flat(asdict(row)) for row in found.differences])),
        "costs.csv": _csv(*_plain([asdict(row) for row in found.costs])),
        "curves.csv": _csv(
            ("method", "calls", "dev"),
            [(row.method, calls, value) for row in found.anytime for calls, value in row.values.items()],
        ),
    }


def as_json(found: Comparison) -> dict[str, Any]:
    """The comparison as plain values; what is not a number is null."""
    found_values: dict[str, Any] = _finite(
        {
            "tasks": list(found.tasks),
            "groups": {name: list(tasks) for name, tasks in found.groups.items()},
            "metrics": dict(found.metrics),
            "rows": [asdict(row) for row in found.rows],
            "differences": [_flat(asdict(row)) for row in found.differences],
            "costs": [asdict(row) for row in found.costs],
            "anytime": [asdict(row) for row in found.anytime],
            "runs": len(found.runs),
            "missing": [asdict(run) for run in found.missing],
            "notes": list(found.notes),
        }
    )
    return found_values


def _task(found: Comparison, task: str) -> str:
    return f"{task} (F1)" if found.metrics.get(task) == "f1" else task


def _scores_text() -> str:
    return (
        "In percent, mean (sample standard deviation) over seeds; accuracy unless F1 is said. `before` is the same "
        "model and prompts with nothing tuned; the best cheap method is that of highest test score among those which "
        "tune no prompt and see the same examples, in a run of their own or beside a search. A mean over tasks rests "
        "on the seeds that have all of them; n is said where seeds are lacking."
    )


def _differences(found: Comparison) -> Table:
    rows = [
        [
            row.method,
            row.against,
            row.group,
            str(row.found.pairs),
            f"{100 * row.found.mean:+.1f}",
            f"{_points(row.found.low)} to {_points(row.found.high)}",
            f"{row.p:.3f}" if row.p >= 0.001 else "< 0.001",
            f"{row.found.better} / {row.found.worse}",
        ]
        for row in found.differences
    ]
    return ["method", "against", "tasks", "pairs", "difference", "95 % interval", "p", "better / worse"], rows


def _costs(found: Comparison) -> Table:
    rows = [
        [row.method, str(row.runs), f"{row.calls:.0f}", f"{row.seconds:.0f}", f"{row.oracle_seconds:.0f}"]
        for row in found.costs
    ]
    return ["method", "runs", "calls", "seconds", "of these in the model"], rows


def _anytime(found: Comparison) -> Table:
    marks = list(found.anytime[0].values)
    rows = [
        [row.method, *(f"{100 * row.values[mark]:.1f}" for mark in marks), f"{100 * row.area:.1f}"]
        for row in found.anytime
    ]
    return ["method", *map(str, marks), "area"], rows


def _spread(spread: Spread | None, most: int) -> str:
    if spread is None:
        return "–"
    deviation = "" if math.isnan(spread.sd) else f" ({100 * spread.sd:.1f})"
    return f"{100 * spread.mean:.1f}{deviation}{f' n={spread.n}' if spread.n < most else ''}"


def _points(value: float) -> str:
    return "?" if math.isnan(value) else f"{100 * value:+.1f}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _wide(found: Comparison) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
    """The main table with three columns for each task and average: mean, sd, n."""
    keys = [(task, "cell") for task in found.tasks]
    averages = [*found.groups, "all"] if len(found.groups) > 1 else list(found.groups)
    keys += [(name, "average") for name in averages]
    names = [key if kind == "cell" else f"mean {key}" for key, kind in keys]
    head = ["method", *(f"{name}{what}" for name in names for what in ("", " sd", " n"))]

    def cells(row: Row) -> Iterable[object]:
        yield row.name
        for key, kind in keys:
            spread = (row.cells if kind == "cell" else row.averages).get(key)
            yield from ("", "", "") if spread is None else (spread.mean, _blank(spread.sd), spread.n)

    return head, [list(cells(row)) for row in found.rows]


def _long(found: Comparison) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
    """A line for each run, with the test score after each stage and that of the best method without a prompt."""
    rows = []
    stages = list(dict.fromkeys(stage.name for run in found.runs for stage in run.result.stages))
    cheap = best_cheap(found.runs)
    for run in found.runs:
        result = run.result
        after = {stage.name: stage.test for stage in result.stages}
        rows.append(
            {
                "run": run.name,
                "task": result.task,
                "track": run.track,
                "method": run.row,
                "seed": result.seed,
                "metric": result.test.metric,
                "test": result.test.value,
                "stderr": result.test.stderr,
                "n": result.test.n,
                "dev": result.dev,
                "before_test": result.before.test,
                "before_dev": result.before.dev,
                "majority": result.before.majority,
                "budget": result.budget,
                "calls_train": result.calls.train,
                "calls_dev": result.calls.dev,
                "seconds": result.seconds.total,
                "seconds_oracle": result.seconds.oracle,
                "digest": result.digest,
                **{f"test_after_{name}": after.get(name, "") for name in stages},
                **dict(zip(("cheap_method", "cheap_test"), cheap.get(run.place, ("", "")), strict=True)),
            }
        )
    return _plain(rows)


def _plain(rows: Sequence[Mapping[str, object]]) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
    return list(rows[0]) if rows else [], [[_blank(value) for value in row.values()] for row in rows]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A difference with the fields of what was found beside the others; `p` is the corrected one."""
    found = {("p_uncorrected" if key == "p" else key): value for key, value in row["found"].items()}
    return {key: value for key, value in row.items() if key not in ("found", "p")} | found | {"p": row["p"]}


def _blank(value: object) -> object:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    if head:
        writer.writerow(head)
    writer.writerows(rows)
    return buffer.getvalue()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
