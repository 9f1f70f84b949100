"""Hyperparameters of a Gaussian process by maximum a posteriori, with botorch and gpytorch.

Apart from `gp.py`, since these libraries take seconds to load and not every process of a search fits (`aside.py`).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from bbprompt.optimizers.posterior import Hyperparameters

with warnings.catch_warnings():
    # Deprecations inside linear_operator under newer versions of torch.
    warnings.simplefilter("ignore", DeprecationWarning)
    import botorch
    from botorch.exceptions import ModelFittingError
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.constraints import GreaterThan
    from gpytorch.kernels import MaternKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.priors import LogNormalPrior

__all__ = ["fit"]

_PRIOR_NOISE = math.exp(-5.0)  # mode of botorch's noise prior LogNormal(-4, 1)
_MIN_LENGTHSCALE = 2.5e-2

_log = logging.getLogger(__name__)


def fit(rows: NDArray[np.float64], targets: NDArray[np.float64], *, ard: bool, seed: int) -> Hyperparameters:
    """Fit hyperparameters by maximum a posteriori from a fixed start.

    Where targets do not differ, or no attempt of botorch converges (said in the log), those at the mode of
    the priors are returned.

    Args:
        rows: `(n, dim)` in the unit cube.
        targets: `(n,)`, standardised.
        ard: whether each dimension has its own lengthscale.
        seed: for the restarts that botorch makes after a failure.
    """
    dim = rows.shape[1]
    prior = LogNormalPrior(math.sqrt(2.0) + 0.5 * math.log(dim), math.sqrt(3.0))
    mode = Hyperparameters(
        lengthscale=np.full(dim, max(float(prior.mode), _MIN_LENGTHSCALE)), noise=_PRIOR_NOISE, mean=0.0
    )
    if not np.any(targets):
        return mode
    kernel = MaternKernel(
        nu=2.5,
        ard_num_dims=dim if ard else None,
        lengthscale_prior=prior,
        lengthscale_constraint=GreaterThan(_MIN_LENGTHSCALE, transform=None, initial_value=prior.mode),
    )
    with _one_thread(), _quiet_torch(seed), botorch.settings.validate_input_scaling(False):
        model = SingleTaskGP(
            torch.from_numpy(rows),
            torch.from_numpy(targets)[:, None],
            covar_module=kernel,
            outcome_transform=None,
        )
        try:
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        except ModelFittingError:
            _log.warning("Gaussian process: no fit to %d rows converged, priors are used", len(rows))
            return mode
        lengthscale = model.covar_module.lengthscale.detach().numpy().reshape(-1)
        return Hyperparameters(
            lengthscale=np.array(np.broadcast_to(lengthscale, dim), dtype=np.float64),
            noise=float(model.likelihood.noise),
            mean=float(model.mean_module.constant),
        )


@contextmanager
def _quiet_torch(seed: int) -> Iterator[None]:
    """A seeded generator and no warnings inside; everything as before afterwards."""
    state = torch.random.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed % 2**63)
        with warnings.catch_warnings():
            # Attempts that botorch repeats; one that fails for good raises ModelFittingError.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.random.set_rng_state(state)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread inside, as many as before afterwards.

    Small matrices are slower with several threads (100 times where others use the cores), and their number would
    change the last digits.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with _libraries().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
