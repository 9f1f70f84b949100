"""Steps and looks of a descent through the ledger: one call each, made again after a kill or taken from the journal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from bbprompt.errors import ResumeMismatch
from bbprompt.store.ledger import Kind, Ledger

__all__ = ["DescentCalls"]


class DescentCalls:
    """Makes calls against a budget.

    What a step changes is not in the journal, so a resumed run works through the calls since its last checkpoint
    again, and what comes out must be what the journal holds. Calls before that are only read.

    Args:
        ledger: The budget.
        kept: Calls that a checkpoint stands for.
    """

    def __init__(self, ledger: Ledger, kept: int) -> None:
        self._ledger, self._kept = ledger, kept

    @property
    def made(self) -> int:
        """Calls so far, the same at the same step of a resumed run."""
        return self._ledger.asked

    @property
    def left(self) -> int:
        """Calls that may still be made, likewise."""
        return self._ledger.limit - self._ledger.asked

    @property
    def reading(self) -> bool:
        """Whether a checkpoint stands for the next call."""
        return self.made < self._kept

    def make(self, kind: Kind, work: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """Reserve, work, settle.

        Args:
            kind: Which few-shot batch it is on.
            work: What the call is; its numbers are its value.

        Raises:
            BudgetExhausted: The budget does not hold it.
            ResumeMismatch: The journal holds other numbers, or none where the checkpoint needs them.
        """
        call_id = hashlib.sha256(f"{kind}:{self.made}".encode()).hexdigest()[:24]
        known, reading = self._ledger.settled(call_id), self.reading
        if reading and known is None:
            raise ResumeMismatch(
                "the checkpoint is ahead of the journal: files of different runs or backups lie together; start a "
                "new run"
            )
        self._ledger.reserve([call_id], kind)
        if reading and known is not None:
            return known
        value = dict(work())
        if known is not None and dict(known) != value:
            raise ResumeMismatch(
                "the model gives other numbers than the journal holds: code, libraries or the processor differ from "
                "those the run began with; start a new run"
            )
        self._ledger.settle([call_id], [value])
        return value
