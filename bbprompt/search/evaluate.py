"""Calls: candidates in, losses out; reserved before they are sent, settled before they are used."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import OracleError, ResumeMismatch
from bbprompt.oracle import Oracle, check_scores
from bbprompt.readout import Readout, fitted_offsets
from bbprompt.scoring import Labelled, metric_values
from bbprompt.store.ledger import Kind, Ledger
from bbprompt.tasks.task import Task

__all__ = ["Evaluator"]

_log = logging.getLogger("bbprompt")


class Evaluator:
    """Scores candidates on the few-shot batches, through the ledger.

    A resumed run asks for the same calls again; those in the journal are answered from it and the oracle
    never sees them.

    Args:
        oracle: The frozen model.
        ledger: The budget.
        readout: How scores become losses and decisions.
        task: For the metric.
        train: Few-shot training batch.
        dev: Few-shot dev batch.
        charge: What becomes of calls that were sent before a crash and whose answer is not known. True: they count as
            spent and are made anew, so that a server that does not know repeated calls charges no more than the
            budget. False: they are made again as the same calls, so that the result is that of a run without a crash.
    """

    def __init__(
        self,
        oracle: Oracle,
        ledger: Ledger,
        readout: Readout,
        task: Task,
        train: Labelled,
        dev: Labelled,
        charge: bool = False,
    ) -> None:
        self._oracle, self._ledger, self._readout, self._task = oracle, ledger, readout, task
        self._data = {"train": train, "dev": dev}
        self._cut = {"train": 0, "dev": 0}
        self._lost = frozenset(ledger.in_doubt if charge else ())
        self._offsets: dict[bytes, tuple[float, ...]] = {}
        self.oracle_seconds = 0.0

    @property
    def cut(self) -> int:
        """Tokens cut from the train and dev texts for want of room; known once a call of each is settled."""
        return sum(self._cut.values())

    @property
    def spent(self) -> int:
        """Train and dev calls this run has asked for so far."""
        return self._ledger.asked

    @property
    def left(self) -> int:
        """Train and dev calls it may still ask for, the same at the same step of a resumed run."""
        return self._ledger.limit - self._ledger.asked

    def readout(self, point: NDArray[np.floating]) -> Readout:
        """How the scores of a point `(L, d)` are read: as was given, with the offsets that its train scores gave.

        A point that was put together from several candidates has no train scores of its own; it is read as the first
        candidate of all, the untuned prompt.
        """
        first = next(iter(self._offsets.values()), ())
        return replace(self._readout, offsets=self._offsets.get(_bytes(point), first))

    def train(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Mean train loss of each candidate: `(n, L, d)` to `(n,)`, n calls."""
        return np.array([value["loss"] for value in self._call("train", points)])

    def dev(self, point: NDArray[np.floating]) -> tuple[float, float]:
        """Dev loss and dev metric of one candidate `(L, d)`, one call."""
        value = self._call("dev", point[None])[0]
        return value["loss"], value["metric"]

    def _call(self, kind: Kind, points: NDArray[np.floating]) -> list[dict[str, float]]:
        rows = np.ascontiguousarray(points, dtype=np.float32)
        ids = [self._id(kind, number, row) for number, row in enumerate(rows)]
        if self._lost:
            ids = self._made_anew(kind, ids)
        known = [self._ledger.settled(call_id) for call_id in ids]
        new = [i for i, value in enumerate(known) if value is None]
        # What the journal holds is asked for first and in order, so a call it does not know must be the first
        # after all of it. A batch in doubt was reserved whole.
        if new and self._ledger.unclaimed and not {ids[i] for i in new} <= set(self._ledger.in_doubt):
            raise ResumeMismatch(
                "the search asks for other calls than the journal holds: code, libraries or the processor "
                "differ from those the run began with; start a new run"
            )
        self._ledger.reserve(ids, kind)
        values = [dict(value) if value is not None else {} for value in known]
        if new:
            fresh = self._score(kind, rows[new])
            self._ledger.settle([ids[i] for i in new], fresh)
            for i, value in zip(new, fresh, strict=True):
                values[i] = value
        self._cut[kind] = int(values[0].get("cut", 0))
        for row, value in zip(rows, values, strict=True):
            if "offset.0" in value:
                count = sum(name.startswith("offset.") for name in value)
                self._offsets[_bytes(row)] = tuple(value[f"offset.{option}"] for option in range(count))
        return values

    def _made_anew(self, kind: Kind, ids: list[str]) -> list[str]:
        """Count calls in doubt as spent; the ids under which they are made instead.

        A lost call is never settled, so every later resume finds it lost and goes the same way.
        """
        lost, made = [], []
        for call_id in ids:
            current = call_id
            while current in self._lost:
                lost.append(current)
                current += "+"
            made.append(current)
        if lost:
            _log.warning("%d %s calls were sent before a crash and may have been charged; they count", len(lost), kind)
            self._ledger.reserve(lost, kind)
        return made

    def _score(self, kind: Kind, rows: NDArray[np.float32]) -> list[dict[str, float]]:
        data = self._data[kind]
        longest = self._readout.longest_answer if kind == "dev" and self._task.type == "extractive" else None
        began = time.monotonic()
        scores = check_scores(
            self._oracle.score(data.batch, rows, self._readout.support, longest),
            data.batch,
            len(rows),
            answers=longest is not None,
            channels=self._oracle.info.channels,
        )
        self.oracle_seconds += time.monotonic() - began
        fitted = fitted_offsets(scores, data.batch, data.gold) if kind == "train" else None
        if fitted is None:
            readouts = [self.readout(row) for row in rows]
        else:
            readouts = [replace(self._readout, offsets=tuple(each.tolist())) for each in fitted]
        each_alone = [(readout, scores.of(number)) for number, readout in enumerate(readouts)]
        losses = np.array([readout.losses(own, data.batch, data.gold).mean() for readout, own in each_alone])
        if not np.isfinite(losses).all():
            raise OracleError("a candidate's loss is not finite: the model's answer cannot be used")
        # With the loss, so that a resumed run can report what it does not see again.
        also = {"cut": float(scores.cut)} if scores.cut else {}
        values = [{"loss": float(loss), **also} for loss in losses]
        if fitted is not None:
            for value, offsets in zip(values, fitted.tolist(), strict=True):
                value |= {f"offset.{option}": offset for option, offset in enumerate(offsets)}
        if kind == "dev":
            for value, (readout, own) in zip(values, each_alone, strict=True):
                value["metric"] = float(metric_values(self._task, readout, own, data).mean())
        return values

    def _id(self, kind: Kind, number: int, row: NDArray[np.float32]) -> str:
        sha = hashlib.sha256(f"{kind}:{self._ledger.asked}:{number}:".encode())
        sha.update(row.tobytes())
        return sha.hexdigest()[:24]


def _bytes(point: NDArray[np.floating]) -> bytes:
    """A point as it is sent."""
    return np.ascontiguousarray(point, dtype=np.float32).tobytes()
