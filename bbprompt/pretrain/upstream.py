"""Upstream data: which tasks, which of their examples, and what must be left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bbprompt.data import DATA_VARIABLE, open_data
from bbprompt.errors import DataError, UsageError
from bbprompt.example import Example
from bbprompt.fewshot import pool_uids
from bbprompt.mrc import Frame, Offsets, encode
from bbprompt.pretrain.mixture import Upstream
from bbprompt.task import Task, load_task, task_names

__all__ = ["evaluation_inputs", "load_upstream", "upstream_tasks"]

log = logging.getLogger("bbprompt")


def upstream_tasks(names: Sequence[str] | str) -> list[Task]:
    """The tasks of a recipe; "upstream" is every bundled task of the tracks `upstream` and `seen`.

    Raises:
        UsageError: A named task belongs to the evaluation side.
    """
    if isinstance(names, str):
        tasks = [load_task(name) for name in task_names()]
        return [task for task in tasks if task.track in ("upstream", "seen")]
    tasks = [load_task(name) for name in names]
    for task in tasks:
        if task.track in ("unseen", "unseen-relative"):
            raise UsageError(f"tasks: '{task.name}' is of track {task.track} and must not be trained on; remove it")
    return tasks


def load_upstream(
    tasks: Sequence[Task],
    data: Path | None,
    *,
    tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
    frame: Frame,
    option_limit: int,
    option_characters: int,
    spare_seeds: Sequence[int],
    cap: int,
    valid: int,
    seed: int,
) -> list[Upstream]:
    """Read every task's training examples and some to validate on.

    From a `seen` task the few-shot pools of `spare_seeds` are left out, so that tuning on them later is true
    few-shot; from every task, what a test split of the evaluation side holds as well (`evaluation_inputs`).
    Validation comes from the dev split, else from the end of the shuffled training split. Examples whose question
    and options alone do not fit are left out and counted.

    Raises:
        DataError: A task's data are missing or wrong, or nothing of a task is left.
    """
    loaded = []
    tested = evaluation_inputs(data)
    for task in tasks:
        source = open_data(task, data / task.folder if data is not None else "auto")
        if source.source == "sample":
            raise DataError(f"task {task.name}: pre-training needs the real data; give --data or set BBPROMPT_DATA")
        train = source.split("train")
        if task.track == "seen":
            spared = pool_uids(task, train, spare_seeds)
            train = [example for example in train if example.uid not in spared]
        clean = [example for example in train if _texts(example) not in tested]
        if len(clean) < len(train):
            log.info("%s: left out %d examples that stand in a test split", task.name, len(train) - len(clean))
        train = clean

        def fits(example: Example, task: Task = task) -> bool:
            worst = _longest_options(example, option_limit, option_characters)
            try:
                return worst is not None and bool(encode(task.render(worst), tokenize, frame, worst.answers).ids)
            except DataError:
                return False

        def draw(examples: Sequence[Example], size: int, salt: int) -> tuple[Example, ...]:
            order = np.random.default_rng((seed, salt)).permutation(len(examples))
            chosen: list[Example] = []
            for index in order:
                if len(chosen) == size:
                    break
                if fits(examples[int(index)]):
                    chosen.append(examples[int(index)])
            return tuple(chosen)

        if "dev" in source.splits:
            check = draw(source.split("dev"), valid, 1)
        else:
            check = draw(train, valid, 1)
            held = {example.uid for example in check}
            train = [example for example in train if example.uid not in held]
        kept = draw(train, cap, 0)
        if not kept or not check:
            raise DataError(f"task {task.name}: no example fits {frame.limit} tokens; raise max_tokens")
        log.info("%s: %d of %d examples, %d to validate", task.name, len(kept), len(train), len(check))
        loaded.append(Upstream(task, kept, check))
    return loaded


def evaluation_inputs(data: Path | None) -> frozenset[tuple[str, ...]]:
    """The field contents of every example in the test splits of the tracks `seen` and `unseen`.

    Data sets share texts (two may be drawn from one site), so a training split may hold another task's test texts.
    Tasks whose data are not in `data` (None: `BBPROMPT_DATA`) are named in the log.

    Raises:
        DataError: A bundled evaluation task's data are wrong.
    """
    root = data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    inputs: set[tuple[str, ...]] = set()
    unknown = []
    for task in (load_task(name) for name in task_names()):
        if task.track not in ("seen", "unseen"):
            continue
        if root is None or not (root / task.folder).is_dir():
            unknown.append(task.name)
            continue
        inputs.update(_texts(example) for example in open_data(task, root / task.folder).split("test"))
    if unknown:
        log.warning("test texts of %s are not at hand: they cannot be left out of the training", ", ".join(unknown))
    return frozenset(inputs)


def _texts(example: Example) -> tuple[str, ...]:
    return tuple(sorted(example.fields.values()))


def _longest_options(example: Example, limit: int, characters: int) -> Example | None:
    """The example with the longest options that thinning may leave; None where two are too long already."""
    if not example.options:
        return example
    right = example.options[example.label]
    others = sorted((o for i, o in enumerate(example.options) if i != example.label), key=len, reverse=True)
    if len(right) + len(others[0]) > characters:
        return None
    kept, left = [right], characters - len(right)
    for option in others:
        if len(kept) < limit and len(option) <= left:
            kept.append(option)
            left -= len(option)
    return replace(example, options=tuple(kept), label=0)
