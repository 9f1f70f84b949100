"""Which examples a model cannot read, told by file and line, and before anything is spent where the model is here.

A model sees the texts of a batch and numbers them; only a run knows which records they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import DataError, TextError
from bbprompt.oracle import Oracle, OracleInfo, ReadoutKind, Scores, Support, TextBatch
from bbprompt.scoring import labelled
from bbprompt.tasks.data import DataSource
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import Task
from bbprompt.texts.forms import write

__all__ = ["Checker", "NamingOracle", "can_check", "check_readable", "named"]

_TEXTS_AT_ONCE = 64


class Checker(Protocol):
    """A model that can tell without a call which texts it cannot read."""

    def check_texts(self, batch: TextBatch) -> None:
        """See that every text can be read.

        Raises:
            TextError: One cannot.
        """


def can_check(model: object) -> TypeGuard[Checker]:
    """Whether a model tells that: one that is here does, one behind a wire does not."""
    return callable(getattr(model, "check_texts", None))


def check_readable(
    model: object,
    readout: ReadoutKind,
    task: Task,
    data: DataSource,
    known: Sequence[Example],
    blind: Sequence[Example] = (),
) -> None:
    """See that a model can read all examples of a run; a model that cannot tell is not asked.

    Args:
        model: An oracle, or what else reads texts.
        readout: How it reads them.
        task: Their task.
        data: Where they are from.
        known: Examples whose answers go along: few-shot train and dev.
        blind: Those whose do not: test.

    Raises:
        DataError: One cannot be read; names file and line.
    """
    if not can_check(model):
        return
    for examples, for_loss in ((known, True), (blind, False)):
        for begin in range(0, len(examples), _TEXTS_AT_ONCE):
            some = examples[begin : begin + _TEXTS_AT_ONCE]
            with named(data, some):
                model.check_texts(labelled(task, some, for_loss=for_loss, readout=readout).batch)


@contextmanager
def named(data: DataSource, examples: Sequence[Example]) -> Iterator[None]:
    """Name the record in the place of the number that a text has among `examples`.

    Raises:
        DataError: In place of a `TextError` that numbers one of `examples`; names file and line.
    """
    try:
        yield
    except TextError as error:
        if not 1 <= error.number <= len(examples):
            raise
        where = data.where(examples[error.number - 1].uid)
        raise DataError(f"{where}: {error.reason}") from error


class NamingOracle:
    """An oracle that names records instead of numbering texts.

    Args:
        oracle: The frozen model.
        task: The task of all that it is asked about.
        data: Where that is from.
        examples: All that it is asked about.
    """

    def __init__(self, oracle: Oracle, task: Task, data: DataSource, examples: Iterable[Example]) -> None:
        self._oracle, self._task, self._data, self._examples = oracle, task, data, tuple(examples)

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
            DataError: A text cannot be read; names file and line.
        """
        try:
            return self._oracle.score(batch, points, support, longest_answer)
        except TextError as error:
            form = batch.forms[error.number - 1] if 1 <= error.number <= len(batch.forms) else None
            for example in self._examples:
                if write(self._task, example, self.info.readout) == form:
                    raise DataError(f"{self._data.where(example.uid)}: {error.reason}") from error
            raise

    def close(self) -> None:
        """Let go of the oracle."""
        self._oracle.close()
