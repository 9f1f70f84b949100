"""A last stage by linear models: each layer once, from the input up, around what was found so far.

BBT-RGB (Sun et al. 2023, arXiv:2305.08088) ends its derivative-free search so: CMA-ES first, then COBYLA for each layer
in turn while the others stay.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bbprompt.optimizers.protocol import Optimizer
from bbprompt.search.stages import Incumbent, padded
from bbprompt.stage_settings import RefineStageConfig

__all__ = ["RefineStage", "refine_stage"]

Points = NDArray[np.float64]


class RefineStage:
    """One search a layer over offsets from the prompt so far, one layer after the other.

    Args:
        start: Where it begins; it stays the incumbent until a candidate has a lower loss.
        step: First radius of each search.
        calls_per_layer: Candidates before the next layer has its turn.
        fixed: See `PromptSpace.fixed`.
    """

    name = "refine"
    optimizer = "cobyla"

    def __init__(self, start: Incumbent, step: float, calls_per_layer: int, fixed: int = 0) -> None:
        self._best, self._step, self._calls, self._fixed = start, step, calls_per_layer, fixed
        self._layer, self._used = 0, 0
        self._centre = start.point.copy()
        self._search: Optimizer | None = None
        self._asked: Points | None = None

    @property
    def incumbent(self) -> Incumbent:
        """The candidate of the lowest train loss, or the start."""
        return self._best

    @property
    def stop(self) -> str | None:
        """Given once every layer had its turn."""
        return "every layer was visited" if self._layer >= len(self._centre) else None

    def ask(self) -> Points:
        """The next candidate, `(1, L, d)`: the prompt so far with another offset in the layer in turn."""
        if self._search is None:
            self._search = _search(self._centre.shape[1] - self._fixed, self._step)
        self._asked = self._search.ask()
        points = np.repeat(self._centre[None], len(self._asked), axis=0)
        points[:, self._layer] += padded(self._asked, self._fixed)
        return points

    def tell(self, losses: NDArray[np.float64]) -> None:
        """Report the losses of the last ask; goes on to the next layer where this one is done."""
        if self._asked is None or self._search is None:
            raise RuntimeError("tell without ask")
        self._search.tell(self._asked, losses)
        lowest = int(losses.argmin())
        if losses[lowest] < self._best.loss:
            point = self._centre.copy()
            point[self._layer] += padded(self._asked[lowest], self._fixed)
            self._best = Incumbent(point, float(losses[lowest]), self._best.routing)
        self._used += len(losses)
        self._asked = None
        if self._used >= self._calls or self._search.stop is not None:
            self._centre = self._best.point.copy()
            self._layer, self._used, self._search = self._layer + 1, 0, None


def _search(dim: int, step: float) -> Optimizer:
    from bbprompt.optimizers.cobyla import COBYLA

    return COBYLA(np.zeros(dim), step)


def refine_stage(config: RefineStageConfig, start: Incumbent, calls: int, fixed: int = 0) -> RefineStage:
    """The stage; `calls` train calls are shared between the layers where the settings do not say how many each has."""
    each = config.calls_per_layer or max(calls // len(start.point), 1)
    return RefineStage(start, config.step, each, fixed)
