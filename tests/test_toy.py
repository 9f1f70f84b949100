"""The shipped fakes and the oracle contract: sound ones pass, and each fault is seen."""

from __future__ import annotations

import subprocess
import sys

import faultyoracles
import numpy as np
import pytest
import tiny_prompt

from bbprompt.errors import OracleError
from bbprompt.oracle import Oracle, TextBatch, check_scores
from bbprompt.readout import Readout
from bbprompt.scoring import labelled
from bbprompt.tasks.example import Form, Part
from bbprompt.tasks.task import Task
from bbprompt.testing import FaultyOracle, OracleContract, ToyOracle

TESTS = [name for name in dir(OracleContract) if name.startswith("test_")]

FAULTS = {
    "Nameless": "test_it_says_what_it_is",
    "NewNameEachTime": "test_it_says_what_it_is",
    "ForgetsOne": "test_replies_have_the_promised_shapes",
    "AnswersUnasked": "test_replies_have_the_promised_shapes",
    "Drifts": "test_the_same_request_gives_the_same_reply",
    "IgnoresALayer": "test_points_count",
    "SharesTheFirst": "test_candidates_do_not_see_each_other",
    "PadsTexts": "test_texts_do_not_see_each_other",
    "Unnormalized": "test_normalizers_make_probabilities",
    "AnswersNothing": "test_answers_are_found_in_their_context",
    "TakesNan": "test_bad_points_are_refused",
    "CutsUnsaid": "test_texts_that_do_not_fit_are_refused",
    "ReusesItsArrays": "test_arrays_are_not_shared_with_the_caller",
    "ClosesOnce": "test_closing_twice",
}


def contract(name: str) -> OracleContract:
    suite: OracleContract = type("Suite", (OracleContract,), {"make": lambda _: getattr(faultyoracles, name)()})()
    return suite


@pytest.mark.parametrize("name", TESTS)
def test_the_contract_passes_without_a_fault(name: str) -> None:
    getattr(contract("Sound"), name)()


@pytest.mark.parametrize(("fault", "name"), FAULTS.items())
def test_the_contract_sees(fault: str, name: str) -> None:
    with pytest.raises((AssertionError, OracleError, ValueError)) as caught:
        getattr(contract(fault), name)()
    if fault not in ("ClosesOnce", "ForgetsOne", "AnswersUnasked"):
        assert caught.type is AssertionError


def test_every_fault_is_listed_and_every_test_sees_one() -> None:
    faults = {
        name
        for name, value in vars(faultyoracles).items()
        if isinstance(value, type) and issubclass(value, faultyoracles.Sound)
    }
    assert faults - {"Sound"} == set(FAULTS)
    assert set(TESTS) == set(FAULTS.values())


class TestFaultless(OracleContract):
    """A faulty oracle whose time has not come is sound."""

    def make(self) -> Oracle:
        return FaultyOracle(ToyOracle(2, 3, seed=5), at=10**6)


@pytest.mark.parametrize("support", ["candidates", "sequence"])
def test_the_toy_landscape_is_smooth_and_can_be_tuned(support: str) -> None:
    task = Task.model_validate(tiny_prompt.PAIR)
    data = labelled(task, [task.example(r) for r in tiny_prompt.pair_records(32, 0)], for_loss=True)
    oracle, readout = ToyOracle(), Readout(support=support)  # type: ignore[arg-type]

    def loss(points: np.ndarray) -> np.ndarray:
        scores = check_scores(oracle.score(data.batch, points, readout.support), data.batch, len(points), channels=2)
        return readout.losses(scores, data.batch, data.gold).mean(1)

    rng = np.random.default_rng(0)
    here, step = rng.normal(size=(1, 3, 4)), rng.normal(size=(1, 3, 4))
    near = loss(np.concatenate([here, here + 1e-3 * step, here + 2e-3 * step]))
    assert abs(near[2] - 2 * near[1] + near[0]) < 1e-4, "no kink"
    best, lowest = np.zeros((3, 4)), loss(np.zeros((1, 3, 4)))[0]
    untuned = lowest
    for _ in range(40):
        tried = best + 0.2 * rng.normal(size=(20, 3, 4))
        losses = loss(tried)
        if losses.min() < lowest:
            best, lowest = tried[losses.argmin()], losses.min()
    assert lowest < untuned - 0.02


def test_a_faulty_oracle_fails_once() -> None:
    batch = TextBatch((Form((Part("天", True),), ("是", "否"), -1),))
    points = np.zeros((2, 3, 4))
    broken = FaultyOracle(ToyOracle(), at=2)
    fine = broken.score(batch, points)
    with pytest.raises(OracleError, match="call 2 failed"):
        broken.score(batch, points)
    np.testing.assert_array_equal(broken.score(batch, points).logits, fine.logits)
    assert broken.calls == 3
    for fault, message in (("nan", "NaN or infinity"), ("shape", "of shape")):
        oracle = FaultyOracle(ToyOracle(), 1, fault)  # type: ignore[arg-type]
        with pytest.raises(OracleError, match=message):
            check_scores(oracle.score(batch, points), batch, 2, channels=2)
        check_scores(oracle.score(batch, points), batch, 2, channels=2)
        assert oracle.info == ToyOracle().info
        oracle.close()


def test_fakes_are_light() -> None:
    code = "import sys, bbprompt.testing; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "cma", "botorch", "pytest", "ray"} & set(done.stdout.split())
