"""A fitted baseline at work: probabilities for new texts, and a split scored again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from safetensors import SafetensorError

from bbprompt.baselines.choice import Model, load_labeller
from bbprompt.baselines.features import Matrix
from bbprompt.baselines.heads import softmax
from bbprompt.baselines.labeller import Labeller
from bbprompt.baselines.settings import AnyBaseline
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
        fresh: Makes the labeller, with nothing kept of the texts it read before.
        model: The frozen model; None where none is read.
    """

    def __init__(self, fresh: Callable[[], Labeller], model: Model) -> None:
        self._fresh, self._model = fresh, model

    def probabilities(self, examples: Sequence[Example]) -> tuple[list[Matrix], int]:
        """Probability of each option of each example; and the tokens that were cut."""
        labeller = self._fresh()
        found = softmax(labeller.scores(examples))
        shares = [row[: len(example.options)] for row, example in zip(found, examples, strict=True)]
        return shares, labeller.cut

    def hits(self, examples: Sequence[Example], report: Callable[[int], None]) -> tuple[Matrix, int]:
        """1 for each example that is labelled rightly, else 0, `(N,)`; and the tokens that were cut."""
        pieces, cut = [], 0
        for begin in range(0, len(examples), _AT_ONCE):
            some = examples[begin : begin + _AT_ONCE]
            labeller = self._fresh()
            found = labeller.scores(some)
            pieces.append(accuracy(found.argmax(axis=1).tolist(), [example.label for example in some]))
            cut += labeller.cut
            report(begin + len(some))
        return np.concatenate(pieces), cut

    def close(self) -> None:
        """Let go of the model; closing twice is harmless."""
        if self._model is not None:
            self._model.close()


def load_baseline(directory: RunDirectory, settings: AnyBaseline, task: Task, model: Model) -> FittedBaseline:
    """Read what a finished run of a baseline has fitted.

    Raises:
        DiskError: The file is missing or damaged.
    """
    file = directory.path / PROMPT
    content = directory.read_bytes(PROMPT)
    try:
        tensors = unpack(content)
        load_labeller(settings, task, model, tensors)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DiskError(f"{file}: damaged ({' '.join(str(error).split())[:200]}); tune again") from None
    return FittedBaseline(lambda: load_labeller(settings, task, model, tensors), model)
