"""Several words for a label, which scores by the mean over them (BBT-RGB, Sun et al. 2023, arXiv:2305.08088).

The model is asked about the same texts with all words of all labels as options, and its scores become those of the
labels. So a search, a server and a readout know nothing of it. As many mask tokens fill the gap of a masked model as
the longest of all these words has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bbprompt.config import MethodConfig
from bbprompt.errors import UsageError
from bbprompt.oracle import Oracle, OracleInfo, ReadoutKind, Scores, Support, TextBatch, can_count, check_scores
from bbprompt.readable import can_check
from bbprompt.tasks.task import Task

__all__ = ["SynonymOracle", "check_synonyms", "with_synonyms"]


def check_synonyms(method: MethodConfig, readout: ReadoutKind) -> None:
    """Refuse a method with `synonyms` where a model is asked through a readout that reads no label words.

    Raises:
        UsageError: It is so.
    """
    if method.synonyms and readout != "verbalizer":
        raise UsageError(
            f"--set synonyms=true: the prompts have the readout '{readout}', which reads no label words; set it to "
            "false, or name prompts with the readout 'verbalizer'"
        )


def with_synonyms(oracle: Oracle, method: MethodConfig, task: Task) -> Oracle:
    """The oracle as a method asks it about a task; itself where a label has one word, or the method reads one alone."""
    several = method.synonyms and any(len(words) > 1 for words in task.synonyms.values())
    return SynonymOracle(oracle, task.synonyms) if several else oracle


class SynonymOracle:
    """An oracle whose options score by the mean logit of several words each.

    It checks texts and counts tokens where the oracle behind it does.

    Args:
        oracle: The frozen model; an option has one channel, see `OracleInfo.channels`.
        words: Option -> the words that it scores by, at least one; an option that is not here is its own word.
    """

    def __init__(self, oracle: Oracle, words: Mapping[str, Sequence[str]]) -> None:
        self._oracle, self._words = oracle, {option: tuple(own) for option, own in words.items()}

    @property
    def info(self) -> OracleInfo:
        """What the oracle is."""
        return self._oracle.info

    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score every candidate on every text; see `bbprompt.oracle.Oracle`.

        Raises:
            OracleError: The oracle cannot be reached or breaks its contract.
            TextError: A text does not fit the model.
        """
        written = self._written(batch)
        scores = self._oracle.score(written, points, support, longest_answer)
        if written == batch:
            return scores
        return self._merged(batch, check_scores(scores, written, len(points), channels=1))

    @property
    def check_texts(self) -> Callable[[TextBatch], None]:
        """See that every text can be read; not there where the oracle cannot tell. See `bbprompt.readable.Checker`."""
        oracle = self._oracle
        if not can_check(oracle):
            raise AttributeError("check_texts")
        return lambda batch: oracle.check_texts(self._written(batch))

    @property
    def count_tokens(self) -> Callable[..., int]:
        """Tokens of all texts under one candidate; not there where the oracle does not count.

        See `bbprompt.oracle.TokenCounter`.
        """
        oracle = self._oracle
        if not can_count(oracle):
            raise AttributeError("count_tokens")
        return lambda batch, *support: oracle.count_tokens(self._written(batch), *support)

    def close(self) -> None:
        """Let go of the oracle."""
        self._oracle.close()

    def _own(self, option: str) -> tuple[str, ...]:
        return self._words.get(option, (option,))

    def _written(self, batch: TextBatch) -> TextBatch:
        """The texts with all words of their options as options, those of an option in a row."""
        forms = (
            replace(form, options=tuple(word for option in form.options for word in self._own(option)))
            for form in batch.forms
        )
        return TextBatch(tuple(forms), batch.answers)

    def _merged(self, batch: TextBatch, scores: Scores) -> Scores:
        """Scores of the options of the texts from those of all words.

        Means and log-sum-exps of doubles, so that a candidate's last bit does not depend on those beside it.
        """
        sizes = [len(self._own(option)) for form in batch.forms for option in form.options]
        sums = np.add.reduceat(scores.logits.astype(np.float64), np.cumsum([0, *sizes[:-1]]), axis=1)
        logits = (sums / np.array(sizes)[:, None]).astype(np.float32)
        texts = np.split(logits.astype(np.float64), np.cumsum(batch.sizes)[:-1], axis=1)
        normalizer = np.stack([np.logaddexp.reduce(own, axis=1) for own in texts], axis=1)
        return Scores(logits, normalizer.astype(np.float32), scores.best, scores.cut)
