"""GP-UCB: the contract, better than random at equal calls, exhaustion, batches, numeric extremes."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bbprompt.optimizers import Optimizer, bits, fitting, gp, proposal
from bbprompt.optimizers.aside import Aside
from bbprompt.optimizers.gp import GPUCB
from bbprompt.optimizers.posterior import Hyperparameters, Posterior
from bbprompt.optimizers.random import RandomSearch
from bbprompt.testing import OptimizerContract, onemax, sphere

Loss = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class TestBoxContract(OptimizerContract):
    target = "bbprompt.optimizers.gp:GPUCB"
    arguments: ClassVar = {"bounds": [[-1.0] * 3, [2.0] * 3], "seed": 2, "batch": 2, "n_random": 4}
    dim = 3


class TestBinaryContract(OptimizerContract):
    target = "bbprompt.optimizers.gp:GPUCB"
    arguments: ClassVar = {
        "bounds": [[0.0] * 14, [1.0] * 14],
        "seed": 2,
        "n_random": 3,
        "refit_every": 2,
        "binary": True,
        "initial": [[1.0] * 14],
    }
    dim = 14
    binary = True
    rounds = 6


class TestTogetherContract(OptimizerContract):
    target = "bbprompt.optimizers.gp:GPUCB"
    arguments: ClassVar = {"bounds": [[0.0] * 24, [1.0] * 24], "seed": 2, "n_random": 20, "batch": 20, "binary": True}
    dim = 24
    binary = True


class TestAheadContract(OptimizerContract):
    target = "bbprompt.optimizers.gp:GPUCB"
    arguments: ClassVar = {"bounds": [[-1.0] * 3, [2.0] * 3], "seed": 2, "batch": 3, "n_random": 3, "ahead": True}
    dim = 3


def box(dim: int, low: float = -5.0, high: float = 5.0) -> list[list[float]]:
    return [[low] * dim, [high] * dim]


def run(optimizer: Optimizer, loss: Loss, calls: int) -> float:
    done = 0
    while done < calls and optimizer.stop is None:
        rows = optimizer.ask()
        optimizer.tell(rows, loss(rows))
        done += len(rows)
    return optimizer.best[1]


def router_loss(dim: int) -> Loss:
    """Bits that matter unequally, and in pairs."""
    rng = np.random.default_rng(31)
    weights, pairs = rng.standard_normal(dim), rng.standard_normal(dim - 1)
    return lambda x: x @ weights + (x[:, 1:] * x[:, :-1]) @ pairs


@pytest.mark.parametrize(("dim", "calls", "factor"), [(8, 45, 0.1), (96, 45, 0.7)])
def test_beats_random_in_a_box(dim: int, calls: int, factor: float) -> None:
    center = np.random.default_rng(5).uniform(-3, 3, dim)
    guided = run(GPUCB(box(dim), seed=1), lambda x: sphere(x, center), calls)
    blind = run(RandomSearch(box(dim), seed=1), lambda x: sphere(x, center), calls)
    assert guided < factor * blind


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_large_batches_beat_random(binary: bool, ahead: bool) -> None:
    center = np.random.default_rng(5).integers(0, 2, 96) if binary else np.random.default_rng(5).uniform(0, 1, 96)
    guided = GPUCB(box(96, 0, 1), seed=1, binary=binary, batch=32, n_random=32, ahead=ahead)
    found = run(guided, lambda x: sphere(x, center), 160)
    blind = run(RandomSearch(box(96, 0, 1), seed=1, binary=binary), lambda x: sphere(x, center), 160)
    assert found < (0.5 if binary else 0.8) * blind


@pytest.mark.parametrize("batch", [4, gp.JOINT_BATCH, gp.JOINT_BATCH + 1])
def test_the_size_of_a_batch_decides_how_it_is_proposed(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = proposal.best_together
    monkeypatch.setattr(proposal, "best_together", lambda *a, **k: used.append(a[2]) or original(*a, **k))
    optimizer = GPUCB(box(24, 0, 1), seed=1, binary=True, batch=batch, n_random=4, initial=np.eye(24)[:6])
    for _ in range(2):
        rows = optimizer.ask()
        optimizer.tell(rows, sphere(rows, 0.2))
    rows = optimizer.ask()
    assert len(rows) == batch
    assert bool(used) is (batch > gp.JOINT_BATCH)


def test_ahead_an_ask_knows_the_rows_of_the_last_tell_and_not_their_losses() -> None:
    """Hence neither the process beside nor what the last losses are can change it."""
    first, other = (GPUCB(box(24, 0, 1), seed=1, binary=True, batch=20, n_random=20, ahead=True) for _ in range(2))
    other._aside = None  # nobody works ahead here
    told: list[bytes] = []
    for turn in range(4):
        rows = first.ask()
        told += bits.keys(rows)
        if turn < 3:
            np.testing.assert_array_equal(other.ask(), rows)
        first.tell(rows, sphere(rows, 0.2))
        other.tell(rows, sphere(rows, 0.2) if turn < 3 else sphere(rows, 0.8))
    np.testing.assert_array_equal(other.ask(), last := first.ask())
    told += bits.keys(last)
    assert len(set(told)) == len(told)


def test_ahead_nothing_is_fitted_here_once_the_process_beside_can(monkeypatch: pytest.MonkeyPatch) -> None:
    helper = Aside()
    helper.start()
    assert helper._process is not None
    select.select([helper._process.stdout], [], [])  # it says so
    search = GPUCB(box(24, 0, 1), seed=1, binary=True, batch=20, n_random=20, ahead=True, aside=helper)
    monkeypatch.setattr(fitting, "fit", lambda *given, **named: pytest.fail("fitted here"))
    assert run(search, lambda x: sphere(x, 0.2), 100) < np.inf


def test_a_large_batch_uses_the_best_and_the_latest_rows() -> None:
    losses = np.concatenate([np.arange(500.0), np.full(200, 1000.0)])
    used = gp._model_rows(losses)
    half = gp._MODEL // 2
    np.testing.assert_array_equal(used, [*range(half), *range(700 - half, 700)])
    np.testing.assert_array_equal(gp._model_rows(losses[:100]), np.arange(100))


@pytest.mark.parametrize("dim", [24, 96])
def test_beats_random_over_bits(dim: int) -> None:
    target = np.random.default_rng(5).integers(0, 2, dim)
    guided = run(GPUCB(box(dim, 0, 1), seed=1, binary=True), lambda x: onemax(x, target), 50)
    blind = run(RandomSearch(box(dim, 0, 1), seed=1, binary=True), lambda x: onemax(x, target), 50)
    assert guided < 0.7 * blind


def test_finds_the_best_of_256_routers() -> None:
    loss = router_loss(8)
    optimum = loss(bits.enumerate_bits(8)).min()
    assert run(GPUCB(box(8, 0, 1), seed=3, binary=True, refit_every=40), loss, 50) == optimum


@pytest.mark.parametrize(("dim", "forbid_zero", "batch"), [(1, True, 1), (3, False, 3), (5, True, 4)])
def test_stops_when_all_binary_rows_are_told(dim: int, forbid_zero: bool, batch: int) -> None:
    optimizer = GPUCB(box(dim, 0, 1), 0, n_random=2, binary=True, batch=batch, forbid_zero=forbid_zero)
    seen: list[bytes] = []
    while optimizer.stop is None:
        rows = optimizer.ask()
        seen += bits.keys(rows)
        optimizer.tell(rows, rows.sum(axis=1))
    assert optimizer.stop == "exhausted"
    assert len(seen) == len(set(seen)) == 2**dim - forbid_zero
    with pytest.raises(RuntimeError, match="nothing is left"):
        optimizer.ask()


@pytest.mark.parametrize("binary", [False, True])
def test_batches_are_distinct_and_untold(binary: bool) -> None:
    dim = 12
    optimizer = GPUCB(box(dim, 0, 1), seed=0, batch=5, n_random=10, binary=binary, refit_every=9)
    told: list[bytes] = []
    for _ in range(5):
        rows = optimizer.ask()
        told += [row.tobytes() for row in rows]
        optimizer.tell(rows, sphere(rows, 0.2))
    assert len(told) == len(set(told)) == 25


@pytest.mark.parametrize("binary", [False, True])
def test_initial_rows_come_first_unless_told(binary: bool) -> None:
    initial = [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
    optimizer = GPUCB(box(3, 0, 1), seed=0, batch=2, n_random=4, binary=binary, initial=initial)
    optimizer.tell(initial[:1], [0.5])
    rows = optimizer.ask()
    np.testing.assert_array_equal(rows, initial[1:3])
    optimizer.tell(rows, [0.25, 1.0])
    rows = optimizer.ask()
    assert not {row.tobytes() for row in rows} & {np.array(row).tobytes() for row in initial}


def test_random_phase_ends_after_n_random_told_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = fitting.fit

    def counted(rows: NDArray[np.float64], *rest: Any, **named: Any) -> Any:
        sizes.append(len(rows))
        return original(rows, *rest, **named)

    monkeypatch.setattr(fitting, "fit", counted)
    run(GPUCB(box(2), seed=0, n_random=5), sphere, 30)
    assert sizes == [5, 6, 7, 8, 9, 10, 12, 14, 16, 19, 22, 26]
    sizes.clear()
    run(GPUCB(box(2), seed=0, n_random=5, refit_every=10), sphere, 30)
    assert sizes == [5, 15, 25]
    sizes.clear()
    warm = GPUCB(box(2), seed=0, n_random=5)
    rows = np.random.default_rng(0).uniform(-5, 5, (28, 2))
    warm.tell(rows, sphere(rows))
    warm.ask()
    assert sizes == [26]


def test_global_threads_and_generator_survive_a_fit() -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    run(GPUCB(box(2), seed=0, n_random=3), sphere, 6)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_failed_fit_is_logged_and_the_prior_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(mll: object) -> None:
        raise fitting.ModelFittingError("no")

    monkeypatch.setattr(fitting, "fit_gpytorch_mll", fails)
    optimizer = GPUCB(box(2), seed=0, n_random=3)
    assert run(optimizer, sphere, 8) < 10.0
    assert "priors are used" in caplog.text


@pytest.mark.parametrize("scale", [1e-300, 1e-8, 1e8])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    reference, scaled = GPUCB(box(2), seed=4, n_random=4), GPUCB(box(2), seed=4, n_random=4)
    for _ in range(8):
        rows = reference.ask()
        np.testing.assert_allclose(scaled.ask(), rows, atol=1e-3)
        reference.tell(rows, sphere(rows))
        scaled.tell(rows, sphere(rows) * scale)


@pytest.mark.parametrize(
    "losses",
    [
        [1.0],
        [1.0, 1.0],
        [0.0, 1.0],
        [1e300, -1e300],
        [1.7e308, -1.7e308],
        [5e-324, 0.0],
        [1.0, 1.0 + 1e-12],
        [np.inf],
        [np.inf, 3.0],
        [1e8, 0.0, 1e-8],
    ],
)
@pytest.mark.parametrize("binary", [False, True])
def test_odd_losses_leave_finite_proposals(losses: list[float], binary: bool) -> None:
    optimizer = GPUCB(box(11, 0, 1), seed=0, n_random=1, binary=binary, refit_every=3)
    for turn in range(7):
        rows = optimizer.ask()
        assert np.all((rows >= 0) & (rows <= 1))
        optimizer.tell(rows, [losses[turn % len(losses)]])
    assert optimizer.best[1] == min(losses)


@pytest.mark.parametrize("dim", [1, 2, 300])
@pytest.mark.parametrize("binary", [False, True])
def test_small_and_large_dimensions(dim: int, binary: bool) -> None:
    optimizer = GPUCB(box(dim, 0, 1), seed=0, n_random=2, binary=binary)
    for _ in range(5):
        if optimizer.stop is not None:
            break
        rows = optimizer.ask()
        assert rows.shape == (1, dim)
        optimizer.tell(rows, sphere(rows, 0.3))
    assert (optimizer.stop == "exhausted") is (binary and dim <= 2)


def test_repeated_rows_and_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = rng.uniform(-5, 5, (500, 4))
    rows[250:300] = rows[0]
    optimizer = GPUCB(box(4), seed=0)
    optimizer.tell(rows, sphere(rows) + 1e-12 * rng.standard_normal(500))
    monkeypatch.setattr(fitting, "fit", lambda *given, **named: Hyperparameters(np.ones(4), 1e-4, 0.0))
    assert np.all(np.isfinite(optimizer.ask()))


def test_shared_lengthscale_beyond_twenty_dimensions() -> None:
    for dim, ard, kinds in [(20, None, 20), (21, None, 1), (21, True, 21), (3, False, 1)]:
        optimizer = GPUCB(box(dim), seed=0, n_random=30, ard=ard)
        rows = np.random.default_rng(0).uniform(-5, 5, (30, dim))
        optimizer.tell(rows, rows[:, 0] * 3 + rows[:, 1:].sum(axis=1))
        question = optimizer._question(30, 1, rows[:0], rows[:0])
        assert len(set(optimizer._fits.of(question).lengthscale)) == kinds


def test_shared_lengthscale_predicts_a_dense_loss_better() -> None:
    """The reason for the default, on a loss to which all of 96 bits contribute."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2, (360, 96)).astype(np.float64)
    truth = -(rows @ rng.standard_normal(96)) - (rows[:, 1:] * rows[:, :-1]) @ rng.standard_normal(95) / 2
    quality = {}
    for ard in (False, True):
        targets = gp._targets(-truth[:60])
        hyper = fitting.fit(rows[:60], targets, ard=ard, seed=0)
        mean, _ = Posterior.given(hyper, rows[:60], targets).moments(rows[60:])
        quality[ard] = np.corrcoef(mean, truth[60:])[0, 1]
    assert quality[False] > quality[True] + 0.02
    assert quality[False] > 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kappa": -1.0}, "kappa"),
        ({"kappa": np.nan}, "kappa"),
        ({"n_random": 0}, "n_random"),
        ({"batch": 0}, "batch"),
        ({"refit_every": 0}, "refit_every"),
        ({"seed": None}, "seed"),
        ({"bounds": [[0.0, 0.0], [1.0, 2.0]], "binary": True}, "0 and 1"),
        ({"initial": [[0.5]]}, "initial"),
        ({"initial": [[0.5, 2.0]]}, "outside"),
        ({"initial": [[0.5, np.nan]]}, "outside"),
        ({"initial": [[0.5, 1.0]], "binary": True}, "only 0 and 1"),
        ({"initial": [[0.0, 0.0]], "binary": True}, "forbid_zero"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPUCB(**{"bounds": box(2, 0, 1), "seed": 0, **arguments})


def test_binary_tells_hold_bits() -> None:
    with pytest.raises(ValueError, match="only 0 and 1"):
        GPUCB(box(2, 0, 1), seed=0, binary=True).tell([[0.5, 1.0]], [1.0])
