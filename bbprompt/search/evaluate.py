"""Calls: candidates in, losses out; reserved before they are sent, settled before they are used."""

from __future__ import annotations

import hashlib
import logging
import time

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import OracleError, ResumeMismatch
from bbprompt.oracle import Oracle, check_scores
from bbprompt.readout import Readout, fitted_threshold
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

    @property
    def mixed(self) -> bool:
        """Whether losses of a population may be rougher than that of a candidate alone."""
        return self._oracle.info.precision == "mixed"

    @property
    def readout(self) -> Readout:
        """How scores are read: the one given, and once a train call is settled with the threshold it gave."""
        return self._readout

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
        if "threshold" in values[0] and not self._readout.offsets:
            self._readout = self._readout.at(values[0]["threshold"], self._data[kind].batch)
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
        readout, threshold = self._readout, None
        if kind == "train" and not readout.offsets:
            # From the untuned prompt, which is scored first; from then on it stands.
            threshold = fitted_threshold(scores, data.batch, data.gold)
            readout = readout if threshold is None else readout.at(threshold, data.batch)
        losses = readout.losses(scores, data.batch, data.gold).mean(axis=1)
        if not np.isfinite(losses).all():
            raise OracleError("a candidate's loss is not finite: the model's answer cannot be used")
        # With the loss, so that a resumed run can report what it does not see again.
        also = {"cut": float(scores.cut)} if scores.cut else {}
        values = [{"loss": float(loss), **also} for loss in losses]
        if threshold is not None:
            values[0]["threshold"] = threshold
        if kind == "dev":
            metrics = metric_values(self._task, readout, scores, data).mean(axis=1)
            for value, metric in zip(values, metrics, strict=True):
                value["metric"] = float(metric)
        return values

    def _id(self, kind: Kind, number: int, row: NDArray[np.float32]) -> str:
        sha = hashlib.sha256(f"{kind}:{self._ledger.asked}:{number}:".encode())
        sha.update(row.tobytes())
        return sha.hexdigest()[:24]
