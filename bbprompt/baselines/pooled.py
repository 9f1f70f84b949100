"""The baselines on pooled states as an approach: each way a rule may read the task is a candidate, dev loss chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbprompt.baselines.calls import Calls
from bbprompt.baselines.features import VIEWS, Matrix, Reader, View
from bbprompt.baselines.heads import LinearHead, accuracy_of, cross_entropy, frequencies
from bbprompt.baselines.labeller import Solved
from bbprompt.baselines.rules import Fitted, Variant, fit, scores, variants
from bbprompt.baselines.settings import BaselineRule
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import FewShot
from bbprompt.tasks.task import Task

__all__ = ["PooledApproach", "PooledLabeller"]


class PooledLabeller:
    """A fitted rule.

    Args:
        task: Its task.
        view: What is read of an example.
        head: From features to scores.
        read: Vectors of texts.
    """

    def __init__(self, task: Task, view: View, head: LinearHead, read: Reader) -> None:
        self._task, self._view, self._head, self._read = task, view, head, read

    @property
    def cut(self) -> int:
        """Tokens that did not fit the model so far, over distinct texts."""
        return self._read.cut

    def scores(self, examples: Sequence[Example]) -> Matrix:
        """Scores of examples; see `bbprompt.baselines.labeller.Labeller`."""
        return scores(self._view, self._head, self._task, examples, self._read)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Weights, biases, and the number of the view."""
        view = np.array(VIEWS.index(self._view), dtype=np.int64)
        return {"weight": self._head.weight, "bias": self._head.bias, "view": view}

    @classmethod
    def load(cls, task: Task, tensors: Mapping[str, NDArray[Any]], read: Reader) -> PooledLabeller:
        """Make it again.

        Raises:
            KeyError, ValueError, TypeError: These are no tensors of such a labeller.
        """
        view, head = int(tensors["view"]), LinearHead(tensors["weight"], tensors["bias"])
        if not 0 <= view < len(VIEWS) or not all(np.isfinite(array).all() for array in (head.weight, head.bias)):
            raise ValueError("no such view, or a number that is not finite")
        scores = len(task.options) or 1  # options of an example's own share one factor
        if head.weight.ndim != 2 or len(head.weight) != scores or head.bias.shape != (scores,):
            sizes = f"weights {head.weight.shape} and biases {head.bias.shape}"
            raise ValueError(f"{sizes} are not those of {scores} scores")
        return cls(task, VIEWS[view], head, read)


class PooledApproach:
    """A rule of `bbprompt.baselines.rules`.

    Args:
        rule: Which.
        task: The task.
        read: Vectors of texts.
        labels: How often each label stands in the whole training split; only the majority rule looks at it.

    Attributes:
        meter: What reading costs.
    """

    def __init__(self, rule: BaselineRule, task: Task, read: Reader, labels: Sequence[int]) -> None:
        self._rule, self._task, self._labels = rule, task, labels
        self._read = self.meter = read

    def most(self, few: FewShot, test: int) -> int:
        """Each text once; of a pair also both together."""
        return (len(few.train) + len(few.dev) + test) * (3 if self._task.type == "pair" else 1)

    def solve(self, few: FewShot, calls: Calls) -> tuple[Solved, Solved]:
        """Fit every variant of the rule; what there is before is the first wording of the labels."""

        def made(rule: BaselineRule, variant: Variant) -> Solved:
            fitted = calls.make(
                f"{rule}:{variant.view}:{variant.wording}",
                lambda: fit(rule, variant, self._task, few.train, few.dev, self._read),
            )
            return self._solved(fitted)

        if self._rule == "majority":  # reads labels alone: no call
            only = self._solved(self._most_frequent(few))
            return only, only
        tried = [made(self._rule, variant) for variant in variants(self._rule, self._task)]
        best = min(tried, key=lambda each: each.dev_loss)
        if self._rule == "zero-shot":
            return tried[0], best
        return made("zero-shot", variants("zero-shot", self._task)[0]), best

    def _solved(self, fitted: Fitted) -> Solved:
        labeller = PooledLabeller(self._task, fitted.variant.view, fitted.head, self._read)
        return Solved(str(fitted.variant), labeller, fitted.train_loss, fitted.dev_loss, fitted.dev)

    def _most_frequent(self, few: FewShot) -> Fitted:
        gold = [label for label, count in enumerate(self._labels) for _ in range(count)]
        head = frequencies(gold, len(self._labels))
        (on_train, right), (on_dev, known) = (
            (head.scores(np.zeros((len(examples), 0))), [example.label for example in examples])
            for examples in (few.train, few.dev)
        )
        return Fitted(
            variants("majority", self._task)[0],
            head,
            cross_entropy(on_train, right),
            cross_entropy(on_dev, known),
            accuracy_of(on_dev, known),
        )
