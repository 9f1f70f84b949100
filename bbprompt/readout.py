"""The readout: from an oracle's scores to a loss, a decision and probabilities.

An option has C logits: a start and an end logit from the span head, one logit from prototypes and verbalizers.
Its score is their sum; for spans that is the sum of the log-probabilities of start and end (MP2, section 3.2) up
to a constant of the text. The released code of MP2 multiplies the two raw logits instead, which two negative
logits win; `legacy` keeps that rule for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import UsageError
from bbprompt.losses import hinge
from bbprompt.oracle import Scores, Support, TextBatch

__all__ = ["TEMPERATURES", "Readout", "right_spans"]

#: What option scores are divided by where prompts are compared at the temperature that suits them.
TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, slots=True)
class Readout:
    """How scores are read.

    Attributes:
        support: What start and end probabilities are normalised over.
        legacy: Decide by the product of the raw start and end logits.
        longest_answer: Longest extracted answer in tokens.
        loss: "ce", cross-entropy (for spans the mean of start and end), or "hinge" over the options' scores.
        offsets: Added to the logits of each option, where every text has the same options; empty for none.
        tempered: Compare prompts at several temperatures; see `compared`.
    """

    support: Support = "candidates"
    legacy: bool = False
    longest_answer: int = 32
    loss: Literal["ce", "hinge"] = "ce"
    offsets: tuple[float, ...] = ()
    tempered: bool = False

    def losses(self, scores: Scores, batch: TextBatch, gold: Sequence[int]) -> NDArray[np.float64]:
        """Loss of each candidate on each text: mean cross-entropy of the channels, or hinge loss of the options.

        Args:
            scores: Of n candidates.
            batch: The N texts.
            gold: Index of the right option of each text; ignored for extraction.

        Returns:
            `(n, N)`.
        """
        if self.loss == "hinge" and not batch.extractive:
            return hinge(self.option_scores(scores), batch.sizes, gold)
        right = right_spans(batch, gold)
        logits: NDArray[np.floating] = scores.logits
        normalizer: NDArray[np.floating] = scores.normalizer
        if self.offsets:
            logits, normalizer = self._shifted(scores, batch)
        log_probability = logits[:, right].astype(np.float64) - normalizer
        losses: NDArray[np.float64] = -log_probability.mean(axis=2)
        return losses

    def compared(self, scores: Scores, batch: TextBatch, gold: Sequence[int]) -> NDArray[np.float64]:
        """What prompts are compared by: `losses`, or cross-entropies of the decision at T temperatures.

        A prompt that is too sure of itself, or not sure enough, may still tell the options apart better than another:
        scores divided by a temperature keep their order (Guo et al. 2017, arXiv:1706.04599). Answers to be found in a
        text are not compared so, for the scores of all its spans are not known here.

        Returns:
            `(n, T, N)`; T is 1 unless `tempered`.
        """
        if not self.tempered or batch.extractive:
            return self.losses(scores, batch, gold)[:, None]
        rows = self.option_scores(scores)[:, None] / np.array(TEMPERATURES)[:, None]
        normalizer = np.logaddexp.reduceat(rows, _first_span(batch), axis=2)
        compared: NDArray[np.float64] = normalizer - rows[..., right_spans(batch, gold)]
        return compared

    def option_scores(self, scores: Scores) -> NDArray[np.float64]:
        """Score of every option, `(n, O)`; comparable within one text.

        Raises:
            UsageError: The product rule, and the scores are no pairs of start and end.
        """
        logits = scores.logits.astype(np.float64)
        if self.offsets:
            logits += np.resize(np.array(self.offsets)[:, None], (logits.shape[1], 1))
        if not self.legacy:
            total: NDArray[np.float64] = logits.sum(axis=2)
            return total
        if logits.shape[2] != 2:
            raise UsageError(
                "legacy_decision: the product of start and end logits needs a span head, these prompts have none; "
                "set legacy_decision to false"
            )
        product: NDArray[np.float64] = logits.prod(axis=2)
        return product

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

    def _shifted(self, scores: Scores, batch: TextBatch) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logits with the offsets added and their log-sum-exp over the options of each text."""
        offsets = np.resize(np.array(self.offsets)[:, None], (scores.logits.shape[1], 1))
        logits = scores.logits.astype(np.float64) + offsets
        normalizer: NDArray[np.float64] = np.logaddexp.reduceat(logits, _first_span(batch), axis=1)
        return logits, normalizer

    def extracts(self, scores: Scores, batch: TextBatch) -> list[list[str]]:
        """The extracted answer of each text, for each candidate.

        Raises:
            ValueError: The scores were asked for without `longest_answer`, so there are no answers in them.
        """
        if scores.best is None:
            raise ValueError("these scores were asked for without answers")
        contexts = [form.parts[form.context].text for form in batch.forms]
        return [[text[a:b] for text, (a, b) in zip(contexts, row, strict=True)] for row in scores.best]


def _first_span(batch: TextBatch) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(batch.sizes)[:-1])).astype(np.int64)


def right_spans(batch: TextBatch, gold: Sequence[int]) -> NDArray[np.int64]:
    """Index among all scored spans of the right one of each text, `(N,)`; for extraction that of its known answer."""
    return _first_span(batch) + (0 if batch.extractive else np.asarray(gold))
