"""The frozen model as a reader: texts in, one vector each out, no prompt, forward only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from bbprompt.oracle import OracleInfo

__all__ = ["Embedder", "Embeddings", "can_embed"]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What a model makes of N texts.

    Attributes:
        vectors: `(N, H)` float32: the mean of each text's last hidden states, divided by its length.
        cut: Tokens that did not fit the model, over all texts.
    """

    vectors: NDArray[np.float32]
    cut: int


class Embedder(Protocol):
    """A frozen model that gives texts as vectors; the same text always gives the same vector."""

    @property
    def info(self) -> OracleInfo:
        """What the model is."""

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """Read texts, at least one; what is too long is cut from the right.

        The model's own marker, such as "query: " for E5, is put before each.
        """

    def close(self) -> None:
        """Let go of the model; safe to call twice."""


def can_embed(model: object) -> TypeGuard[Embedder]:
    """Whether a model also gives vectors: the local one does, an oracle behind a wire may not."""
    return callable(getattr(model, "embed", None))
