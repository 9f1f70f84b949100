"""Candidates of a baseline through the ledger: one call on train and one on dev for each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol, TypeVar

from bbprompt.errors import ResumeMismatch
from bbprompt.store.ledger import Kind, Ledger

__all__ = ["Calls", "Judged"]


class Judged(Protocol):
    """What train and dev say of a candidate."""

    @property
    def train_loss(self) -> float:
        """Its loss on train."""

    @property
    def dev_loss(self) -> float:
        """Its loss on dev."""

    @property
    def dev(self) -> float:
        """Its accuracy on dev."""


_Judged = TypeVar("_Judged", bound=Judged)


class Calls:
    """Makes candidates against a budget.

    Args:
        ledger: The budget.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @property
    def candidates_left(self) -> int:
        """How many more candidates the budget holds, the same at the same step of a resumed run."""
        return (self._ledger.limit - self._ledger.asked) // 2

    def make(self, key: str, work: Callable[[], _Judged]) -> _Judged:
        """Reserve, work, settle; what the journal holds already must come out again.

        Args:
            key: Names the candidate; no other of the run has it.
            work: Scores it on train and dev.

        Raises:
            BudgetExhausted: The budget does not hold it.
            ResumeMismatch: The journal holds other numbers.
        """
        ids: dict[Kind, str] = {kind: _id(key, kind) for kind in ("train", "dev")}
        for kind, call_id in ids.items():
            self._ledger.reserve([call_id], kind)
        made = work()
        values: dict[Kind, dict[str, float]] = {
            "train": {"loss": made.train_loss},
            "dev": {"loss": made.dev_loss, "metric": made.dev},
        }
        for kind, call_id in ids.items():
            known = self._ledger.settled(call_id)
            if known is not None and dict(known) != values[kind]:
                raise ResumeMismatch(
                    "the model gives other numbers than the journal holds: code, libraries or the processor differ "
                    "from those the run began with; start a new run"
                )
            self._ledger.settle([call_id], [values[kind]])
        return made


def _id(key: str, kind: str) -> str:
    return hashlib.sha256(f"{kind}:{key}".encode()).hexdigest()[:24]
