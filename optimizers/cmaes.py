"""CMA-ES by the `cma` package, made deterministic, silent and safe to replay."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bbprompt.optimizers.checks import checked_count, checked_seed
from bbprompt.optimizers.history import History

with warnings.catch_warnings():
    # cma warns at import where matplotlib is missing; nothing here plots.
    warnings.filterwarnings("ignore", message="Could not import matplotlib", category=UserWarning)
    import cma
    from cma.sigma_adaptation import CMAAdaptSigmaCSA, CMAAdaptSigmaTPA

__all__ = ["CMAES", "FLAT_GENERATIONS"]

FLAT_GENERATIONS = 20
"""A run stops after more than this many generations in a row in which three quarters of the losses tie."""

_SIGMA_RANGE = (1e-20, 1e20)
_TPA_DIM = 300  # as in cma: from here on two-point step-size adaptation is its default
_TPA_POPSIZE = 3  # its two probes, and one sample at least


class _TwoPoint(CMAAdaptSigmaTPA):  # type: ignore[misc]  # cma has no annotations
    """Two-point adaptation for replays and warm starts.

    It compares the losses of the first two rows, which cma placed along the last shift of the mean.
    """

    rows_are_own = True

    def check_consistency(self, es: Any) -> None:
        """Do nothing: cma's self-test draws from the global generator of numpy."""

    def update2(self, es: Any, function_values: Any, **kwargs: Any) -> float:
        """Return the factor for sigma: 1 where the first two rows are not cma's probes."""
        if not self.rows_are_own:
            return 1.0
        return float(super().update2(es, function_values, **kwargs))


