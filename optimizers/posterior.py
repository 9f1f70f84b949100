"""Posterior of a Gaussian process with a Matérn-5/2 kernel, for thousands of rows at once.

The kernel has unit variance and one lengthscale a dimension, with s = |(x - y) / lengthscale|::

    k(x, y) = (1 + sqrt(5) s + 5/3 s^2) exp(-sqrt(5) s)

Rows live in the unit cube, targets are standardised and to be maximised.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

__all__ = ["MIN_VARIANCE", "Hyperparameters", "Posterior", "matern", "squares"]

MIN_VARIANCE = 1e-12
"""Floor under the variance, as in botorch's analytic acquisition functions."""

_JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)
_ROOT5 = 5.0**0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What the likelihood decides; all in units of the unit cube and of standardised targets.

    Attributes:
        lengthscale: `(dim,)`.
        noise: variance of the noise on a target.
        mean: the constant mean.
    """

    lengthscale: NDArray[np.float64]
    noise: float
    mean: float


@dataclass(frozen=True, slots=True)
class Posterior:
    """The process given n rows (Rasmussen and Williams, 2006, algorithm 2.1).

    Attributes:
        hyper: the hyperparameters.
        scaled: the rows divided by the lengthscale, `(n, dim)`.
        chol: lower Cholesky factor of K + nugget I, `(n, n)`.
        alpha: (K + nugget I)^-1 (targets - mean), `(n,)`.
        nugget: the noise, and the jitter where it was needed.
    """

    hyper: Hyperparameters
    scaled: NDArray[np.float64]
    chol: NDArray[np.float64]
    alpha: NDArray[np.float64]
    nugget: float

    @classmethod
    def given(cls, hyper: Hyperparameters, rows: NDArray[np.float64], targets: NDArray[np.float64]) -> Posterior:
        """Condition on rows `(n, dim)` and targets `(n,)`.

        Repeated rows with hardly any noise make K singular: jitter on its diagonal is then raised step by
        step up to 1e-4, and said in the log.

        Raises:
            numpy.linalg.LinAlgError: K is not positive definite even so.
        """
        scaled = rows / hyper.lengthscale
        covariance = matern(squares(scaled, scaled))
        for jitter in _JITTERS:
            shifted = covariance + (hyper.noise + jitter) * np.eye(len(rows))
            try:
                chol = scipy.linalg.cholesky(shifted, lower=True, check_finite=False)
            except np.linalg.LinAlgError:
                if jitter == _JITTERS[-1]:
                    raise
                continue
            if jitter > 0:
                _log.warning("Gaussian process: jitter %g added to the kernel of %d rows", jitter, len(rows))
            break
        alpha = scipy.linalg.cho_solve((chol, True), targets - hyper.mean, check_finite=False)
        return cls(hyper=hyper, scaled=scaled, chol=chol, alpha=alpha, nugget=hyper.noise + jitter)

    def believing(self, row: NDArray[np.float64]) -> Posterior:
        """Condition on one more row `(dim,)` whose target is the mean predicted there (kriging believer).

        Such a target changes no mean, so its weight is 0; the factor grows by one row (n^2 instead of n^3 steps).
        """
        scaled = row / self.hyper.lengthscale
        below = self.whiten(self.kernel(row[None]))[:, 0]
        n = len(self.alpha)
        chol = np.zeros((n + 1, n + 1))
        chol[:n, :n], chol[n, :n] = self.chol, below
        chol[n, n] = (max(1.0 - float(below @ below), MIN_VARIANCE) + self.nugget) ** 0.5
        return Posterior(
            hyper=self.hyper,
            scaled=np.concatenate([self.scaled, scaled[None]]),
            chol=chol,
            alpha=np.append(self.alpha, 0.0),
            nugget=self.nugget,
        )

    def believing_all(self, rows: NDArray[np.float64]) -> Posterior:
        """Condition on several more rows `(m, dim)`, as `believing` does one by one: no mean changes by that."""
        kernel = self.kernel(rows)
        below = self.whiten(kernel).T
        scaled = rows / self.hyper.lengthscale
        corner = matern(squares(scaled, scaled)) - below @ below.T + self.nugget * np.eye(len(rows))
        n, m = len(self.alpha), len(rows)
        chol = np.zeros((n + m, n + m))
        chol[:n, :n], chol[n:, :n] = self.chol, below
        chol[n:, n:] = scipy.linalg.cholesky(corner, lower=True, check_finite=False)
        return Posterior(
            hyper=self.hyper,
            scaled=np.concatenate([self.scaled, scaled]),
            chol=chol,
            alpha=np.concatenate([self.alpha, np.zeros(m)]),
            nugget=self.nugget,
        )

    def moments(self, rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return mean and variance of the noise-free function at rows `(m, dim)`, `(m,)` each."""
        return self._moments(self.kernel(rows))

    def ucb(self, rows: NDArray[np.float64], kappa: float) -> NDArray[np.float64]:
        """Return the upper confidence bound mean + kappa sqrt(variance) at rows `(m, dim)`, `(m,)`."""
        mean, variance = self.moments(rows)
        bound: NDArray[np.float64] = mean + kappa * np.sqrt(variance)
        return bound

    def ucb_of_flips(self, rows: NDArray[np.float64], kappa: float) -> NDArray[np.float64]:
        """Return the bound at all rows one flip away from the binary rows `(m, dim)`, `(m, dim)`.

        Among rows t of 0 and 1 a flip of bit j moves r by (1 - 2 r_j)(1 - 2 t_j) / lengthscale_j^2 in squared
        distance: no distance is computed anew. Row by row, so that all of it stays in the processor's cache.
        """
        scale = self.hyper.lengthscale
        gain = ((1.0 - 2.0 * scale * self.scaled) / scale**2).T
        bounds = np.empty_like(rows)
        for i, away in enumerate(squares(rows / scale, self.scaled)):
            mean, variance = self._moments(matern((1.0 - 2.0 * rows[i])[:, None] * gain + away))
            bounds[i] = mean + kappa * np.sqrt(variance)
        return bounds

    def ucb_gradient(self, row: NDArray[np.float64], kappa: float) -> tuple[float, NDArray[np.float64]]:
        """Return the upper confidence bound at one row `(dim,)` and its gradient `(dim,)`.

        Differentiates the kernel: dk/dx = -5/3 (1 + sqrt(5) s) exp(-sqrt(5) s) (x - y) / lengthscale^2.
        """
        away = row / self.hyper.lengthscale - self.scaled
        root = _ROOT5 * np.sqrt(np.einsum("ij,ij->i", away, away))
        decay = np.exp(-root)
        cross = (1.0 + root + root * root / 3.0) * decay
        slope = -(5.0 / 3.0) * (1.0 + root) * decay
        weights = scipy.linalg.cho_solve((self.chol, True), cross, check_finite=False)
        variance = 1.0 - float(cross @ weights)
        deviation = max(variance, MIN_VARIANCE) ** 0.5
        pull = self.alpha * slope
        if variance > MIN_VARIANCE:  # on the floor the bound does not depend on the variance
            pull = pull - (kappa / deviation) * weights * slope
        gradient: NDArray[np.float64] = (pull @ away) / self.hyper.lengthscale
        return self.hyper.mean + float(cross @ self.alpha) + kappa * deviation, gradient

    def kernel(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the kernel between rows `(m, dim)` and those given, `(m, n)`."""
        return matern(squares(rows / self.hyper.lengthscale, self.scaled))

    def whiten(self, kernel: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return chol^-1 kernel^T, `(n, m)`: its columns' squared lengths are the variances explained. Overwrites."""
        white: NDArray[np.float64] = scipy.linalg.solve_triangular(
            self.chol, kernel.T, lower=True, overwrite_b=True, check_finite=False
        )
        return white

    def _moments(self, kernel: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        mean = self.hyper.mean + kernel @ self.alpha
        white = self.whiten(kernel)
        return mean, np.maximum(1.0 - np.einsum("ij,ij->j", white, white), MIN_VARIANCE)


def squares(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return squared distances between scaled rows `(m, dim)` and `(n, dim)`, `(m, n)`; rounding may leave some < 0."""
    square = left @ right.T
    square *= -2.0
    square += np.einsum("ij,ij->i", left, left)[:, None]
    square += np.einsum("ij,ij->i", right, right)
    return square


def matern(square: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the kernel at scaled squared distances of any shape, which are overwritten."""
    root = np.sqrt(np.maximum(square, 0.0, out=square), out=square)
    root *= _ROOT5
    kernel = np.exp(-root)
    root *= root / 3.0 + 1.0
    root += 1.0
    kernel *= root
    return kernel
