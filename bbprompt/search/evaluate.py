"""Calls: candidates in, losses out; reserved before they are sent, settled before they are used."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bbprompt.calibration import compared_offsets, label_offsets
from bbprompt.errors import OracleError, ResumeMismatch
from bbprompt.oracle import Oracle, Scores, check_scores
from bbprompt.readout import Readout
from bbprompt.scoring import Labelled, metric_values
from bbprompt.store.ledger import Kind, Ledger
from bbprompt.tasks.task import Task

__all__ = ["DevScore", "Evaluator", "call_values", "dev_score"]

_log = logging.getLogger("bbprompt")

_KINDS: tuple[Kind, Kind] = ("train", "dev")


@dataclass(frozen=True, slots=True)
class DevScore:
    """What a dev call says of a candidate.

    Attributes:
        loss: Mean loss.
        metric: Mean metric.
        losses: `(T, N)`, what `Readout.compared` says of each text, so that two candidates can be compared text by
            text.
    """

    loss: float
    metric: float
    losses: tuple[tuple[float, ...], ...]


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
        calibrates: Keep the calls of a calibration at the end, where the task's labels allow one.
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
        calibrates: bool = False,
    ) -> None:
        self._oracle, self._ledger, self._readout, self._task = oracle, ledger, readout, task
        self._data = {"train": train, "dev": dev}
        self._cut = {"train": 0, "dev": 0}
        self._lost = frozenset(ledger.in_doubt if charge else ())
        self._again = set(() if charge else ledger.in_doubt)
        self.calibrates = calibrates and task.labelled
        self._offsets: dict[bytes, tuple[float, ...]] = {}
        self._compared: dict[bytes, tuple[float, ...]] = {}
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
        """Train and dev calls the search may still ask for, the same at the same step of a resumed run."""
        return self._ledger.limit - self._ledger.asked - (len(_KINDS) if self.calibrates else 0)

    @property
    def mixed(self) -> bool:
        """Whether losses of a population may be rougher than that of a candidate alone."""
        return self._oracle.info.precision == "mixed"

    def readout(self, point: NDArray[np.floating]) -> Readout:
        """How the scores of a point `(L, d)` are read: as was given, with the offsets that its train scores gave.

        A point that was put together from several candidates has no train scores of its own; it is read as the first
        candidate of all, the untuned prompt.
        """
        first = next(iter(self._offsets.values()), ())
        return replace(self._readout, offsets=self._offsets.get(_bytes(point), first))

    def compared(self, point: NDArray[np.floating]) -> tuple[float, ...]:
        """Mean over the train texts of what a point `(L, d)` is compared by at each temperature, as last scored.

        Raises:
            KeyError: The point was not scored on train.
        """
        return self._compared[_bytes(point)]

    def train(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Mean train loss of each candidate: `(n, L, d)` to `(n,)`, n calls."""
        return np.array([value["loss"] for value in self._call("train", points)])

    def dev(self, points: NDArray[np.floating]) -> list[DevScore]:
        """What dev says of each candidate, `(n, L, d)`, n calls."""
        return [dev_score(value, len(self._data["dev"].gold)) for value in self._call("dev", points)]

    def calibrate(self, point: NDArray[np.floating]) -> tuple[float, DevScore]:
        """Fit offsets of the labels to a candidate `(L, d)` on train and dev together: two of the calls that are kept.

        From then on `readout` reads the point with them. Both calls are settled as one: offsets come from both.

        Returns:
            Train loss and dev score under the offsets. They were fitted to these texts.
        """
        row = np.ascontiguousarray(point, dtype=np.float32)[None]
        ids = self._reserved(_KINDS, row.repeat(len(_KINDS), axis=0))
        train, dev = (self._ledger.settled(call_id) for call_id in ids)
        if train is None or dev is None:
            train, dev = self._calibrated(row)
            self._ledger.settle(ids, [train, dev])
        self._offsets[_bytes(row[0])] = _of("offset", dev)
        self._compared[_bytes(row[0])] = _compared(train)
        return train["loss"], dev_score(dev, len(self._data["dev"].gold))

    def _call(self, kind: Kind, points: NDArray[np.floating]) -> list[dict[str, float]]:
        rows = np.ascontiguousarray(points, dtype=np.float32)
        ids = self._reserved([kind] * len(rows), rows)
        known = [self._ledger.settled(call_id) for call_id in ids]
        new = [i for i, value in enumerate(known) if value is None]
        values = [dict(value) if value is not None else {} for value in known]
        if new:
            fresh = self._values(kind, rows[new])
            self._ledger.settle([ids[i] for i in new], fresh)
            for i, value in zip(new, fresh, strict=True):
                values[i] = value
        self._cut[kind] = int(values[0].get("cut", 0))
        for row, value in zip(rows, values, strict=True):
            if offsets := _of("offset", value):
                self._offsets[_bytes(row)] = offsets
            if kind == "train":
                self._compared[_bytes(row)] = _compared(value)
        return values

    def _reserved(self, kinds: Sequence[Kind], rows: NDArray[np.float32]) -> list[str]:
        """Ids of the calls that score `rows`, each on the batch of its kind; reserved."""
        ids = [self._id(kind, number, row) for number, (kind, row) in enumerate(zip(kinds, rows, strict=True))]
        if self._lost:
            ids = self._made_anew(kinds, ids)
        if again := self._again.intersection(ids):
            _log.warning("%d calls were sent before a crash and are sent again, under the same reservation", len(again))
            self._again -= again
        new = {call_id for call_id in ids if self._ledger.settled(call_id) is None}
        # What the journal holds is asked for first and in order. So a call that it has not settled is one in doubt, or
        # nothing may be left in it but what is asked for here. Where lost calls were charged, the budget may not hold
        # those made in their place. It did not then, either: the search went on without them, as the journal shows.
        unpaid = new - set(self._ledger.in_doubt)
        left_out = self._lost and len(unpaid) > self._ledger.remaining
        if unpaid and not left_out and not self._ledger.unclaimed <= set(ids):
            raise ResumeMismatch(
                "the search asks for other calls than the journal holds: code, libraries or the processor "
                "differ from those the run began with; start a new run"
            )
        for kind in _KINDS:
            if some := [call_id for call_id, own in zip(ids, kinds, strict=True) if own == kind]:
                self._ledger.reserve(some, kind)
        return ids

    def _made_anew(self, kinds: Sequence[Kind], ids: list[str]) -> list[str]:
        """Count calls in doubt as spent; the ids under which they are made instead.

        A lost call is never settled, so every later resume finds it lost and goes the same way.
        """
        lost, made = [], []
        for kind, call_id in zip(kinds, ids, strict=True):
            current = call_id
            while current in self._lost:
                lost.append((current, kind))
                current += "+"
            made.append(current)
        if lost:
            _log.warning("%d calls were sent before a crash and may have been charged; they count", len(lost))
            for call_id, kind in lost:
                self._ledger.reserve([call_id], kind)
        return made

    def _scores(self, kind: Kind, rows: NDArray[np.float32]) -> Scores:
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
        return scores

    def _values(self, kind: Kind, rows: NDArray[np.float32]) -> list[dict[str, float]]:
        data, scores = self._data[kind], self._scores(kind, rows)
        fitted = compared_offsets(scores, data.batch, data.gold) if kind == "train" else None
        if fitted is None and not self._offsets:
            return call_values(kind, self._readout, scores, self._data[kind], self._task)  # all alike, so all at once
        if fitted is None:
            return [self._value(kind, self.readout(row), scores.of(number)) for number, row in enumerate(rows)]
        return [
            self._value(kind, replace(self._readout, offsets=tuple(offsets)), scores.of(number))
            | _numbered("offset", offsets)
            for number, offsets in enumerate(fitted.tolist())
        ]

    def _calibrated(self, row: NDArray[np.float32]) -> tuple[dict[str, float], dict[str, float]]:
        """Values of the train and the dev call of a candidate, the offsets with the second."""
        before = self.readout(row[0])
        scores = {kind: self._scores(kind, row) for kind in _KINDS}
        options = len(self._task.options)
        told = [before.option_scores(scores[kind])[0].reshape(-1, options) for kind in _KINDS]
        gold = [label for kind in _KINDS for label in self._data[kind].gold]
        # An option's score is the sum over its channels, to each of which the offsets are added.
        more = label_offsets(np.concatenate(told), gold) / self._oracle.info.channels
        offsets = (np.array(before.offsets or (0.0,) * options) + more).tolist()
        readout = replace(before, offsets=tuple(offsets))
        train, dev = (self._value(kind, readout, scores[kind]) for kind in _KINDS)
        return train, dev | _numbered("offset", offsets)

    def _value(self, kind: Kind, readout: Readout, scores: Scores) -> dict[str, float]:
        return call_values(kind, readout, scores, self._data[kind], self._task)[0]

    def _id(self, kind: Kind, number: int, row: NDArray[np.float32]) -> str:
        sha = hashlib.sha256(f"{kind}:{self._ledger.asked}:{number}:".encode())
        sha.update(row.tobytes())
        return sha.hexdigest()[:24]


