"""The end of a run for a person: a small table, and what must be said about it."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table

from bbprompt.result import Result

__all__ = ["notes", "result_table"]


def result_table(result: Result) -> Table:
    """One row for the untuned prompt and one for each stage; scores are fractions with one standard error."""
    metric = result.test.metric
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{result.task}, {result.method}, seed {result.seed}", title_justify="left"
    )
    table.add_column("")
    for name in (f"dev {metric}", f"test {metric}", "calls", "seconds"):
        table.add_column(name, justify="right")
    table.add_row("before", f"{result.before.dev:.3f}", _score(result, result.before.test), "", "")
    for stage in result.stages:
        table.add_row(
            f"after {stage.name}{'s' if stage.name == 'prompt' else ''}",
            f"{stage.dev:.3f}",
            _score(result, stage.test),
            str(stage.calls),
            f"{stage.seconds:.0f}",
        )
    calls = result.calls.train + result.calls.dev
    table.add_section()
    table.add_row("in all", "", "", f"{calls} of {result.budget}", f"{result.seconds.total:.0f}")
    return table


def notes(result: Result) -> list[str]:
    """What a reader of the table has to know, one sentence a line."""
    lines = []
    before, after, metric = result.before, result.test, result.test.metric
    if before.majority:
        lines.append(f"Always answering the most frequent label gives {before.majority:.3f} on test.")
    if result.data.source == "sample":
        lines.append("The data are the bundled sample: good for trying things out, no evidence about a method.")
    if result.dev <= before.dev:
        lines.append(
            f"On dev the tuned prompt is not better than the untuned one "
            f"({metric} {result.dev:.3f}, before {before.dev:.3f})."
        )
    if after.value <= before.test:
        lines.append(
            f"On test the tuned prompt is not better than the untuned one "
            f"({metric} {after.value:.3f}, before {before.test:.3f})."
        )
    elif after.value - before.test < 2 * after.stderr:
        lines.append("On test the gain is smaller than two standard errors of the score; another seed may undo it.")
    if before.majority and after.value <= before.majority:
        lines.append("On test the tuned prompt does not beat the most frequent label.")
    if result.cut_tokens:
        lines.append(f"{result.cut_tokens} tokens of texts too long for the model were cut.")
    return lines


def _score(result: Result, value: float) -> str:
    """A test score with its standard error, as far as the result tells it.

    Accuracy is a mean of zeros and ones, so its standard error follows from it: sqrt(p (1 - p) / (n - 1)).
    """
    if value == result.test.value:
        error = result.test.stderr
    elif result.test.metric == "accuracy" and result.test.n > 1:
        error = math.sqrt(value * (1 - value) / (result.test.n - 1))
    else:
        return f"{value:.3f}"
    return f"{value:.3f} ± {error:.3f}"
