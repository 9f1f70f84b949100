"""The Gaussian process posterior: against botorch, a dense solve and finite differences; numeric extremes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bbprompt.optimizers.fitting import LogNormalPrior, MaternKernel, SingleTaskGP
from bbprompt.optimizers.posterior import MIN_VARIANCE, Hyperparameters, Posterior

CASES = [(1, 3, False), (8, 20, False), (8, 120, True), (96, 60, False), (192, 100, True)]


def problem(
    dim: int, count: int, binary: bool
) -> tuple[Hyperparameters, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(dim + count)
    rows = rng.random((count + 300, dim))
    if binary:
        rows = np.round(rows)
    targets = rng.standard_normal(count)
    scale = np.exp(rng.normal(0.0, 0.4, dim)) * dim**0.5 / 2
    hyper = Hyperparameters(lengthscale=scale, noise=3e-3, mean=-0.2)
    return hyper, rows[:count], targets, rows[count:]


def botorch_model(hyper: Hyperparameters, rows: NDArray[np.float64], targets: NDArray[np.float64]) -> SingleTaskGP:
    kernel = MaternKernel(nu=2.5, ard_num_dims=rows.shape[1], lengthscale_prior=LogNormalPrior(0.0, 1.0))
    x, y = torch.from_numpy(rows), torch.from_numpy(targets)[:, None]
    model = SingleTaskGP(x, y, covar_module=kernel, outcome_transform=None)
    model.covar_module.lengthscale = torch.from_numpy(hyper.lengthscale)
    model.likelihood.noise = hyper.noise
    model.mean_module.constant.data.fill_(hyper.mean)
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # botorch comments on inputs that are not standardised
@pytest.mark.parametrize(("dim", "count", "binary"), CASES)
def test_moments_and_bound_equal_those_of_botorch(dim: int, count: int, binary: bool) -> None:
    from botorch.acquisition import UpperConfidenceBound

    hyper, rows, targets, queries = problem(dim, count, binary)
    ours = Posterior.given(hyper, rows, targets)
    mean, variance = ours.moments(queries)
    model = botorch_model(hyper, rows, targets)
    with torch.no_grad():
        theirs = model.posterior(torch.from_numpy(queries))
        bound = UpperConfidenceBound(model, beta=2.0**2)(torch.from_numpy(queries)[:, None]).numpy()
    np.testing.assert_allclose(mean, theirs.mean.numpy()[:, 0], rtol=0, atol=1e-8)
    np.testing.assert_allclose(variance, theirs.variance.numpy()[:, 0], rtol=0, atol=1e-8)
    np.testing.assert_allclose(ours.ucb(queries, 2.0), bound, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("dim", "count", "binary"), CASES)
def test_moments_equal_a_dense_solve(dim: int, count: int, binary: bool) -> None:
    hyper, rows, targets, queries = problem(dim, count, binary)

    def kernel(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
        away = (left[:, None] - right[None]) / hyper.lengthscale
        root = np.sqrt(5.0 * (away**2).sum(axis=2))
        return np.asarray((1 + root + root**2 / 3) * np.exp(-root))

    inverse = np.linalg.inv(kernel(rows, rows) + hyper.noise * np.eye(count))
    cross = kernel(queries, rows)
    mean, variance = Posterior.given(hyper, rows, targets).moments(queries)
    np.testing.assert_allclose(mean, hyper.mean + cross @ inverse @ (targets - hyper.mean), atol=1e-8)
    np.testing.assert_allclose(variance, 1 - np.einsum("ij,jk,ik->i", cross, inverse, cross), atol=1e-8)


@pytest.mark.parametrize(("dim", "count", "binary"), CASES)
def test_gradient_equals_finite_differences(dim: int, count: int, binary: bool) -> None:
    hyper, rows, targets, queries = problem(dim, count, binary)
    posterior = Posterior.given(hyper, rows, targets)
    for row in [*queries[:3], rows[0] + 1e-3]:
        value, gradient = posterior.ucb_gradient(row, 2.0)
        assert value == pytest.approx(posterior.ucb(row[None], 2.0)[0], abs=1e-10)
        step = 1e-5 * np.eye(dim)
        slope = (posterior.ucb(row + step, 2.0) - posterior.ucb(row - step, 2.0)) / 2e-5
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dim", "count", "binary"), CASES)
def test_a_believed_row_counts_as_told_its_mean(dim: int, count: int, binary: bool) -> None:
    hyper, rows, targets, queries = problem(dim, count, binary)
    grown = Posterior.given(hyper, rows, targets)
    for believed in queries[:3]:
        mean, _ = grown.moments(believed[None])
        rows, targets = np.concatenate([rows, believed[None]]), np.concatenate([targets, mean])
        grown = grown.believing(believed)
    again = Posterior.given(hyper, rows, targets)
    np.testing.assert_allclose(grown.moments(queries), again.moments(queries), atol=1e-8)


@pytest.mark.parametrize(("dim", "count"), [(1, 1), (8, 120), (96, 60)])
def test_the_bounds_of_flips_are_those_of_the_flipped_rows(dim: int, count: int) -> None:
    hyper, rows, targets, queries = problem(dim, count, True)
    posterior = Posterior.given(hyper, rows, targets)
    flipped = np.abs(queries[:5, None] - np.eye(dim))
    expected = posterior.ucb(flipped.reshape(-1, dim), 2.0).reshape(5, dim)
    # The square root of a rounding error beside a known row.
    np.testing.assert_allclose(posterior.ucb_of_flips(queries[:5], 2.0), expected, atol=1e-7)


def test_one_row_is_known_and_far_rows_follow_the_prior() -> None:
    hyper = Hyperparameters(lengthscale=np.full(2, 0.1), noise=1e-6, mean=0.3)
    posterior = Posterior.given(hyper, np.array([[0.5, 0.5]]), np.array([1.7]))
    mean, variance = posterior.moments(np.array([[0.5, 0.5], [1e6, -1e6]]))
    np.testing.assert_allclose(mean, [1.7, 0.3], atol=1e-5)
    np.testing.assert_allclose(variance, [1e-6, 1.0], atol=1e-8)


def test_repeated_rows_without_noise_get_jitter(caplog: pytest.LogCaptureFixture) -> None:
    hyper = Hyperparameters(lengthscale=np.ones(3), noise=0.0, mean=0.0)
    rows = np.repeat(np.random.default_rng(0).random((5, 3)), 4, axis=0)
    with caplog.at_level(logging.WARNING):
        posterior = Posterior.given(hyper, rows, np.arange(20) % 4 - 1.5)
    assert "jitter" in caplog.text
    mean, variance = posterior.moments(rows)
    assert np.all(np.isfinite(mean))
    assert np.all(variance >= MIN_VARIANCE)
    assert np.all(np.isfinite(posterior.ucb_gradient(rows[0], 2.0)[1]))


def test_believing_all_is_believing_one_by_one() -> None:
    hyper, rows, targets, queries = problem(8, 20, binary=False)
    single = together = Posterior.given(hyper, rows, targets)
    for row in queries[:9]:
        single = single.believing(row)
    together = together.believing_all(queries[:9])
    np.testing.assert_allclose(together.chol, single.chol, rtol=0, atol=1e-10)
    np.testing.assert_allclose(together.ucb(queries, 2.0), single.ucb(queries, 2.0), rtol=0, atol=1e-9)
    nobody = together.believing_all(queries[:0])
    np.testing.assert_array_equal(nobody.chol, together.chol)
