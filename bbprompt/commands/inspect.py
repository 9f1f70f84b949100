"""`bbprompt tasks` and `bbprompt methods`: what is there, and what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbprompt.commands.flags import Debug, Json
from bbprompt.commands.output import write, write_json

if TYPE_CHECKING:
    from bbprompt.tasks.task import Task

__all__ = ["methods", "tasks"]

_Name = Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="Name, or a YAML file.")]


def tasks(name: _Name = None, json: Json = False, debug: Debug = False) -> None:
    """List the tasks, or show one with its labels."""
    from bbprompt.tasks.task import load_task, task_names

    if name is not None:
        task = load_task(name, "NAME")
        _settings(task.model_dump(mode="json", exclude_none=True), json)
        return
    found = [load_task(each) for each in task_names()]
    if json:
        write_json({"tasks": [{"name": task.name, "type": task.type, "track": task.track} for task in found]})
        return
    rows = [(task.name, task.type, _options(task), task.metric, task.track or "") for task in found]
    write(_columns([("task", "type", "options", "metric", "track"), *rows]))


def methods(
    name: _Name = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", show_default=False, help="As `tune --set` (repeatable)."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods, or show one as effective YAML."""
    from bbprompt.config import load_method, method_names, method_with, parse_set

    if name is not None:
        method = method_with(load_method(name, "NAME"), parse_set(changes or []))
        _settings(method.model_dump(mode="json"), json)
        return
    found = [load_method(each) for each in method_names()]
    if json:
        told = [{"name": method.name, "summary": method.summary, "prompts": method.prompts} for method in found]
        write_json({"methods": told})
        return
    write(_columns([("method", "summary"), *((method.name, method.summary) for method in found)]))


def _options(task: Task) -> str:
    return str(len(task.labels)) if task.labelled else {"choice": "own", "extractive": "span"}[task.type]


def _settings(values: dict[str, Any], json: bool) -> None:
    if json:
        write_json(values)
        return
    import yaml

    write(yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=110).rstrip("\n"))


def _columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of one width in each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
