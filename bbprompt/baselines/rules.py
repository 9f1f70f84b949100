"""The cheap methods: which views each tries, how it is fitted, and how its scores are read.

What has to be chosen (view, wording, penalty, sharpness) is chosen by the dev loss; the test data are never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bbprompt.baselines.features import Matrix, Reader, View, features, wordings
from bbprompt.baselines.heads import (
    LinearHead,
    accuracy_of,
    cross_entropy,
    frequencies,
    logistic,
    nearest_mean,
    prototypes,
    scaled,
    sharpness,
    threshold,
)
from bbprompt.baselines.settings import BaselineRule
from bbprompt.errors import UsageError
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import Task

__all__ = ["Fitted", "Variant", "applies", "candidates", "fit", "scores", "variants"]

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way a rule may read a task; `wording` is empty where labels are not worded."""

    view: View
    wording: str = ""

    def __str__(self) -> str:
        """Return it in words, for the result."""
        return f"{self.view}, {self.wording}" if self.wording else self.view


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted rule with its train and dev loss and its dev accuracy."""

    variant: Variant
    head: LinearHead
    train_loss: float
    dev_loss: float
    dev: float


def applies(rule: BaselineRule, task: Task) -> str | None:
    """Why a rule cannot do a task, or None if it can."""
    if task.type == "extractive":
        return "it chooses among options, and the answers of this task are spans"
    if rule == "threshold" and (task.type != "pair" or len(task.options) != 2):
        return "it needs pairs of texts with two labels"
    if task.type == "choice" and rule != "zero-shot":
        return "it learns labels, and each example of this task has options of its own"
    return None


def variants(rule: BaselineRule, task: Task) -> tuple[Variant, ...]:
    """The ways a rule may read a task, in the order they are tried.

    Raises:
        UsageError: The rule cannot do the task.
    """
    if reason := applies(rule, task):
        raise UsageError(f"--method: the rule '{rule}' does not fit the task {task.name}: {reason}")
    if rule == "majority":
        return (Variant("none"),)
    if rule == "threshold":
        return (Variant("cosine"),)
    if task.type == "choice":
        return (Variant("stem"), Variant("query"))
    if rule == "zero-shot":
        return tuple(Variant("text", wording) for wording in wordings(task))
    return (Variant("pair"), Variant("text")) if task.type == "pair" else (Variant("text"),)


def candidates(rule: BaselineRule, task: Task) -> int:
    """How many ways to read the texts are tried, the first wording of the labels among them; each costs two calls.

    Raises:
        UsageError: The rule cannot do the task.
    """
    if rule == "majority":
        return 0  # it reads none
    return len(variants(rule, task)) + (rule != "zero-shot")


def fit(
    rule: BaselineRule,
    variant: Variant,
    task: Task,
    train: Sequence[Example],
    dev: Sequence[Example],
    read: Reader,
) -> Fitted:
    """Fit a rule on the few-shot data.

    Args:
        rule: Which.
        variant: How it reads the task; one of `variants`.
        task: The task.
        train: What is fitted on; for "majority" any labelled examples.
        dev: What penalty and sharpness are chosen on. "threshold" has nothing to choose and is fitted on both.
        read: Vectors of texts.
    """
    gold, known = [example.label for example in train], [example.label for example in dev]
    x, y = features(variant.view, task, train, read), features(variant.view, task, dev, read)
    labels = len(task.options)
    match rule:
        case "majority":
            head = frequencies(gold, labels)
        case "zero-shot" if task.type == "choice":
            head = LinearHead(np.full((1, 1), sharpness(y, known)), np.zeros(1))
        case "zero-shot":
            head = scaled(prototypes(read(wordings(task)[variant.wording]), x.mean(axis=0)), y, known)
        case "nearest-mean":
            head = scaled(nearest_mean(x, gold, labels), y, known)
        case "logistic":
            tried = [logistic(x, gold, labels, penalty) for penalty in _PENALTIES]
            head = min(tried, key=lambda each: cross_entropy(each.scores(y), known))
        case "threshold":
            head = threshold(np.concatenate([x, y]), gold + known)
    on_train, on_dev = _scores(variant.view, head, x), _scores(variant.view, head, y)
    return Fitted(
        variant, head, cross_entropy(on_train, gold), cross_entropy(on_dev, known), accuracy_of(on_dev, known)
    )


def scores(view: View, head: LinearHead, task: Task, examples: Sequence[Example], read: Reader) -> Matrix:
    """Scores `(N, labels)` of a fitted head; for own options `(N, options)`, -inf where there is none."""
    return _scores(view, head, features(view, task, examples, read))


def _scores(view: View, head: LinearHead, values: Matrix) -> Matrix:
    if view in ("stem", "query"):  # the values are scores already, but for their sharpness
        sharper: Matrix = values * head.weight[0, 0]
        return sharper
    return head.scores(values)
