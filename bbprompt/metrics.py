"""Metrics: accuracy, and the character-level F1 of extracted answers."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bbprompt.tasks.example import Answer

__all__ = ["accuracy", "answer_f1", "majority", "standard_error"]


def accuracy(choices: Sequence[int], gold: Sequence[int]) -> NDArray[np.float64]:
    """1 where the choice is right, else 0, `(N,)`; the mean is the accuracy."""
    return np.equal(choices, gold).astype(np.float64)


def answer_f1(given: str, answers: Sequence[Answer]) -> float:
    """Best character-level F1 of an extracted answer against the accepted ones.

    Characters count with multiplicity; white space, punctuation and letter case do not count.
    """
    return max(_f1(_characters(given), _characters(answer.text)) for answer in answers)


def majority(gold: Sequence[int], labels: int) -> float:
    """Accuracy of always answering the most frequent label."""
    return float(np.bincount(np.asarray(gold), minlength=labels).max() / len(gold))


def standard_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean of `values` (N,); 0 for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _characters(text: str) -> Counter[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return Counter(c for c in folded if unicodedata.category(c)[0] not in "PZC")


def _f1(given: Counter[str], right: Counter[str]) -> float:
    common = sum((given & right).values())
    if not common:
        return float(not given and not right)
    precision, recall = common / sum(given.values()), common / sum(right.values())
    return 2 * precision * recall / (precision + recall)
