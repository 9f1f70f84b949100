"""CMA-ES: the contract, equality with bare cma, bounds, stopping and numeric extremes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from bbprompt.optimizers.cmaes import CMAES, FLAT_GENERATIONS, cma
from bbprompt.testing import OptimizerContract, ellipsoid, sphere

Loss = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class TestContract(OptimizerContract):
    target = "bbprompt.optimizers.cmaes:CMAES"
    arguments: ClassVar = {"x0": [0.5] * 6, "sigma": 0.3, "seed": 0}
    dim = 6


class TestBoundedSmallPopulationContract(OptimizerContract):
    target = "bbprompt.optimizers.cmaes:CMAES"
    arguments: ClassVar = {
        "x0": [0.5, 0.0, -1.0],
        "sigma": 0.5,
        "seed": 3,
        "popsize": 4,
        "bounds": [[-1.0] * 3, [1.0] * 3],
    }
    dim = 3
    rounds = 8


class TestTwoPointContract(OptimizerContract):
    target = "bbprompt.optimizers.cmaes:CMAES"
    arguments: ClassVar = {"x0": [0.1] * 300, "sigma": 0.1, "seed": 5, "popsize": 6}
    dim = 300
    rounds = 8  # cma's self-test, which draws from numpy's generator, would start in the fourth


def run(optimizer: CMAES, loss: Loss, generations: int) -> float:
    for _ in range(generations):
        rows = optimizer.ask()
        optimizer.tell(rows, loss(rows))
    return optimizer.best[1]


@pytest.mark.parametrize(
    ("dim", "popsize", "bounds"),
    [(2, 20, None), (10, 20, None), (7, 5, None), (10, 12, [-0.3, 0.9]), (300, 20, None)],
)
def test_equals_bare_cma(dim: int, popsize: int, bounds: list[float] | None) -> None:
    x0 = np.linspace(-0.2, 0.8, dim)
    rng = np.random.default_rng(17)
    options = {"seed": math.nan, "randn": lambda n, d: rng.standard_normal((n, d)), "popsize": popsize}
    options |= {"verbose": -9, "verb_log": 0, "signals_filename": ""}
    if bounds is not None:
        options["bounds"] = bounds
    bare = cma.CMAEvolutionStrategy(x0, 0.2, options)
    box = None if bounds is None else np.outer(bounds, np.ones(dim))
    optimizer = CMAES(x0, 0.2, seed=17, popsize=popsize, bounds=box)
    for _ in range(30):
        rows = bare.ask()
        np.testing.assert_array_equal(optimizer.ask(), rows)
        losses = ellipsoid(rows, condition=1e3)
        bare.tell(rows, losses.tolist())
        optimizer.tell(rows, losses)
        np.testing.assert_array_equal(optimizer.mean, bare.result.xfavorite)
        assert optimizer.sigma == bare.sigma


@pytest.mark.parametrize("dim", [1, 2, 3, 10])
def test_converges(dim: int) -> None:
    optimizer = CMAES(np.full(dim, 3.0), 1.0, seed=1)
    assert run(optimizer, lambda x: ellipsoid(x, 0.7, 100.0), 100) < 1e-4
    np.testing.assert_allclose(optimizer.mean, 0.7, atol=1e-2)


@pytest.mark.parametrize("dim", [1, 2, 300])
@pytest.mark.parametrize("popsize", [2, 3, 20])
@pytest.mark.parametrize("step_size", ["csa", "tpa", "auto"])
def test_small_and_large_sizes_improve(dim: int, popsize: int, step_size: str) -> None:
    if step_size == "tpa" and popsize == 2:
        with pytest.raises(ValueError, match="popsize must be at least 3"):
            CMAES(np.ones(dim), 0.3, 0, popsize, step_size="tpa")
        return
    optimizer = CMAES(np.ones(dim), 0.3, 0, popsize, step_size=step_size)  # type: ignore[arg-type]
    first = float(np.median(sphere(optimizer.ask())))
    optimizer.tell(np.ones((popsize, dim)), np.full(popsize, float(dim)))
    assert run(optimizer, sphere, 12) < first
    assert np.all(np.isfinite(optimizer.mean))
    assert math.isfinite(optimizer.sigma)


def test_two_point_adaptation_mends_a_wrong_first_sigma() -> None:
    losses = {}
    for rule in ("csa", "tpa"):
        optimizer = CMAES(np.zeros(300), 0.5, seed=2, step_size=rule)
        run(optimizer, lambda x: sphere(x, 0.3), 15)
        losses[rule] = optimizer.best[1]
    assert losses["tpa"] < 0.6 * losses["csa"]


def test_it_decomposes_no_oftener_than_every_third_generation() -> None:
    generations, optimizer = 18, CMAES(np.zeros(300), 0.5, seed=2)
    run(optimizer, sphere, generations)
    assert 1 < optimizer._es.sm.count_eigen <= 1 + generations / 3, "the first one is of the identity"


@pytest.mark.parametrize("scale", [1e-300, 1e-8, 1.0, 1e8, 1e300])
def test_only_the_order_of_losses_matters(scale: float) -> None:
    reference, scaled = CMAES(np.ones(4), 0.3, 7, 8), CMAES(np.ones(4), 0.3, 7, 8)
    for _ in range(25):
        rows = reference.ask()
        np.testing.assert_array_equal(scaled.ask(), rows)
        losses = sphere(rows)
        reference.tell(rows, losses)
        scaled.tell(rows, losses * scale)
    assert scaled.stop is None


@pytest.mark.parametrize("losses", [[0.0, 1.0], [1e300, -1e300], [5e-324, 0.0], [1.0, np.inf]])
def test_two_values_leave_no_nan(losses: list[float]) -> None:
    optimizer = CMAES(np.zeros(5), 0.5, 0, 20)
    for _ in range(40):
        rows = optimizer.ask()
        optimizer.tell(rows, np.where(rows.sum(axis=1) > 0, *losses))
        assert np.all(np.isfinite(optimizer.mean))
        assert 1e-20 < optimizer.sigma < 1e20


@pytest.mark.parametrize("value", [0.0, 1.0, np.inf])
def test_flat_generations_stop_it_late(value: float) -> None:
    optimizer = CMAES(np.zeros(3), 0.5, 0, 10)
    for _ in range(FLAT_GENERATIONS):
        optimizer.tell(optimizer.ask(), np.full(10, value))
        assert optimizer.stop is None
    optimizer.tell(optimizer.ask(), np.full(10, value))
    assert optimizer.stop == "tolflatfitness"
    assert np.all(np.isfinite(optimizer.ask()))


def test_stops_when_steps_vanish() -> None:
    optimizer = CMAES(np.zeros(2), 0.5, 0, 10)
    for _ in range(400):
        if optimizer.stop is not None:
            break
        rows = optimizer.ask()
        optimizer.tell(rows, sphere(rows, 0.3))
    assert optimizer.stop is not None
    assert optimizer.best[1] < 1e-15


@pytest.mark.parametrize("sigma", [1e-20, 1e-9, 1e9, 1e20])
@pytest.mark.parametrize("dim", [2, 300])
def test_any_scale_of_steps_works_alike(sigma: float, dim: int) -> None:
    optimizer = CMAES(np.zeros(dim), sigma, 4, 8)
    twin = CMAES(np.zeros(dim), 1.0, 4, 8)
    for _ in range(12):
        rows, unit = optimizer.ask(), twin.ask()
        np.testing.assert_allclose(rows / sigma, unit, rtol=1e-5, atol=1e-6)
        optimizer.tell(rows, sphere(rows / sigma, 0.5))
        twin.tell(unit, sphere(unit, 0.5))
    assert optimizer.stop is None


def test_rows_and_mean_stay_inside_the_bounds() -> None:
    low, high = np.array([-1.0, -np.inf, 0.0]), np.array([1.0, 0.5, np.inf])
    optimizer = CMAES([0.9, 0.4, 0.1], 0.5, seed=0, popsize=10, bounds=[low, high])
    for _ in range(40):
        rows = optimizer.ask()
        assert np.all((rows >= low) & (rows <= high))
        optimizer.tell(rows, sphere(rows, [3.0, 3.0, -3.0]))
        assert np.all((optimizer.mean >= low) & (optimizer.mean <= high))
    np.testing.assert_allclose(optimizer.best[0], [1.0, 0.5, 0.0], atol=1e-3)


def test_warm_start_moves_the_mean() -> None:
    optimizer = CMAES(np.zeros(4), 0.5, seed=0, popsize=6)
    rows = np.full((6, 4), 0.6) + 0.01 * np.random.default_rng(0).standard_normal((6, 4))
    optimizer.tell(rows, sphere(rows, 0.6))
    np.testing.assert_allclose(optimizer.mean, 0.6, atol=0.05)


@pytest.mark.parametrize("popsize", [4, 8])
def test_foreign_generations_between_asked_ones(popsize: int) -> None:
    rng = np.random.default_rng(0)
    optimizer = CMAES(np.zeros(300), 0.5, seed=0, popsize=popsize)
    for turn in range(14):
        rows = optimizer.ask()
        if turn % 3 == 1:
            sigma = optimizer.sigma
            rows = 0.1 * rng.standard_normal((popsize, 300))
            optimizer.tell(rows, sphere(rows))
            assert optimizer.sigma == sigma  # no probes, hence nothing is known about the step
        else:
            optimizer.tell(rows, sphere(rows))
    assert np.all(np.isfinite(optimizer.ask()))


def test_partial_generations_are_refused() -> None:
    optimizer = CMAES(np.zeros(3), 0.5, seed=0, popsize=6)
    rows = optimizer.ask()
    for count in (1, 5):
        with pytest.raises(ValueError, match="whole generations of 6"):
            optimizer.tell(rows[:count], np.zeros(count))
    with pytest.raises(ValueError, match="whole generations of 6"):
        optimizer.tell(np.zeros((7, 3)), np.zeros(7))
    optimizer.tell(rows, sphere(rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x0": []}, "x0"),
        ({"x0": 1.0}, "x0"),
        ({"x0": [[0.0, 1.0]]}, "x0"),
        ({"x0": [np.nan, 0.0]}, "x0"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": -1.0}, "sigma"),
        ({"sigma": np.nan}, "sigma"),
        ({"sigma": 1e-300}, "sigma"),
        ({"sigma": 1e300}, "sigma"),
        ({"seed": None}, "seed"),
        ({"seed": -1}, "seed"),
        ({"popsize": 1}, "popsize"),
        ({"popsize": 2.5}, "popsize"),
        ({"step_size": "none"}, "step_size"),
        ({"bounds": [[-1.0], [1.0]]}, "bounds"),
        ({"bounds": [[1.0, 1.0], [1.0, 2.0]]}, "bounds"),
        ({"bounds": [[np.nan, -1.0], [1.0, 1.0]]}, "bounds"),
        ({"bounds": [[0.5, 0.5], [1.0, 1.0]]}, "x0 must lie"),
        ({"bounds": [[-0.1, -0.1], [0.1, 0.1]]}, "width of the box"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CMAES(**{"x0": [0.0, 0.0], "sigma": 0.5, "seed": 0, **arguments})  # type: ignore[arg-type]


def test_no_files_no_output_no_warnings(tmp_path: Path) -> None:
    (tmp_path / "cma_signals.in").write_text('{"timeout": 0}')
    code = (
        "import warnings, numpy as np; before = list(warnings.filters)\n"
        "from bbprompt.optimizers.cmaes import CMAES\n"
        "o = CMAES(np.zeros(1), 0.5, seed=0)\n"
        "for _ in range(30):\n"
        "    x = o.ask(); o.tell(x, (x * x).sum(1))\n"
        "assert o.stop is None, o.stop\n"
        "print(len(warnings.filters) - len(before))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "0"
    assert [path.name for path in tmp_path.iterdir()] == ["cma_signals.in"]
