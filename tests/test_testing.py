"""The shipped toy losses and suites: right values, and each fault is seen by the test that should see it."""

from __future__ import annotations

import subprocess
import sys

import faultyoptimizers
import numpy as np
import pytest

from bbprompt.testing import OptimizerContract, ellipsoid, onemax, sphere

TESTS = [name for name in dir(OptimizerContract) if name.startswith("test_")]

FAULTS = {
    "FlatRow": "test_asked_rows_have_the_promised_shape",
    "SinglePrecision": "test_asked_rows_have_the_promised_shape",
    "Unseeded": "test_same_arguments_and_tells_give_the_same_asks",
    "HashSeeded": "test_other_processes_ask_for_the_same_rows",
    "CountsAsks": "test_replay_restores_it",
    "AsksTwice": "test_asking_twice_is_refused",
    "TakesNan": "test_bad_tells_are_refused_and_change_nothing",
    "RefusesTooLate": "test_bad_tells_are_refused_and_change_nothing",
    "ReadsNumpy": "test_global_generators_are_neither_read_nor_changed",
    "SeedsNumpy": "test_global_generators_are_neither_read_nor_changed",
    "ReadsRandom": "test_global_generators_are_neither_read_nor_changed",
    "RefusesInf": "test_infeasible_rows_are_the_worst",
    "StopsWhenFlat": "test_flat_losses_end_nothing",
    "LatestIsBest": "test_best_is_the_best_of_all_told_rows",
    "ForgetsForeign": "test_warm_start",
    "KeepsReferences": "test_arrays_are_not_shared_with_the_caller",
    "GivesItsOwnArray": "test_arrays_are_not_shared_with_the_caller",
}


def contract(fault: str) -> OptimizerContract:
    settings = {"target": f"faultyoptimizers:{fault}", "arguments": {}, "dim": 2}
    suite: OptimizerContract = type("Suite", (OptimizerContract,), settings)()
    return suite


@pytest.mark.parametrize("name", TESTS)
def test_the_contract_passes_without_a_fault(name: str) -> None:
    getattr(contract("Sound"), name)()


@pytest.mark.parametrize(("fault", "name"), FAULTS.items())
def test_the_contract_sees(fault: str, name: str) -> None:
    with pytest.raises(ValueError if fault == "RefusesInf" else AssertionError):
        getattr(contract(fault), name)()


def test_every_fault_is_listed_and_every_test_sees_one() -> None:
    faults = {
        name
        for name, value in vars(faultyoptimizers).items()
        if isinstance(value, type) and issubclass(value, faultyoptimizers.Sound)
    }
    assert faults - {"Sound"} == set(FAULTS)
    assert set(TESTS) == set(FAULTS.values())


def test_toy_losses() -> None:
    rows = np.array([[0.0, 0.0], [1.0, 2.0]])
    np.testing.assert_array_equal(sphere(rows), [0.0, 5.0])
    np.testing.assert_array_equal(sphere(rows, [1.0, 2.0]), [5.0, 0.0])
    np.testing.assert_allclose(ellipsoid(rows, condition=100.0), [0.0, 401.0])
    np.testing.assert_allclose(ellipsoid([[3.0]]), [9.0])
    np.testing.assert_array_equal(onemax([[0.0, 1.0], [1.0, 1.0]]), [1.0, 0.0])
    np.testing.assert_array_equal(onemax([[0.0, 1.0], [1.0, 1.0]], [0.0, 0.0]), [1.0, 2.0])


def test_importing_it_is_light() -> None:
    code = "import sys, bbprompt.testing, bbprompt.optimizers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "cma", "botorch", "scipy", "pytest", "ray"} & set(done.stdout.split())
