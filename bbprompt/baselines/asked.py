"""A language model that is asked, with what that costs: texts, seconds, tokens that did not fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from bbprompt.baselines.features import Matrix
from bbprompt.language import LanguageModel
from bbprompt.oracle import Scores, TextBatch
from bbprompt.tasks.example import Form
from bbprompt.texts.demonstrations import Demonstrations

__all__ = ["Asked"]

_AT_ONCE = 64


class Asked:
    """Asks a model, some texts at a time.

    Args:
        model: The frozen model.
        check: Called between pieces of work; what it raises stops the run.

    Attributes:
        model: The frozen model.
        seconds: Wall time in the model.
        cut: Tokens that did not fit the model.
        count: Texts read so far.
    """

    def __init__(self, model: LanguageModel, check: Callable[[], None] = lambda: None) -> None:
        self.model, self._check = model, check
        self.seconds, self.cut, self.count = 0.0, 0, 0

    def words(self, forms: Sequence[Form], before: Sequence[int] = ()) -> Matrix:
        """Logits of the options of N texts behind `before`: `(N, options)`, -inf where there is none."""
        widest = max(len(form.options) for form in forms)
        pieces = []
        for begin in range(0, len(forms), _AT_ONCE):
            some = forms[begin : begin + _AT_ONCE]
            began = time.monotonic()
            scores = self.model.words(some, before)
            self._note(began, len(some), scores.cut)
            pieces.append(_rows(scores, some, widest))
        return np.concatenate(pieces)

    def recall(self, shown: Sequence[tuple[Form, int]], demonstrations: Demonstrations) -> Matrix:
        """Logits of the options of every demonstration behind the earlier ones."""
        some = [form for form, _ in shown[: len(demonstrations.gaps)]]
        began = time.monotonic()
        scores = self.model.recall(shown, demonstrations)
        self._note(began, len(some), scores.cut)
        return _rows(scores, some, max(len(form.options) for form in some))

    def vocabulary(self, forms: Sequence[Form], tokens: Sequence[int] | None = None) -> Matrix:
        """Log-probabilities `(N, E)` of tokens in the gaps of N texts; of all tokens without `tokens`."""
        pieces = []
        for begin in range(0, len(forms), _AT_ONCE):
            some = forms[begin : begin + _AT_ONCE]
            began = time.monotonic()
            found = self.model.vocabulary(some, tokens)
            self._note(began, len(some), found.cut)
            pieces.append(found.logs.astype(np.float64))
        return np.concatenate(pieces)

    def _note(self, began: float, texts: int, cut: int) -> None:
        self.seconds += time.monotonic() - began
        self.count += texts
        self.cut += cut
        self._check()


def _rows(scores: Scores, forms: Sequence[Form], widest: int) -> Matrix:
    """The scores of one candidate, a row a text."""
    rows = np.full((len(forms), widest), -np.inf)
    at = 0
    for row, size in zip(rows, TextBatch(tuple(forms)).sizes, strict=True):
        row[:size] = scores.logits[0, at : at + size, 0]
        at += size
    return rows
