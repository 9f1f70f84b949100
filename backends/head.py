"""What a head does behind the local oracle: which sequences a batch needs, which rows it reads, what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from bbprompt.backends.layout import Layout
from bbprompt.errors import DataError, TextError
from bbprompt.oracle import Scores, Support, TextBatch
from bbprompt.texts.mrc import Encoded

__all__ = ["Head", "Plan", "each", "one_channel"]


class Plan(Protocol):
    """How the rows of some packed sequences are read; a head's own business but for this."""

    @property
    def read(self) -> Tensor | None:
        """`(N, R)` packed rows that the head reads of each sequence; None for all rows."""


class Head(Protocol):
    """One way to turn last states into scores. It knows no prompts and keeps nothing of a candidate."""

    def sequences(self, batch: TextBatch) -> list[Encoded]:
        """Token sequences that the batch needs, in an order that depends on the batch alone.

        Raises:
            TextError: A text does not fit; it is named by its number, counted from 1.
        """

    def plan(self, sequences: Sequence[Encoded], layout: Layout, support: Support) -> Any:
        """Prepare some consecutive sequences that lie packed as `layout` says; returns a `Plan`."""

    def apply(self, plan: Any, states: Tensor) -> Tensor:
        """Read the last states of n candidates: `(n, N, R, H)`, or `(n, T, H)` where all rows are read.

        Returns:
            `(n, ...)`, small; what `scores` takes.
        """

    def values(self, batch: TextBatch, plans: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Put together what `apply` gave for each part of the batch, in order, and still on its device.

        Returns:
            Logits `(n, O, C)` and normalizers `(n, N, C)`, as `Scores` has them.
        """

    def scores(
        self, batch: TextBatch, plans: Sequence[Any], outputs: Sequence[Tensor], longest_answer: int | None
    ) -> Scores:
        """The same as scores, with best answers where asked for."""


def each(batch: TextBatch, write: Callable[[int], Encoded]) -> list[Encoded]:
    """Write every text of a batch by its index.

    Raises:
        TextError: As `write` raises a `DataError`, with the number of the text, counted from 1.
    """
    written = []
    for number in range(len(batch.forms)):
        try:
            written.append(write(number))
        except DataError as error:
            raise TextError(f"text {number + 1}: {error}") from error
    return written


def one_channel(values: tuple[Tensor, Tensor], cut: int) -> Scores:
    """Scores of a readout that finds no answers: logits `(n, O, 1)` and normalizers `(n, N, 1)` of `Head.values`."""
    logits, normalizer = (tensor.cpu().numpy().astype(np.float32) for tensor in values)
    return Scores(logits, normalizer, None, cut)