def call_values(kind: Kind, readout: Readout, scores: Scores, data: Labelled, task: Task) -> list[dict[str, float]]:
    """What the journal keeps of the calls of candidates that are read in one way.

    Raises:
        OracleError: A candidate's loss is not finite.
    """
    losses = readout.losses(scores, data.batch, data.gold)
    # Rows that lie in one piece have the mean, to the last bit, that each has alone.
    means = np.ascontiguousarray(losses).mean(axis=1)
    if not np.isfinite(means).all():
        raise OracleError("a candidate's loss is not finite: the model's answer cannot be used")
    values = [{"loss": mean} for mean in means.tolist()]
    if scores.cut:  # with the loss, so that a resumed run can report what it does not see again
        for value in values:
            value["cut"] = float(scores.cut)
    compared = readout.compared(scores, data.batch, data.gold) if readout.tempered else losses[:, None]
    if kind == "dev":
        metrics = metric_values(task, readout, scores, data)
        for value, row, each in zip(values, metrics, compared, strict=True):
            value["metric"] = float(row.mean())
            value |= _numbered("loss", each.flatten().tolist())
    elif readout.tempered:
        for value, each in zip(values, compared, strict=True):
            value |= _numbered("compared", each.mean(axis=1).tolist())
    return values


def _bytes(point: NDArray[np.floating]) -> bytes:
    """A point as it is sent."""
    return np.ascontiguousarray(point, dtype=np.float32).tobytes()


def dev_score(value: Mapping[str, float], texts: int) -> DevScore:
    """What the value of a dev call on so many texts says."""
    losses = _of("loss", value)
    rows = tuple(losses[begin : begin + texts] for begin in range(0, len(losses), texts))
    return DevScore(value["loss"], value["metric"], rows)


def _compared(value: Mapping[str, float]) -> tuple[float, ...]:
    return _of("compared", value) or (value["loss"],)


def _numbered(name: str, numbers: Sequence[float]) -> dict[str, float]:
    """A list among a call's numbers."""
    return {f"{name}.{index}": number for index, number in enumerate(numbers)}


def _of(name: str, value: Mapping[str, float]) -> tuple[float, ...]:
    """The list of that name among a call's numbers, empty where it has none."""
    if f"{name}.0" not in value:
        return ()
    return tuple(value[f"{name}.{index}"] for index in range(sum(key.startswith(f"{name}.") for key in value)))
