"""Offsets of labels: what they minimise, that a crash changes nothing, and that extremes stay finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toyruns
from faultdisk import IMAGES, Crash, FaultDisk
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from toyruns import METHODS

from bbprompt.calibration import label_offsets
from bbprompt.config import load_method, method_with
from bbprompt.errors import UsageError
from bbprompt.readout import Readout
from bbprompt.search.evaluate import Evaluator
from bbprompt.store.journal import Journal
from bbprompt.store.ledger import Ledger
from bbprompt.testing import ToyOracle

PATH = Path("/journal.log")
POINT = np.random.default_rng(5).normal(size=(3, 4))


@pytest.mark.parametrize("options", [2, 3, 15])
def test_the_minimum_is_that_of_a_general_minimiser(options: int) -> None:
    rng = np.random.default_rng(options)
    scores, gold = rng.normal(0.0, 2.0, (64, options)), rng.integers(0, options, 64)

    def loss(offsets: np.ndarray) -> float:
        shifted = scores + offsets
        entropy = np.logaddexp.reduce(shifted, axis=1) - shifted[range(64), gold]
        return float(entropy.sum() + 0.5 * offsets @ offsets)

    found = label_offsets(scores, gold.tolist())
    assert found.sum() == pytest.approx(0.0, abs=1e-9)
    assert loss(found) == pytest.approx(minimize(loss, np.zeros(options), method="BFGS").fun, abs=1e-6)


def test_scores_that_favour_one_label_are_set_right() -> None:
    rng = np.random.default_rng(0)
    gold = np.arange(64) % 2
    scores = np.eye(2)[gold] * 2.0 + rng.normal(0.0, 0.5, (64, 2)) + np.array([5.0, 0.0])
    assert (scores.argmax(axis=1) == gold).mean() == 0.5
    assert ((scores + label_offsets(scores, gold.tolist())).argmax(axis=1) == gold).mean() > 0.95


@given(st.integers(2, 6), st.integers(1, 8), st.floats(1e-6, 1e30), st.integers(0, 2**32))
def test_offsets_are_finite_whatever_the_scores(options: int, texts: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(texts, options)) * size
    assert np.isfinite(label_offsets(scores, rng.integers(0, options, texts).tolist())).all()


def evaluator(disk: FaultDisk) -> tuple[Evaluator, Ledger]:
    ledger = Ledger(Journal(PATH, "run", disk), 6)
    data = toyruns.data(6, 1), toyruns.data(5, 2)
    return Evaluator(ToyOracle(), ledger, Readout(), toyruns.TASK, *data, calibrates=True), ledger


def test_a_power_cut_at_any_operation_of_a_calibration_changes_nothing() -> None:
    whole = FaultDisk()
    calls, ledger = evaluator(whole)
    expected = (calls.calibrate(POINT), calls.readout(POINT))
    assert ledger.by_kind == {"train": 1, "dev": 1, "test": 0}
    for at in range(1, len(whole.operations) + 1):
        disk = FaultDisk(fail_at=at)
        with pytest.raises(Crash):
            evaluator(disk)[0].calibrate(POINT)
        for image in IMAGES:
            calls, ledger = evaluator(disk.rebooted(image))
            assert (calls.calibrate(POINT), calls.readout(POINT)) == expected, (at, image)
            assert ledger.reserved == 2


def test_a_calibrated_run_goes_on_after_every_prefix_of_its_journal(tmp_path: Path) -> None:
    found, *_ = toyruns.run(tmp_path, METHODS["calibrated"], 26)
    file = tmp_path / "journal.log"
    lines = file.read_bytes().splitlines(keepends=True)
    for count in range(len(lines)):
        file.write_bytes(b"".join(lines[:count]))
        again, *_ = toyruns.run(tmp_path, METHODS["calibrated"], 26)
        assert again.chosen.readout == found.chosen.readout
        assert file.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("changes", [{"legacy_decision": True}, {"support": "sequence"}])
def test_what_cannot_be_calibrated_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="calibrate"):
        method_with(load_method("mp2-deep"), changes)
