"""What every baseline comes to: something that labels examples, and how well it does so on the few-shot data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from bbprompt.baselines.calls import Calls
from bbprompt.baselines.features import Matrix
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import FewShot

__all__ = ["Approach", "Labeller", "Meter", "Solved"]


class Labeller(Protocol):
    """A fitted way to label examples with a frozen model."""

    @property
    def cut(self) -> int:
        """Tokens that did not fit the model so far."""

    def scores(self, examples: Sequence[Example]) -> Matrix:
        """Logits `(N, options)`; -inf where an example has fewer options than others."""

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What it takes, with the manifest, to make it again."""


@dataclass(frozen=True, slots=True)
class Solved:
    """A labeller with how it reads an example, in words, its train and dev loss and its dev accuracy."""

    reads: str
    labeller: Labeller
    train_loss: float
    dev_loss: float
    dev: float


class Meter(Protocol):
    """What a model has cost so far."""

    @property
    def seconds(self) -> float:
        """Wall time in the model."""

    @property
    def cut(self) -> int:
        """Tokens of texts that did not fit it."""

    @property
    def count(self) -> int:
        """Texts read."""


class Approach(Protocol):
    """One way to do without prompt vectors, with its model open."""

    @property
    def meter(self) -> Meter:
        """What its model has cost so far."""

    def most(self, few: FewShot, test: int) -> int:
        """Most texts that a run reads, for the progress display."""

    def solve(self, few: FewShot, calls: Calls) -> tuple[Solved, Solved]:
        """What there is with nothing fitted, and what is returned; the same object where nothing is fitted."""
