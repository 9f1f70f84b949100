"""What a tuned prompt says of every test example: confusions, and the examples that it gets most wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bbprompt.metrics import answer_f1
from bbprompt.predict import Prediction, TunedPrompt
from bbprompt.run import limited
from bbprompt.tasks.data import open_data
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import Task

__all__ = ["Judged", "confusion", "judge", "worst"]

_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Judged:
    """A test example with what was said of it.

    Attributes:
        fields: Its texts by name.
        right: The right label, option or answers.
        given: What the prompt said.
        score: 1 or 0; for extraction the F1 of the answer.
        probability: Of the right option; for extraction the F1 again.
        confidence: Of the option that was given; 1 for extraction.
    """

    fields: Mapping[str, str]
    right: str
    given: str
    score: float
    probability: float
    confidence: float


def judge(prompt: TunedPrompt, limit: int | None, report: Callable[[int, int], None]) -> list[Judged]:
    """Label the run's own test examples again.

    Args:
        prompt: The finished run.
        limit: Most examples; None for those that the run was scored on.
        report: Told how many of how many are done.

    Raises:
        DataError: The data are not there any more, or a record is wrong.
    """
    most = prompt.config.test_limit if limit is None else limit
    source = open_data(prompt.task, prompt.config.data)
    examples = limited(source.split("test"), most, prompt.config.seed)
    found: list[Judged] = []
    for begin in range(0, len(examples), _AT_ONCE):
        some = examples[begin : begin + _AT_ONCE]
        found += [
            _judged(prompt.task, example, said)
            for example, said in zip(some, prompt.predict_examples(some), strict=True)
        ]
        report(len(found), len(examples))
    return found


def _judged(task: Task, example: Example, said: Prediction) -> Judged:
    if task.type == "extractive":
        score = answer_f1(said.label, example.answers)
        right = " / ".join(dict.fromkeys(answer.text for answer in example.answers))
        return Judged(example.fields, right, said.label, score, score, 1.0)
    names = list(task.labels) if task.labelled else list(example.options)
    right = names[example.label]
    return Judged(
        example.fields,
        right,
        said.label,
        float(said.label == right),
        said.probabilities.get(right, 0.0),
        said.probabilities.get(said.label, 0.0),
    )


def worst(judged: Sequence[Judged], count: int) -> list[Judged]:
    """The wrong examples whose right answer was held least probable, worst first."""
    wrong = [each for each in judged if each.score < 1]
    return sorted(wrong, key=lambda each: (each.probability, -each.confidence))[:count]


def confusion(labels: Sequence[str], judged: Sequence[Judged]) -> np.ndarray:
    """How often each label (row) was given as each label (column), `(C, C)`."""
    places = {label: place for place, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for each in judged:
        counts[places[each.right], places[each.given]] += 1
    return counts
