"""A fitted baseline at work: probabilities for new texts, and a split scored again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from bbprompt.baselines.features import VIEWS, Matrix, Reader
from bbprompt.baselines.heads import LinearHead, softmax
from bbprompt.baselines.rules import scores
from bbprompt.embedding import Embedder
from bbprompt.errors import DiskError
from bbprompt.metrics import accuracy
from bbprompt.store.rundir import PROMPT, RunDirectory
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import Task
from bbprompt.tensorfile import unpack

__all__ = ["FittedBaseline", "load_baseline"]

_AT_ONCE = 256


class FittedBaseline:
    """What a run of a baseline has fitted, with the model that reads.

    Args:
        task: Its task.
        embedder: The frozen model; None where none is read.
        view: What is read of an example.
        head: From features to scores.
    """

    def __init__(self, task: Task, embedder: Embedder | None, view: int, head: LinearHead) -> None:
        self._task, self._embedder, self._view, self._head = task, embedder, VIEWS[view], head

    def probabilities(self, examples: Sequence[Example]) -> list[Matrix]:
        """Probability of each option of each example."""
        found = scores(self._view, self._head, self._task, examples, Reader(self._embedder))
        return [row[: len(example.options)] for row, example in zip(softmax(found), examples, strict=True)]

    def hits(self, examples: Sequence[Example], report: Callable[[int], None]) -> tuple[Matrix, int]:
        """1 for each example that is labelled rightly, else 0, `(N,)`; and the tokens that were cut."""
        pieces, cut = [], 0
        for begin in range(0, len(examples), _AT_ONCE):
            some = examples[begin : begin + _AT_ONCE]
            read = Reader(self._embedder)
            found = scores(self._view, self._head, self._task, some, read)
            pieces.append(accuracy(found.argmax(axis=1).tolist(), [example.label for example in some]))
            cut += read.cut
            report(begin + len(some))
        return np.concatenate(pieces), cut

    def close(self) -> None:
        """Let go of the model; closing twice is harmless."""
        if self._embedder is not None:
            self._embedder.close()


def load_baseline(directory: RunDirectory, task: Task, embedder: Embedder | None) -> FittedBaseline:
    """Read what a finished run of a baseline has fitted.

    Raises:
        DiskError: The file is missing or damaged.
    """
    file = directory.path / PROMPT
    try:
        tensors = unpack(directory.read_bytes(PROMPT))
        view, head = int(tensors["view"]), LinearHead(tensors["weight"], tensors["bias"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DiskError(f"{file}: damaged ({error}); tune again") from None
    arrays: tuple[NDArray[np.float64], ...] = (head.weight, head.bias)
    if not 0 <= view < len(VIEWS) or not all(np.isfinite(array).all() for array in arrays):
        raise DiskError(f"{file}: damaged (no such view, or a number that is not finite); tune again")
    return FittedBaseline(task, embedder, view, head)
