"""Calls: reserved before they are sent, settled before they are used, told in the order of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toyruns
from faultdisk import FaultDisk

from bbprompt.errors import DiskError, OracleError
from bbprompt.oracle import Oracle, Scores
from bbprompt.readout import Readout
from bbprompt.search.evaluate import Evaluator
from bbprompt.store.journal import Journal
from bbprompt.store.ledger import Ledger
from bbprompt.testing import FaultyOracle, ToyOracle

PATH = Path("/journal.log")
POINTS = np.random.default_rng(0).normal(size=(6, 3, 4))


def evaluator(
    disk: FaultDisk, oracle: Oracle | None = None, limit: int = 20, charge: bool = False
) -> tuple[Evaluator, Ledger]:
    ledger = Ledger(Journal(PATH, "run", disk), limit)
    train, dev = toyruns.data(6, 1), toyruns.data(5, 2)
    return Evaluator(oracle or ToyOracle(), ledger, Readout(), toyruns.TASK, train, dev, charge), ledger


class Watching:
    """An oracle that looks at the disk whenever it is asked."""

    def __init__(self, disk: FaultDisk) -> None:
        self.disk, self.inner, self.seen = disk, ToyOracle(), b""

    @property
    def info(self) -> Any:
        return self.inner.info

    def score(self, *request: Any) -> Scores:
        self.seen = self.disk.durable(PATH)
        return self.inner.score(*request)

    def close(self) -> None:
        """Nothing is held."""


def test_a_reservation_is_durable_before_anything_is_sent() -> None:
    disk = FaultDisk()
    oracle = Watching(disk)
    calls, ledger = evaluator(disk, oracle)
    for expected in (1, 3):
        calls.train(POINTS)
        assert oracle.seen.count(b'"op":"reserve"') == (expected + 1) // 2
        assert oracle.seen.count(b"\n") == expected
        assert disk.durable(PATH).count(b"\n") == expected + 1
    assert ledger.in_doubt == ()


def test_losses_stand_in_the_order_of_the_rows() -> None:
    calls, _ = evaluator(FaultDisk(), limit=20)
    together = calls.train(POINTS)
    alone = [calls.train(point[None])[0] for point in POINTS]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len(set(together.tolist())) == len(POINTS)


def test_a_batch_that_is_settled_in_part_is_told_in_the_order_of_the_rows() -> None:
    whole, _ = evaluator(FaultDisk())
    expected = whole.train(POINTS)
    disk = FaultDisk()
    calls, ledger = evaluator(disk)
    ids = [calls._id("train", number, row) for number, row in enumerate(POINTS.astype(np.float32))]
    ledger.reserve(ids, "train")
    ledger.settle(ids[3:5], [{"loss": float(loss)} for loss in expected[3:5]])
    calls, ledger = evaluator(disk.rebooted("nothing"))
    np.testing.assert_allclose(calls.train(POINTS), expected, rtol=1e-5)
    assert ledger.reserved == len(POINTS)


@pytest.mark.parametrize("fault", ["error", "nan", "shape"])
def test_a_failure_is_no_value(fault: Any) -> None:
    disk = FaultDisk()
    calls, ledger = evaluator(disk, FaultyOracle(ToyOracle(), 1, fault))
    with pytest.raises(OracleError):
        calls.train(POINTS)
    assert len(ledger.in_doubt) == len(POINTS) == ledger.reserved
    assert b'"settle"' not in disk.files()[str(PATH)]


@pytest.mark.parametrize(
    ("charge", "said"),
    [
        (False, "6 calls were sent before a crash and are sent again, under the same reservation"),
        (True, "6 calls were sent before a crash and may have been charged; they count"),
    ],
)
def test_what_becomes_of_calls_in_doubt_is_said_once(charge: bool, said: str, caplog: pytest.LogCaptureFixture) -> None:
    disk = FaultDisk()
    calls, _ = evaluator(disk, FaultyOracle(ToyOracle(), 1))
    with pytest.raises(OracleError):
        calls.train(POINTS)
    assert caplog.messages == [], "nothing was in doubt before"
    calls, ledger = evaluator(disk.rebooted("nothing"), charge=charge)
    calls.train(POINTS)
    calls.train(POINTS + 1)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", said)]
    assert ledger.reserved == (18 if charge else 12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_logits_at_the_ends_of_float32(value: float) -> None:
    class Extreme(ToyOracle):
        def score(self, *request: Any) -> Scores:
            scores = super().score(*request)
            logits = scores.logits.copy()
            logits[0, 0, 0] = value
            return Scores(logits, scores.normalizer, scores.best, scores.cut)

    calls, ledger = evaluator(FaultDisk(), Extreme())
    if np.isfinite(value):
        assert np.isfinite(calls.train(POINTS)).all()
        return
    with pytest.raises(OracleError):
        calls.train(POINTS)
    assert len(ledger.in_doubt) == len(POINTS)


def test_an_answer_that_cannot_be_written_is_in_doubt() -> None:
    dry = FaultDisk()
    evaluator(dry)[0].train(POINTS)
    for operation in (len(dry.operations), len(dry.operations) - 1):
        disk = FaultDisk(operation, 28)
        calls, ledger = evaluator(disk)
        with pytest.raises(DiskError):
            calls.train(POINTS)
        assert len(ledger.in_doubt) == len(POINTS)
        with pytest.raises(DiskError):
            calls.train(POINTS)