class CMAES:
    """Covariance matrix adaptation evolution strategy (Hansen, arXiv:1604.00772).

    One ask is one generation of `popsize` rows, and only whole generations can be told: a last generation
    that the budget cuts short may be evaluated, but must not be told. Rows that were never asked for (a warm
    start) come in whole generations too; cma shortens steps that its distribution would hardly have made, and
    such a generation leaves sigma alone under two-point adaptation.

    Only the order of the losses matters, so +inf is simply the worst, and stopping criteria on loss values
    are switched off: what is flat in one loss unit is not in another, and a flat generation, common with few
    examples, ends nothing. `stop` names what cma finds: ``tolflatfitness`` (more than `FLAT_GENERATIONS` flat
    generations in a row), ``tolx`` and ``tolxstagnation`` (steps below 1e-11 and mean shifts below 1e-9 of
    the first sigma), ``tolfacupx`` (sigma grew a thousandfold), ``tolstagnation``, ``tolconditioncov``,
    ``noeffectaxis``, ``noeffectcoord``. There is no limit on generations: the budget is the caller's.

    The eigendecomposition is refreshed only about every 1 / (10 dim (c_1 + c_mu)) generations, as the
    tutorial advises, which at 300 dimensions and 20 rows means every third.

    Step-size rule: by default that of cma, cumulative path length (CSA) below 300 dimensions and two-point
    adaptation (TPA) from there on. TPA finds a good sigma within a dozen generations where the first one was
    ill-chosen, which CSA in hundreds of dimensions does not; both can be asked for by name.
    """

    def __init__(
        self,
        x0: ArrayLike,
        sigma: float,
        seed: int,
        popsize: int = 20,
        bounds: ArrayLike | None = None,
        step_size: Literal["auto", "csa", "tpa"] = "auto",
    ) -> None:
        """Set up the distribution.

        Args:
            x0: `(dim,)`, dim >= 1, the first mean; inside the bounds.
            sigma: first standard deviation in each coordinate, 1e-20 to 1e20, at most the width of the box.
            seed: integer >= 0.
            popsize: rows a generation, >= 2 (>= 3 with TPA; "auto" takes CSA for 2).
            bounds: `(2, dim)`, lower and upper corner, infinite where open; None for no bounds. Rows are kept
                inside by cma's smooth transformation, never by clipping.
            step_size: rule that adapts sigma.

        Raises:
            ValueError: an argument is out of range.
        """
        mean = np.array(x0, dtype=np.float64)
        if mean.ndim != 1 or len(mean) < 1 or not np.all(np.isfinite(mean)):
            raise ValueError(f"x0 must be finite with shape (dim,) and dim >= 1, not {mean.shape}")
        sigma = float(sigma)
        if not _SIGMA_RANGE[0] <= sigma <= _SIGMA_RANGE[1]:
            raise ValueError(f"sigma must be in [{_SIGMA_RANGE[0]:g}, {_SIGMA_RANGE[1]:g}], not {sigma!r}")
        self._popsize = checked_count("popsize", popsize, 2)
        self._history = History(len(mean))
        self._sampled = np.empty((0, len(mean)))
        self._stop: str | None = None
        self._rng = rng = np.random.default_rng(checked_seed(seed))
        options: dict[str, Any] = {
            # NaN means "leave the global generator alone"; 0 or None would mean the clock.
            "seed": math.nan,
            "randn": lambda count, dim: rng.standard_normal((count, dim)),
            "popsize": self._popsize,
            "AdaptSigma": _step_size_rule(step_size, len(mean), self._popsize),
            "verbose": -9,
            "verb_log": 0,
            "signals_filename": "",
            "maxiter": math.inf,
            "tolfun": 0,
            "tolfunhist": 0,
            "tolflatfitness": FLAT_GENERATIONS,
            "tolx": 1e-11 * sigma,
            "tolxstagnation": [1e-9 * sigma, 20, 0.1],
        }
        if bounds is not None:
            options["bounds"] = _checked_box(bounds, mean, sigma)
            if len(mean) == 1:
                options["maxstd"] = math.inf  # in one dimension cma breaks at the limit that it takes from the bounds
        with warnings.catch_warnings():  # cma adds filters of its own here: take them back
            self._es = cma.CMAEvolutionStrategy(mean, sigma, options)

    def ask(self) -> NDArray[np.float64]:
        """Sample a generation, `(popsize, dim)`; see `Optimizer.ask`."""
        self._history.begin()
        self._sampled = self._sample()
        return self._sampled.copy()

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        """Update the distribution from one whole generation; see `Optimizer.tell`.

        Raises:
            ValueError: as in `Optimizer.tell`, or the number of rows is not `popsize`.
        """
        rows, losses = self._history.check(x, loss)
        if len(rows) != self._popsize:
            raise ValueError(
                f"CMA-ES is told whole generations of {self._popsize} rows, not {len(rows)}: "
                "leave an incomplete last generation untold"
            )
        if not self._history.waiting:
            # cma updates only after sampling. In a replay this repeats the samples that were asked for, so
            # that it recognises the told rows and its generator is where it was.
            self._sampled = self._sample()
        own = np.array_equal(rows, self._sampled)
        if not own:
            # cma would warn, generations later, about its own untold probes and mirrored rows.
            self._es._injected_solutions_archive.clear()
        if isinstance(self._es.adapt_sigma, _TwoPoint):
            self._es.adapt_sigma.rows_are_own = own
        with np.errstate(all="ignore"):  # differences of infinite losses in criteria that are switched off
            self._es.tell(list(rows), losses.tolist())
            reasons = sorted(self._es.stop())
        if isinstance(self._es.adapt_sigma, _TwoPoint) and np.array_equal(self._es.mean, self._es.mean_old):
            # A mean that stood still gives the probes no direction; cma would divide by zero.
            probe = self._rng.standard_normal(len(self._es.mean))
            self._es.pop_injection_directions[:2] = [probe, -probe]
        self._stop = ", ".join(reasons) if reasons else None
        self._history.record(rows, losses)

    @property
    def best(self) -> tuple[NDArray[np.float64], float]:
        """Best told row and its loss; see `Optimizer.best`."""
        return self._history.best

    @property
    def stop(self) -> str | None:
        """The criteria of cma that hold after the last tell, joined by commas, or None."""
        return self._stop

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of the distribution, `(dim,)`, inside the bounds.

        It was not evaluated, but averages the better half of a generation: on noisy or small data it is often
        the better final choice than the best single row.
        """
        mean = self._es.gp.pheno(self._es.mean, into_bounds=self._es.boundary_handler.repair)
        return np.array(mean, dtype=np.float64)

    @property
    def sigma(self) -> float:
        """Overall standard deviation of the distribution."""
        return float(self._es.sigma)

    def _sample(self) -> NDArray[np.float64]:
        with np.errstate(all="ignore"):
            return np.array(self._es.ask(), dtype=np.float64)


def _step_size_rule(name: str, dim: int, popsize: int) -> type:
    if name not in ("auto", "csa", "tpa"):
        raise ValueError(f"step_size must be auto, csa or tpa, not {name!r}")
    if name == "tpa" and popsize < _TPA_POPSIZE:
        raise ValueError(f"popsize must be at least {_TPA_POPSIZE} with step_size tpa, not {popsize}")
    use_tpa = name == "tpa" or (name == "auto" and dim >= _TPA_DIM and popsize >= _TPA_POPSIZE)
    rule: type = _TwoPoint if use_tpa else CMAAdaptSigmaCSA
    return rule


def _checked_box(bounds: ArrayLike, mean: NDArray[np.float64], sigma: float) -> list[list[float]]:
    box = np.array(bounds, dtype=np.float64)
    if box.shape != (2, len(mean)):
        raise ValueError(f"bounds must have shape (2, {len(mean)}) like x0, not {box.shape}")
    low, high = box
    if np.any(np.isnan(box)) or not np.all(low < high):
        raise ValueError("bounds must not be NaN, with each lower bound below its upper bound")
    if np.any(mean < low) or np.any(mean > high):
        raise ValueError("x0 must lie inside the bounds")
    with np.errstate(over="ignore"):
        if sigma > np.min(high - low):
            raise ValueError(f"sigma must be at most the width of the box, not {sigma:g}")
    return [low.tolist(), high.tolist()]
