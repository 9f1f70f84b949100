"""The end of a run for a person: a small table, and what must be said about it."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table

from bbprompt.config import NO_PROMPTS
from bbprompt.result import Result

__all__ = ["notes", "result_table"]

_PRECISIONS = {
    "bfloat16": "in bfloat16",
    "deviations": "as bfloat16 deviations from float32",
    "float32": "in float32, for they lay too close together",
}


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
    if result.baselines:
        table.add_section()
    for rival in result.baselines:
        table.add_row(
            f"no prompt, {rival.name}",
            f"{rival.dev:.3f}",
            f"{rival.test:.3f} ± {rival.stderr:.3f}",
            "0",
            f"{rival.seconds:.0f}",
        )
    table.add_section()
    table.add_row("in all", "", "", f"{calls} of {result.budget}", f"{result.seconds.total:.0f}")
    return table


def notes(result: Result) -> list[str]:
    """What a reader of the table has to know, one sentence a line."""
    lines: list[str] = []
    before, after, metric = result.before, result.test, result.test.metric
    if before.majority:
        lines.append(f"Always answering the most frequent label gives {before.majority:.3f} on test.")
    if result.data.source == "sample":
        lines.append("The data are the bundled sample: good for trying things out, no evidence about a method.")
    if result.prompts == NO_PROMPTS and not _searched(result):
        return lines + _cut(result)
    lines += _rivals(result)
    if not result.stages:
        return lines + _cut(result)
    lines += _starved(result)
    lines += _unspent(result)
    lines += _precisions(result)
    if any(stage.name == "calibration" for stage in result.stages):
        lines.append("The last dev score is of texts that the labels' offsets were fitted to: go by the test score.")
    if result.dev <= before.dev:
        lines.append(f"On dev tuning gained nothing ({metric} {result.dev:.3f}, before {before.dev:.3f}).")
    if after.value <= before.test:
        lines.append(f"On test tuning gained nothing ({metric} {after.value:.3f}, before {before.test:.3f}).")
    elif after.value - before.test < 2 * after.stderr:
        lines.append("On test the gain is smaller than two standard errors of the score; another seed may undo it.")
    if before.majority and after.value <= before.majority:
        lines.append("On test the result does not beat the most frequent label.")
    return lines + _cut(result)


def _starved(result: Result) -> list[str]:
    """That nothing of the budget was left for a stage."""
    names = [stage.name for stage in result.stages if stage.ended == "budget" and not stage.calls]
    if not names:
        return []
    return [f"A budget of {result.budget} left no calls for this: {', '.join(names)}. Raise `--budget`."]


def _unspent(result: Result) -> list[str]:
    """That calls were left, and why, where the search lost patience."""
    left = result.budget - result.calls.train - result.calls.dev
    impatient = [stage.name for stage in result.stages if stage.ended == "patience"]
    if not impatient or not left:
        return []
    return [
        f"{left} calls were left unspent: the {impatient[-1]} stage had long gained nothing on dev. To spend them all "
        f"the same: `--set {impatient[-1]}.patience=null`."
    ]


def _precisions(result: Result) -> list[str]:
    """In which precision populations were scored, where it was chosen for each."""
    if not result.precisions:
        return []
    shares = ", ".join(f"{count} {_PRECISIONS.get(name, name)}" for name, count in result.precisions.items())
    return [f"Populations were scored in the precision that told them apart: {shares}."]


def _searched(result: Result) -> bool:
    """Whether prompts were searched for, pre-trained or not: a baseline has its one stage, "fit"."""
    return any(stage.name != "fit" for stage in result.stages)


def _rivals(result: Result) -> list[str]:
    """That a method without tuning does better, where one does."""
    best = max(result.baselines, key=lambda rival: rival.test, default=None)
    if best is None or result.test.value >= best.test:
        return []
    metric = result.test.metric
    return [
        f"Without any tuning, {best.name} on the same model gives {metric} {best.test:.3f} on test, more than "
        f"the {result.test.value:.3f} here: `--method {best.name}` is the better choice."
    ]


def _cut(result: Result) -> list[str]:
    if not result.cut_tokens:
        return []
    return [f"{result.cut_tokens} tokens of texts too long for the model were cut."]


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
