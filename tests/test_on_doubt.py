"""Calls that were sent before a crash: made again as the same calls, or counted and made anew."""

from __future__ import annotations

from pathlib import Path

import doubts
import numpy as np
import pytest
from toyruns import METHODS, TASK, Recorder, data, space

from bbprompt.errors import OracleError
from bbprompt.readout import Readout
from bbprompt.search.evaluate import Evaluator
from bbprompt.search.tuner import Found, search
from bbprompt.store.journal import Journal
from bbprompt.store.ledger import Ledger
from bbprompt.testing import FaultyOracle, ToyOracle

BUDGET = 50


class Paid(Recorder):
    """Counts candidates as a server does that charges for every request, also those it fails to answer."""


def run(
    folder: Path, oracle: Recorder, charge: bool, name: str = "all-time", budget: int = BUDGET
) -> tuple[Found, Ledger]:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / "journal.log", "toy")
    try:
        ledger = Ledger(journal, budget)
        method = METHODS[name]
        readout = Readout(method.support, method.legacy_decision)
        evaluator = Evaluator(oracle, ledger, readout, TASK, data(12, 1), data(10, 2), charge, method.calibrate)
        return search(method, space(), evaluator, 1, lambda status: None), ledger
    finally:
        journal.close()


@pytest.mark.parametrize("crashes", [[1], [2], [4], [9], [3, 1], [4, 2, 1], [1, 1, 1]])
@pytest.mark.parametrize("charge", [False, True])
def test_after_crashes(tmp_path: Path, crashes: list[int], charge: bool) -> None:
    calm, _ = run(tmp_path / "calm", Paid(), charge)
    charged = 0
    for at in crashes:
        server = Paid(FaultyOracle(ToyOracle(), at))
        with pytest.raises(OracleError):
            run(tmp_path / "run", server, charge)
        charged += server.calls
    server = Paid()
    found, ledger = run(tmp_path / "run", server, charge)
    charged += server.calls
    if charge:
        assert charged == ledger.reserved <= BUDGET
        assert len(ledger.in_doubt) == charged - len(ledger._values)
    else:
        assert ledger.reserved <= BUDGET
        assert np.array_equal(found.chosen.incumbent.point, calm.chosen.incumbent.point)
        assert not ledger.in_doubt
    silent = Paid()
    again, _ = run(tmp_path / "run", silent, charge)
    assert silent.calls == 0, "what is finished is replayed without a call"
    assert np.array_equal(again.chosen.incumbent.point, found.chosen.incumbent.point)


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize(("budget", "ended"), [(45, "budget"), (47, "calls")])
def test_a_calibration_that_a_crash_was_charged_for(tmp_path: Path, last: int, budget: int, ended: str) -> None:
    """Both its calls are lost; they are made anew where what is left holds them, else the labels stay as they are."""
    calm = Paid()
    run(tmp_path / "calm", calm, charge=True, name="calibrated", budget=budget)
    assert calm.calls == 45
    server = Paid(FaultyOracle(ToyOracle(), len(calm.batches) - 2 + last))
    with pytest.raises(OracleError):
        run(tmp_path / "run", server, charge=True, name="calibrated", budget=budget)
    found, ledger = run(tmp_path / "run", Paid(), charge=True, name="calibrated", budget=budget)
    assert found.stages[-1].ended == ended
    assert bool(found.chosen.readout.offsets) == (ended == "calls")
    assert ledger.reserved == budget


@pytest.mark.parametrize(("name", "budget"), [("all-time", 39), ("all-time", 40), ("calibrated", 45), ("joint", 39)])
def test_looks_that_a_crash_was_charged_for(tmp_path: Path, name: str, budget: int) -> None:
    """Whatever request is lost, the run ends with what it held, and a dead look is not asked for again for ever."""
    calm = Paid()
    run(tmp_path / "calm", calm, charge=True, name=name, budget=budget)
    for at in range(3, len(calm.batches) + 1):
        folder = tmp_path / str(at)
        with pytest.raises(OracleError):
            run(folder, Paid(FaultyOracle(ToyOracle(), at)), charge=True, name=name, budget=budget)
        _, ledger = run(folder, Paid(), charge=True, name=name, budget=budget)
        assert ledger.reserved <= budget
        silent = Paid()
        run(folder, silent, charge=True, name=name, budget=budget)
        assert silent.calls == 0


def test_a_death_after_the_budget_could_not_hold_what_was_made_anew() -> None:
    """Found by the trials: the search goes on without a generation, is killed, and must go the same way again."""
    happened = doubts.Trials("all-time", 50).one("charge", "1 charge 173")
    assert happened["deaths"] > 1


def test_trials_at_a_server_that_charges_for_every_request() -> None:
    found = doubts.trials(12, seed=1)
    assert min(found["charge"]["lost"], found["resend"]["charged twice"]) > 3
    assert found["resend"]["over budget"], "no budget was in danger"
