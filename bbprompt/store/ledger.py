"""The budget of a run: which calls were reserved, which are settled, which are in doubt.

One **call** is one candidate prompt scored on one few-shot batch. A call is *reserved* by a durable line
before anything is sent, and *settled* by a durable line before the optimizer sees its value. So a killed run
has never spent more than it wrote down, and what it learned is never lost.

Train and dev calls together are bounded by the limit. Scoring of the test split is recorded and reported, and
not counted.

After a crash the calls reserved but not settled are *in doubt*: sent perhaps, answered perhaps. A local model
costs nothing but time, so they are simply asked for again under the reservation they have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, Literal, get_args

from bbprompt.errors import BBPromptError, JournalCorrupt, ResumeMismatch
from bbprompt.store.journal import Journal

__all__ = ["BudgetExhausted", "Kind", "Ledger", "LedgerError"]

Kind = Literal["train", "dev", "test"]
_KINDS: tuple[Kind, ...] = get_args(Kind)


class BudgetExhausted(BBPromptError):
    """A batch asks for more calls than are left; nothing of it was reserved."""


class LedgerError(BBPromptError):
    """The ledger was told something that contradicts what it holds: a bug of the caller."""


class Ledger:
    """Counts calls against a limit, in step with a journal.

    Its state is nothing but the journal's records in order: a new ledger on a re-opened journal holds exactly
    what the old one held.
    """

    def __init__(self, journal: Journal, limit: int) -> None:
        """Rebuild the state from a journal.

        Args:
            journal: an open journal that only ledgers write to.
            limit: the most train and dev calls that may ever be reserved, together.

        Raises:
            JournalCorrupt: if a line makes no sense although its checksum is right.
            ResumeMismatch: if the journal already holds more calls than the limit.
        """
        if limit < 0:
            raise ValueError(f"limit must not be negative, not {limit}")
        self.limit = limit
        self._journal = journal
        self._kinds: dict[str, Kind] = {}
        self._values: dict[str, Mapping[str, float]] = {}
        self._in_doubt: dict[str, None] = {}  # a set that keeps its order
        self._counts: dict[Kind, int] = dict.fromkeys(_KINDS, 0)
        for number, record in enumerate(journal.records, start=1):
            try:
                self._apply(record)
            except (LedgerError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
                raise JournalCorrupt(
                    f"{journal.path}:{number}: this line makes no sense here ({' '.join(str(error).split())[:200]}); "
                    "it was written by another version or edited: start again in a new --run-dir"
                ) from error
        if self.reserved > limit:
            raise ResumeMismatch(
                f"{journal.path}: {self.reserved} calls are reserved, more than --budget {limit}; "
                "resume with the budget that the run began with"
            )
        self._asked: set[str] = set()
        self._unclaimed = set(self._kinds)
        self._asked_counted = 0

    @property
    def reserved(self) -> int:
        """Train and dev calls reserved so far; never more than `limit`."""
        return self._counts["train"] + self._counts["dev"]

    @property
    def remaining(self) -> int:
        """Train and dev calls that may still be reserved."""
        return self.limit - self.reserved

    @property
    def by_kind(self) -> dict[str, int]:
        """Reserved calls of each kind, ``test`` included."""
        return {kind: self._counts[kind] for kind in _KINDS}

    @property
    def in_doubt(self) -> tuple[str, ...]:
        """Ids reserved but not settled, in the order of their reservation."""
        return tuple(self._in_doubt)

    @property
    def asked(self) -> int:
        """Train and dev calls asked for through this object, whether newly reserved or found in the journal.

        A resumed run asks for everything from the start again, while `reserved` and `remaining` know the end
        of the journal from the beginning. What decides the run's course must therefore look at
        ``limit - asked``, which is the same at the same step of the first run and of each that resumes it.
        """
        return self._asked_counted

    @property
    def unclaimed(self) -> Set[str]:
        """Ids found in the journal that have not been asked for again yet.

        A resumed run asks for the same calls in the same order. If it asks for a new one while there are others
        here, it has taken another way than the run it resumes.
        """
        return self._unclaimed

    def settled(self, call_id: str) -> Mapping[str, float] | None:
        """The values of a settled call, or None."""
        return self._values.get(call_id)

    def reserve(self, call_ids: Sequence[str], kind: Kind) -> None:
        """Reserve a batch of calls, durably, before any of it is sent.

        Ids that are reserved or settled already are passed over: they were paid for.

        Args:
            call_ids: one id a call, unique in the run.
            kind: ``train``, ``dev`` or ``test``.

        Raises:
            BudgetExhausted: if the new ones are more than `remaining`; none is reserved.
            LedgerError: if an id is reserved with another kind.
            DiskError: if the reservation may not be durable.
        """
        new = list(dict.fromkeys(call_id for call_id in call_ids if self._is_new(call_id, kind)))
        if kind != "test" and len(new) > self.remaining:
            raise BudgetExhausted(
                f"{len(new)} more {kind} calls asked for, {self.remaining} of --budget {self.limit} left"
            )
        if new:
            self._apply(self._journal.append({"op": "reserve", "kind": kind, "ids": new}))
        if kind != "test":
            self._asked_counted += len(set(call_ids) - self._asked)
        self._asked.update(call_ids)
        self._unclaimed.difference_update(call_ids)

    def settle(self, call_ids: Sequence[str], values: Sequence[Mapping[str, float]]) -> None:
        """Record the values of a batch of calls, durably, before anybody uses them.

        Args:
            call_ids: ids of reserved calls.
            values: for each id its numbers by name, all finite, for example ``{"loss": 0.61}``.

        Raises:
            LedgerError: for an unknown id, a number that is not finite, another value than the one settled
                before, or lengths that differ; nothing of the batch is recorded.
            DiskError: if the record may not be durable.
        """
        if len(call_ids) != len(values):
            raise LedgerError(f"{len(call_ids)} call ids came with {len(values)} values")
        new: dict[str, dict[str, float]] = {}
        for call_id, given in zip(call_ids, values, strict=True):
            value = _finite(call_id, given)
            known = self._values.get(call_id, new.get(call_id))
            if known is None:
                new[call_id] = value
            elif _bits(known) != _bits(value):
                raise LedgerError(f"call {call_id} is settled as {dict(known)} and cannot become {value}")
            if call_id not in self._kinds:
                raise LedgerError(f"call {call_id} was never reserved")
        if new:
            self._apply(self._journal.append({"op": "settle", "ids": list(new), "values": list(new.values())}))

    def _is_new(self, call_id: str, kind: Kind) -> bool:
        if kind not in _KINDS:
            raise LedgerError(f"unknown kind {kind!r}; it is one of {', '.join(_KINDS)}")
        known = self._kinds.get(call_id, kind)
        if known != kind:
            raise LedgerError(f"call {call_id} is reserved as {known} and cannot become {kind}")
        return call_id not in self._kinds

    def _apply(self, record: Mapping[str, Any]) -> None:
        """Take one record into the state: the same way for one just written and for one found in the file."""
        match record["op"]:
            case "reserve":
                for call_id in record["ids"]:
                    if not self._is_new(call_id, record["kind"]):
                        raise LedgerError(f"call {call_id} is reserved twice")
                    self._kinds[call_id] = record["kind"]
                    self._in_doubt[call_id] = None
                    self._counts[record["kind"]] += 1
            case "settle":
                for call_id, value in zip(record["ids"], record["values"], strict=True):
                    if call_id not in self._kinds or call_id in self._values:
                        raise LedgerError(f"call {call_id} is not reserved, or settled twice")
                    numbers = {name: float.fromhex(text) for name, text in value.items()}
                    self._values[call_id] = MappingProxyType(_finite(call_id, numbers))
                    del self._in_doubt[call_id]
            case other:
                raise LedgerError(f"unknown record {other!r}")


def _finite(call_id: str, value: Mapping[str, float]) -> dict[str, float]:
    """The same numbers as plain floats; raises `LedgerError` where one is not finite or none is there."""
    numbers = {name: float(number) for name, number in value.items()}
    if not numbers or not all(map(math.isfinite, numbers.values())):
        raise LedgerError(f"call {call_id} has the value {numbers}: it takes finite numbers, at least one")
    return numbers


def _bits(value: Mapping[str, float]) -> dict[str, str]:
    """The numbers to the last bit, so that 0.0 and -0.0 differ."""
    return {name: number.hex() for name, number in value.items()}
