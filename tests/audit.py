"""The checker: compares what a run wrote into its journal with what the oracle on the other side logged.

It shares no code with the journal and the ledger: lines, checksums and call ids are computed here once more. So an
error in those modules cannot excuse itself.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Audit", "Execution", "audit", "batches", "doubtful", "paid", "settled"]


@dataclass(frozen=True, slots=True)
class Execution:
    """One request that the oracle carried out, as the oracle itself saw it.

    Attributes:
        kind: ``train``, ``dev`` or ``test``.
        rows: The float32 bytes of each candidate, in order.
        losses: What the readout makes of the answer, one a candidate.
        life: Which process of the run asked, counted from 0.
    """

    kind: str
    rows: tuple[bytes, ...]
    losses: tuple[float, ...]
    life: int


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found: train and dev calls reserved and settled, calls carried out, and those more than once."""

    reserved: int
    settled: int
    executed: int
    repeated: int


def audit(
    journal: bytes,
    budget: int,
    log: Sequence[Execution],
    kept: Sequence[frozenset[str]],
    *,
    doubts: int | None = None,
    fickle: bool = False,
) -> Audit:
    """Judge a run that has ended.

    Args:
        journal: The whole file.
        budget: Most train and dev calls together.
        log: What the oracle did, in order, over all lives of the run.
        kept: For each life but the last, the ids that were settled on disk when it was killed.
        doubts: How many requests may have been carried out again: answers that were lost or spoiled on the way, and
            what a death left in doubt. None for one batch a death.
        fickle: Whether the oracle answers one call differently at times; then any of its answers may be settled.

    Raises:
        AssertionError: A promise is broken; the text says which.
    """
    reserved: dict[str, str] = {}
    place: dict[str, int] = {}
    values: dict[str, float] = {}
    sent: list[tuple[str, list[str]]] = []
    for record in _records(journal):
        if record["op"] == "reserve":
            assert not reserved.keys() & set(record["ids"]), "a call is charged twice"
            reserved |= dict.fromkeys(record["ids"], record["kind"])
            place |= {call_id: len(place) + number for number, call_id in enumerate(record["ids"])}
            sent.append((record["kind"], record["ids"]))
        else:
            assert not values.keys() & set(record["ids"]), "a call is settled twice"
            assert set(record["ids"]) <= reserved.keys(), "a call is settled that was never reserved"
            assert list(record["ids"]) == [i for i in reserved if i in set(record["ids"])], (
                "values are told out of order"
            )
            found = [float.fromhex(value["loss"]) for value in record["values"]]
            values |= dict(zip(record["ids"], found, strict=True))
        counted = sum(kind != "test" for kind in reserved.values())
        assert counted <= budget, f"{counted} calls are reserved, and the budget is {budget}"
    times: Counter[str] = Counter()
    requests: Counter[tuple[str, ...]] = Counter()
    answered: dict[str, set[float]] = {}
    for entry in log:
        if entry.kind == "test":
            continue
        ids = _ids(entry, sent)
        assert ids, f"a {entry.kind} request of {len(entry.rows)} calls was carried out that no reservation pays for"
        for call_id, loss in zip(ids, entry.losses, strict=True):
            earlier = [life for life, there in enumerate(kept) if call_id in there]
            assert not earlier or entry.life <= earlier[0], "a call was asked for again though its value was on disk"
            answered.setdefault(call_id, set()).add(loss)
        times.update(ids)
        requests[tuple(ids)] += 1
    for call_id, losses in answered.items():
        right = call_id not in values or (values[call_id] in losses if fickle else losses == {values[call_id]})
        assert right, f"call {call_id} is settled as another value than was answered"
    assert values.keys() <= times.keys(), "a value is settled that the oracle never gave"
    again, allowed = requests.total() - len(requests), len(kept) if doubts is None else doubts
    assert again <= allowed, f"{again} requests were repeated, {len(kept)} deaths: more than was in doubt ({allowed})"
    return Audit(len(reserved), len(values), times.total(), times.total() - len(times))


def paid(journal: bytes, entry: Execution) -> bool:
    """Whether a journal, perhaps torn, holds a reservation for a request."""
    return entry.kind == "test" or bool(_ids(entry, batches(journal)))


def batches(journal: bytes) -> list[tuple[str, list[str]]]:
    """Kind and ids of all reservations in a journal, perhaps torn, in order."""
    whole = journal[: journal.rfind(b"\n") + 1]
    return [(record["kind"], record["ids"]) for record in _records(whole) if record["op"] == "reserve"]


def doubtful(journal: bytes) -> int:
    """How many calls a journal, perhaps torn, has reserved and not settled."""
    whole = journal[: journal.rfind(b"\n") + 1]
    return sum(len(record["ids"]) * (1 if record["op"] == "reserve" else -1) for record in _records(whole))


def settled(journal: bytes) -> frozenset[str]:
    """The ids that a journal, perhaps torn, holds a value for."""
    whole = journal[: journal.rfind(b"\n") + 1]
    return frozenset(i for record in _records(whole) if record["op"] == "settle" for i in record["ids"])


def _records(journal: bytes) -> list[dict]:
    records, runs = [], set()
    for number, line in enumerate(journal.splitlines(), start=1):
        payload, _, checksum = line.rpartition(b" ")
        assert int(checksum, 16) == zlib.crc32(payload), f"line {number} does not match its checksum"
        entry = json.loads(payload)
        assert entry["n"] == number, f"line {number} carries number {entry['n']}"
        runs.add(entry["run"])
        records.append(entry["record"])
    assert len(runs) <= 1, "lines of several runs"
    return records


def _ids(entry: Execution, sent: Sequence[tuple[str, list[str]]]) -> list[str]:
    """The reserved ids that a request, perhaps for a piece of a batch, was made under; empty if there are none."""
    asked = 0
    for kind, ids in sent:
        for begin in range(len(ids) - len(entry.rows) + 1) if kind == entry.kind else ():
            made = [_id(kind, asked, begin + number, row) for number, row in enumerate(entry.rows)]
            if made == ids[begin : begin + len(made)]:
                return made
        asked += len(ids)
    return []


def _id(kind: str, asked: int, number: int, row: bytes) -> str:
    return hashlib.sha256(f"{kind}:{asked}:{number}:".encode() + row).hexdigest()[:24]
