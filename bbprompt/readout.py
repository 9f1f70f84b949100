"""The span readout: from start and end scores to a loss, a decision and probabilities.

An option's score is the sum of the log-probabilities of its start and of its end (MP2, section 3.2). The
released code multiplies the raw logits instead, which two negative logits win; `legacy` keeps that rule for
comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bbprompt.losses import hinge
from bbprompt.oracle import Scores, Support, TextBatch

__all__ = ["SpanReadout"]


@dataclass(frozen=True, slots=True)
class SpanReadout:
    """How scores are read.

    Attributes:
        support: What start and end probabilities are normalised over.
        legacy: Decide by the product of raw logits.
        longest_answer: Longest extracted answer in tokens.
        loss: "ce", cross-entropy of start and end, or "hinge" over the options' scores.
    """

    support: Support = "candidates"
    legacy: bool = False
    longest_answer: int = 32
    loss: Literal["ce", "hinge"] = "ce"

    def losses(self, scores: Scores, batch: TextBatch, gold: Sequence[int]) -> NDArray[np.float64]:
        """Loss of each candidate on each text: (CE(start) + CE(end)) / 2, or the hinge loss of the option scores.

        Args:
            scores: Of n candidates.
            batch: The N texts.
            gold: Index of the right option of each text; ignored for extraction.

        Returns:
            `(n, N)`.
        """
        if self.loss == "hinge" and not batch.extractive:
            return hinge(self.option_scores(scores), batch.sizes, gold)
        first = _first_span(batch)
        right = first + (0 if batch.extractive else np.asarray(gold))
        log_probability = scores.logits[:, right].astype(np.float64) - scores.normalizer
        losses: NDArray[np.float64] = -log_probability.mean(axis=2)
        return losses

    def option_scores(self, scores: Scores) -> NDArray[np.float64]:
        """Score of every option, `(n, O)`; comparable within one text."""
        start, end = scores.logits[..., 0].astype(np.float64), scores.logits[..., 1].astype(np.float64)
        return start * end if self.legacy else start + end

    def probabilities(self, scores: Scores, batch: TextBatch) -> list[list[NDArray[np.float64]]]:
        """Softmax of the option scores of each text: for each candidate N arrays that sum to 1."""
        bounds = np.cumsum(batch.sizes)[:-1]
        result = []
        for row in self.option_scores(scores):
            pieces = [np.exp(piece - piece.max()) for piece in np.split(row, bounds)]
            result.append([piece / piece.sum() for piece in pieces])
        return result

    def choices(self, scores: Scores, batch: TextBatch) -> NDArray[np.int64]:
        """Index of the best option of each text, `(n, N)`; the first of equals."""
        bounds = np.cumsum(batch.sizes)[:-1]
        rows = self.option_scores(scores)
        return np.array([[int(piece.argmax()) for piece in np.split(row, bounds)] for row in rows])

    def extracts(self, scores: Scores, batch: TextBatch) -> list[list[str]]:
        """The extracted answer of each text, for each candidate."""
        if scores.best is None:
            raise ValueError("these scores were asked for without answers")
        contexts = [form.parts[form.context].text for form in batch.forms]
        return [[text[a:b] for text, (a, b) in zip(contexts, row, strict=True)] for row in scores.best]


def _first_span(batch: TextBatch) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(batch.sizes)[:-1])).astype(np.int64)
