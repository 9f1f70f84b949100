"""The cheap methods beside a tuned prompt: same few-shot and test data, same run, for the reader alone."""

from __future__ import annotations

import time
from collections.abc import Callable

from bbprompt.baselines.features import Reader
from bbprompt.baselines.rules import applies, fit, scores, variants
from bbprompt.baselines.settings import BaselineRule
from bbprompt.embedding import Embedder
from bbprompt.metrics import accuracy, standard_error
from bbprompt.result import BaselineScore
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import FewShot
from bbprompt.tasks.task import Task

__all__ = ["compare"]

#: The wording of labels tells nothing about two texts, and reading each pair once more would cost as much again.
_SINGLE: tuple[BaselineRule, ...] = ("zero-shot", "nearest-mean", "logistic")
_PAIR: tuple[BaselineRule, ...] = ("threshold", "nearest-mean", "logistic")


def compare(
    task: Task,
    few: FewShot,
    test: tuple[Example, ...],
    embedder: Embedder,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[BaselineScore, ...]:
    """Fit the rules that suit a task and score them on the test data.

    Every text is encoded once, so the first rule that reads a view pays its time and the others use it.

    Args:
        task: The task.
        few: What they are fitted and chosen on.
        test: What they are scored on.
        embedder: The frozen model.
        report: Told how many of how many texts are read.
    """
    total = (len(few.train) + len(few.dev) + len(test)) * (2 if task.type == "pair" else 1)
    read: Reader
    read = Reader(embedder, lambda: report(min(read.count, total), total))
    gold = [example.label for example in test]
    found = []
    for rule in _PAIR if task.type == "pair" else _SINGLE:
        if applies(rule, task) is not None:
            continue
        began = time.monotonic()
        ways = [way for way in variants(rule, task) if task.type != "pair" or way.view != "text"]
        best = min((fit(rule, way, task, few.train, few.dev, read) for way in ways), key=lambda each: each.dev_loss)
        values = accuracy(scores(best.variant.view, best.head, task, test, read).argmax(axis=1).tolist(), gold)
        found.append(
            BaselineScore(
                name=rule,
                reads=str(best.variant),
                dev=best.dev,
                test=float(values.mean()),
                stderr=standard_error(values),
                seconds=round(time.monotonic() - began, 3),
            )
        )
    return tuple(found)
