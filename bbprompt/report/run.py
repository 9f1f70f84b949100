"""The page of a run: what it found, how it got there, where it is wrong, and how to do it again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from bbprompt.compare.runs import read_curve
from bbprompt.config import MethodConfig
from bbprompt.errors import DiskError, UsageError
from bbprompt.oneline import one_line
from bbprompt.report.again import reproduce
from bbprompt.report.examples import Judged, confusion, worst
from bbprompt.report.figures import run_curves
from bbprompt.report.page import Html, bullets, code, details, heat, page, paragraph, section, table
from bbprompt.result import Result, read_result
from bbprompt.run import reopen
from bbprompt.store.rundir import MANIFEST, PROMPT, RunDirectory
from bbprompt.tasks.task import Task
from bbprompt.tensorfile import unpack
from bbprompt.yamlfile import validate

__all__ = ["leaves", "run_page"]

_NO_ROUTER = (
    "The returned prompt came from no router: none that the router stage found was better on dev than the prompt from "
    "which it set out."
)


def run_page(run_dir: Path, judged: Sequence[Judged] | None, notes: Sequence[str], most: int) -> str:
    """The page of a finished run.

    Args:
        run_dir: Its directory.
        judged: Every test example with what the prompt says of it; None leaves that out.
        notes: What a reader has to know, one sentence each.
        most: So many of the worst examples are shown.

    Raises:
        UsageError: There is no run, or it is not finished.
        DiskError: A file of the run is damaged.
    """
    directory, config = reopen(run_dir, writable=False)
    with directory:
        if not directory.finished:
            raise UsageError(f"{run_dir}: this run is not finished; go on with `bbprompt resume {run_dir}`")
        where = str(directory.path / MANIFEST)
        result, manifest = read_result(directory), directory.manifest
        task = validate(Task, manifest.get("task"), where)
        method = validate(MethodConfig, manifest.get("method"), where)
        curve, weights = read_curve(directory), _weights(directory, method)
    parts = [section("Before and after", _scores(result), bullets(notes))]
    if curve is not None and curve.calls:
        parts.append(section("Against calls", run_curves(curve, result.before.metric, result.before.dev)))
    if judged is not None:
        parts += _judged_parts(task, result, judged, most)
    if weights is not None:
        parts.append(_router_part(weights))
    elif any(stage.name == "router" for stage in result.stages):
        parts.append(section("Router", paragraph(_NO_ROUTER)))
    parts += [
        section("Do it again", code(reproduce(config, manifest))),
        section("Settings", *(_settings(name, value) for name, value in manifest.items())),
    ]
    lead = (
        f"{result.backbone}, prompts {result.prompts}; {result.calls.train + result.calls.dev} calls of "
        f"{result.budget} in {result.seconds.total:.0f} s; {result.data.train} + {result.data.dev} few-shot examples"
    )
    return page(f"{result.task}, {result.method}, seed {result.seed}", lead, parts)


def _scores(result: Result) -> Html:
    metric = result.test.metric
    rows: list[list[object]] = []
    if result.before.majority:
        rows.append(["most frequent label", "", _percent(result.before.majority), "", "", ""])
    error = _error(result, result.before.test)
    rows.append(["before (nothing tuned)", _percent(result.before.dev), _percent(result.before.test), error, "", ""])
    for stage in result.stages:
        rows.append(
            [
                f"after {stage.name} ({stage.optimizer})",
                _percent(stage.dev),
                _percent(stage.test),
                _error(result, stage.test),
                stage.calls,
                f"{stage.seconds:.0f}",
            ]
        )
    rows.append(
        ["returned", _percent(result.dev), _percent(result.test.value), _error(result, result.test.value), "", ""]
    )
    for rival in result.baselines:
        rows.append(
            [
                f"no prompt, {rival.name}",
                _percent(rival.dev),
                _percent(rival.test),
                _percent(rival.stderr),
                0,
                f"{rival.seconds:.0f}",
            ]
        )
    head = ["", f"dev {metric}, %", f"test {metric}, %", "standard error", "calls", "seconds"]
    return table(head, rows)


def _judged_parts(task: Task, result: Result, judged: Sequence[Judged], most: int) -> list[Html]:
    value = float(np.mean([each.score for each in judged]))
    said = f"Scored again for this page: {result.test.metric} {_percent(value)} % on {len(judged)} test examples."
    if len(judged) == result.test.n and abs(value - result.test.value) > 1e-9:
        said += f" The run itself found {_percent(result.test.value)} %: device, precision or data are not the same."
    parts = []
    if task.labelled:
        labels = list(task.labels)
        names = [_label(task, label) for label in labels]
        counts = confusion(labels, judged)
        parts.append(section("Confusions", paragraph(said), *_confusion(names, counts)))
        said = ""
    shown = worst(judged, most)
    wrong = sum(each.score < 1 for each in judged)
    text = f"{said} {wrong} are wrong; these are the {len(shown)} whose right answer was held least probable.".strip()
    if task.type == "extractive":
        text = f"{said} {wrong} answers are not exact; these are the {len(shown)} that overlap least.".strip()
    rows = [_example(task, each) for each in shown]
    head = [*task.field_names, "right", "given", "F1" if task.type == "extractive" else "probability of right, given"]
    parts.append(section("The worst examples", paragraph(text), table(head, rows) if rows else ""))
    return parts


def _confusion(names: Sequence[str], counts: NDArray[np.int64]) -> Iterator[Html]:
    yield heat(names, names, counts.tolist(), "d", "right \\ given")
    rows = []
    for place, name in enumerate(names):
        hits, right, given = counts[place, place], counts[place].sum(), counts[:, place].sum()
        recall = hits / right if right else math.nan
        precision = hits / given if given else math.nan
        rows.append([name, right, given, _percent(recall), _percent(precision)])
    yield table(["label", "examples", "given", "recall, %", "precision, %"], rows)


def _example(task: Task, each: Judged) -> list[object]:
    texts: list[object] = [each.fields.get(name, "") for name in task.field_names]
    numbers = f"{each.score:.2f}" if task.type == "extractive" else f"{each.probability:.3f}, {each.confidence:.3f}"
    if task.labelled:
        return [*texts, _label(task, each.right), _label(task, each.given), numbers]
    return [*texts, each.right, each.given, numbers]


def _label(task: Task, label: str) -> str:
    """A raw label with its option word where that is another."""
    word = task.labels[label]
    return label if label == word else f"{label} {word}"


def _router_part(weights: NDArray[np.floating]) -> Html:
    layers, modules = weights.shape
    rows = [f"layer {layer + 1}" if layers > 1 else "input" for layer in range(layers)]
    return section(
        "Router",
        paragraph(
            f"Weights by which the {modules} modules of each prompted layer are mixed in what the returned prompt came "
            "from; a prompt stage has moved it since, where there was one that helped."
        ),
        heat([f"z{number + 1}" for number in range(modules)], rows, weights.tolist(), ".2f"),
    )


def _weights(directory: RunDirectory, method: MethodConfig) -> NDArray[np.floating] | None:
    """Mixing weights `(L, K)`; a descent writes its router alone, which mixes by the method's rule."""
    try:
        tensors = unpack(directory.read_bytes(PROMPT))
    except (SafetensorError, ValueError) as error:
        raise DiskError(f"{directory.path / PROMPT}: damaged ({one_line(str(error))[:200]}); tune again") from None
    found = tensors.get("weights", tensors.get("router"))
    if found is None or found.ndim != 2 or not np.isfinite(found).all():
        return None
    return found if "weights" in tensors else method.rule.weights(found)


def leaves(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of everything in nested values; lists of plain values stay one text."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for place, item in enumerate(value):
            yield from leaves(item, f"{prefix}.{place}")
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _settings(name: str, value: object) -> Html:
    rows = list(leaves(value)) if isinstance(value, dict) else [("", str(value))]
    return details(name, table(["key", "value"], rows))


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _error(result: Result, value: float) -> str:
    """Standard error in points: the result's for its own score; accuracy is a mean of zeros and ones, which says it."""
    if value == result.test.value:
        return f"{100 * result.test.stderr:.1f}"
    if result.test.metric == "accuracy" and result.test.n > 1:
        return f"{100 * math.sqrt(value * (1 - value) / (result.test.n - 1)):.1f}"
    return "–"
