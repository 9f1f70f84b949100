"""Scoring labelled examples under given points: few-shot batches, whole splits, and new texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bbprompt.metrics import accuracy, answer_f1
from bbprompt.oracle import Oracle, ReadoutKind, Scores, TextBatch, check_scores
from bbprompt.readout import Readout
from bbprompt.tasks.example import Answer, Example
from bbprompt.tasks.task import Task
from bbprompt.texts.forms import write

__all__ = ["Labelled", "SplitScore", "labelled", "metric_values", "score_split"]

_TEXTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Labelled:
    """A batch with what is right.

    Attributes:
        batch: The N texts.
        gold: Index of the right option of each text; -1 for extraction.
        answers: Extraction: the accepted answers of each text.
    """

    batch: TextBatch
    gold: tuple[int, ...]
    answers: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True, slots=True)
class SplitScore:
    """Metric values `(n, N)` of n readings on the N examples of a split, and how many tokens were cut."""

    values: NDArray[np.float64]
    cut: int


def labelled(task: Task, examples: Sequence[Example], for_loss: bool, readout: ReadoutKind = "span") -> Labelled:
    """Write examples out for the model.

    Args:
        task: Their task.
        examples: At least one.
        for_loss: Extraction: the first known answer goes along, so that its loss can be asked for and a
            context that is too long is cut around it. Never so for a test split.
        readout: How the oracle scores options.

    Raises:
        UsageError: The readout cannot serve the task.
    """
    forms = tuple(write(task, example, readout) for example in examples)
    extractive = task.type == "extractive"
    known: tuple[Answer | None, ...] = ()
    if extractive:
        known = tuple(example.answers[0] if for_loss and example.answers else None for example in examples)
    return Labelled(
        TextBatch(forms, known),
        tuple(example.label for example in examples),
        tuple(example.answers for example in examples),
    )


def metric_values(task: Task, readout: Readout, scores: Scores, data: Labelled) -> NDArray[np.float64]:
    """Metric of each candidate on each text, `(n, N)`: accuracy 0/1, or the F1 of the extracted answer."""
    if task.type == "extractive":
        return np.array(
            [
                [answer_f1(given, answers) for given, answers in zip(row, data.answers, strict=True)]
                for row in readout.extracts(scores, data.batch)
            ]
        )
    return np.array([accuracy(row, data.gold) for row in readout.choices(scores, data.batch)])


def score_split(
    oracle: Oracle,
    readings: Sequence[tuple[int, Readout]],
    task: Task,
    examples: Sequence[Example],
    points: NDArray[np.floating],
    report: Callable[[int], None] = lambda done: None,
) -> SplitScore:
    """Metric of prompts on every example.

    Args:
        oracle: The frozen model.
        readings: Which of the points is read in which way; what they ask of the oracle, support and longest answer,
            must be the same for all.
        task: The examples' task.
        examples: The split.
        points: `(n, L, d)`, each of which is scored once.
        report: Told how many examples are done.

    Returns:
        A row for each reading.
    """
    readout = readings[0][1]
    longest = readout.longest_answer if task.type == "extractive" else None
    pieces, cut = [], 0
    for begin in range(0, len(examples), _TEXTS_AT_ONCE):
        data = labelled(task, examples[begin : begin + _TEXTS_AT_ONCE], for_loss=False, readout=oracle.info.readout)
        scores = check_scores(
            oracle.score(data.batch, points, readout.support, longest),
            data.batch,
            len(points),
            answers=longest is not None,
            channels=oracle.info.channels,
        )
        pieces.append(np.concatenate([metric_values(task, each, scores.of(point), data) for point, each in readings]))
        cut += scores.cut
        report(begin + len(data.gold))
    return SplitScore(np.concatenate(pieces, axis=1), cut)
