"""The cheap methods beside a tuned prompt: same few-shot and test data, same run, for the reader alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from bbprompt.baselines.asked import Asked
from bbprompt.baselines.features import Matrix, Reader
from bbprompt.baselines.rules import applies, fit, scores, variants
from bbprompt.baselines.settings import BaselineRule
from bbprompt.baselines.words import WordLabeller
from bbprompt.embedding import Embedder, can_embed
from bbprompt.language import LanguageModel, language_model_of
from bbprompt.metrics import accuracy, standard_error
from bbprompt.oracle import Oracle
from bbprompt.result import BaselineScore
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import FewShot
from bbprompt.tasks.task import Task

__all__ = ["compare"]

_log = logging.getLogger("bbprompt")

#: The wording of labels tells nothing about two texts, and reading each pair once more would cost as much again.
_SINGLE: tuple[BaselineRule, ...] = ("zero-shot", "nearest-mean", "logistic")
_PAIR: tuple[BaselineRule, ...] = ("threshold", "nearest-mean", "logistic")


def compare(
    task: Task,
    few: FewShot,
    test: tuple[Example, ...],
    oracle: Oracle,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[BaselineScore, ...]:
    """Fit the rules that suit a task and what the model can say, and score them on the test data.

    A model behind a wire or on a cluster says neither its states nor words without prompts: nothing is compared then.

    Args:
        task: The task.
        few: What they are fitted and chosen on.
        test: What they are scored on.
        oracle: The frozen model.
        report: Told how many of how many texts are read.
    """
    if task.type == "extractive":
        return ()
    found: tuple[BaselineScore, ...] = ()
    if can_embed(oracle):
        found = _pooled(task, few, test, oracle, report)
    model = language_model_of(oracle)
    if model is not None:
        found += (_label_words(task, few, test, model, report),)
    if not found:
        _log.info(
            "no method without tuning is compared: this model, as it is asked here, scores prompts alone. What such a "
            "method gives says `--method zero-shot` or, of a language model, `--method zero-shot-lm`"
        )
    return found


def _pooled(
    task: Task, few: FewShot, test: tuple[Example, ...], embedder: Embedder, report: Callable[[int, int], None]
) -> tuple[BaselineScore, ...]:
    """Rules on pooled states. Every text is encoded once: the first rule that reads a view pays for it."""
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
        found.append(_score(rule, str(best.variant), best.dev, values, began))
    return tuple(found)


def _label_words(
    task: Task,
    few: FewShot,
    test: tuple[Example, ...],
    model: LanguageModel,
    report: Callable[[int, int], None],
) -> BaselineScore:
    """The words of the labels in the gap, with nothing in front of the text."""
    began, asked = time.monotonic(), Asked(model, lambda: report(min(asked.count, total), total))
    total, labeller = len(few.dev) + len(test), WordLabeller(task, asked)
    dev, on_test = (
        accuracy(labeller.scores(some).argmax(axis=1).tolist(), [example.label for example in some])
        for some in (few.dev, test)
    )
    return _score("zero-shot-lm", "label words", float(dev.mean()), on_test, began)


def _score(name: str, reads: str, dev: float, values: Matrix, began: float) -> BaselineScore:
    return BaselineScore(
        name=name,
        reads=reads,
        dev=dev,
        test=float(values.mean()),
        stderr=standard_error(values),
        seconds=round(time.monotonic() - began, 3),
    )
