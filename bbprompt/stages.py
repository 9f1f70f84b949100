"""The two stages: what is searched, and how a row of an optimizer becomes an intrinsic point.

A stage has the shape of an optimizer, one level up: `ask` gives candidate points (n, L, d), `tell` takes their losses,
`incumbent` is the point it would return now. Stages know optimizers and prompt spaces, not models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bbprompt.config import MethodConfig, PromptStageConfig, RouterStageConfig
from bbprompt.errors import UsageError
from bbprompt.optimizers.protocol import Optimizer
from bbprompt.prompts import PromptSpace
from bbprompt.router import GateRule

__all__ = ["Incumbent", "JointStage", "LayerStage", "RouterStage", "Stage", "prompt_stage", "router_stage"]

Points = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Incumbent:
    """The best a stage knows: its point `(L, d)`, its train loss, and the router `(L, K)` it came from, if any."""

    point: Points
    loss: float
    router: NDArray[np.float64] | None = None


class Stage(Protocol):
    """A search over points."""

    @property
    def name(self) -> str:
        """ "router" or "prompt"."""

    @property
    def optimizer(self) -> str:
        """What drives it, for the result."""

    @property
    def incumbent(self) -> Incumbent:
        """The best so far."""

    @property
    def stop(self) -> str | None:
        """Why going on is pointless, or None."""

    def ask(self) -> Points:
        """Candidates to score next, `(n, L, d)`."""

    def tell(self, losses: NDArray[np.float64]) -> None:
        """Report the train losses `(n,)` of the candidates asked for last."""


class RouterStage:
    """Stage I: search over routers (MP2, section 3.4).

    Args:
        space: Modules and upstream routers.
        rule: Gate rule.
        optimizer: Over flattened routers `(n, L * K)`.
        start: The untuned point with its loss, which the search has to beat.
        label: Name of the optimizer.
    """

    name = "router"

    def __init__(self, space: PromptSpace, rule: GateRule, optimizer: Optimizer, start: Incumbent, label: str) -> None:
        self._space, self._rule, self._search = space, rule, optimizer
        self._best = start
        self._asked: NDArray[np.float64] | None = None
        self.optimizer = label

    @property
    def incumbent(self) -> Incumbent:
        """The router of the lowest train loss, or the start if none beats it."""
        return self._best

    @property
    def stop(self) -> str | None:
        """The optimizer's reason to stop."""
        return self._search.stop

    def ask(self) -> Points:
        """Candidates `(n, L, d)`."""
        self._asked = self._search.ask()
        return self._space.mix(self._routers(self._asked), self._rule)

    def tell(self, losses: NDArray[np.float64]) -> None:
        """Report the losses of the last ask."""
        if self._asked is None:
            raise RuntimeError("tell without ask")
        self._search.tell(self._asked, losses)
        lowest = int(losses.argmin())
        if losses[lowest] < self._best.loss:
            router = self._routers(self._asked[lowest])
            self._best = Incumbent(self._space.mix(router, self._rule), float(losses[lowest]), router)
        self._asked = None

    def _routers(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return rows.reshape(*rows.shape[:-1], *self._space.router_shape)


class JointStage:
    """Stage II over all prompted layers as one vector: an offset from the start, mean 0 (MP2, section 3.4)."""

    name = "prompt"
    optimizer = "cmaes"

    def __init__(self, start: Incumbent, search: Optimizer) -> None:
        self._start, self._search, self._best = start, search, start
        self._asked: NDArray[np.float64] | None = None

    @property
    def incumbent(self) -> Incumbent:
        """The best candidate so far, or the start."""
        return self._best

    @property
    def stop(self) -> str | None:
        """The optimizer's reason to stop."""
        return self._search.stop

    def ask(self) -> Points:
        """A generation `(n, L, d)`."""
        self._asked = self._search.ask()
        return self._start.point + self._asked.reshape(-1, *self._start.point.shape)

    def tell(self, losses: NDArray[np.float64]) -> None:
        """Report the losses of the last ask."""
        if self._asked is None:
            raise RuntimeError("tell without ask")
        self._search.tell(self._asked, losses)
        lowest = int(losses.argmin())
        if losses[lowest] < self._best.loss:
            offset = self._asked[lowest].reshape(self._start.point.shape)
            self._best = Incumbent(self._start.point + offset, float(losses[lowest]), self._start.router)
        self._asked = None


class LayerStage:
    """Stage II by divide and conquer: one search a layer, visited in turn from the input up (BBTv2; MP2, section 3.4).

    While a layer is visited all others keep their current prompts, so its candidates share every state below it.

    Args:
        start: The routed point.
        searches: One optimizer over offsets `(d,)` a layer.
        keep: See `PromptStageConfig.keep`.
    """

    name = "prompt"
    optimizer = "cmaes"

    def __init__(self, start: Incumbent, searches: list[Optimizer], keep: str) -> None:
        self._start, self._searches, self._keep = start, searches, keep
        self._offsets = np.zeros_like(start.point)
        self._current = start
        self._visit = 0
        self._asked: NDArray[np.float64] | None = None

    @property
    def incumbent(self) -> Incumbent:
        """The current prompts of all layers."""
        return self._current

    @property
    def stop(self) -> str | None:
        """Given when every layer's search has stopped."""
        reasons = [search.stop for search in self._searches]
        return None if any(reason is None for reason in reasons) else reasons[0]

    def ask(self) -> Points:
        """A generation of the layer in turn, `(n, L, d)`; the other layers hold their current prompts."""
        while self._searches[self._layer].stop is not None:
            if self.stop is not None:
                raise RuntimeError(f"every layer has stopped: {self.stop}")
            self._visit += 1
        self._asked = self._searches[self._layer].ask()
        points = np.repeat((self._start.point + self._offsets)[None], len(self._asked), axis=0)
        points[:, self._layer] = self._start.point[self._layer] + self._asked
        return points

    def tell(self, losses: NDArray[np.float64]) -> None:
        """Report the losses of the last ask and go on to the next layer."""
        if self._asked is None:
            raise RuntimeError("tell without ask")
        search = self._searches[self._layer]
        search.tell(self._asked, losses)
        lowest = int(losses.argmin())
        if self._keep == "all-time":
            # The released rule: the value was measured when the other layers were different.
            offset, loss = search.best
        else:
            offset, loss = self._asked[lowest], float(losses[lowest])
        if self._keep == "all-time" or loss < self._current.loss:
            self._offsets[self._layer] = offset
            self._current = Incumbent(self._start.point + self._offsets, loss, self._start.router)
        self._visit += 1
        self._asked = None

    @property
    def _layer(self) -> int:
        return self._visit % len(self._searches)


def router_stage(
    config: RouterStageConfig, space: PromptSpace, rule: GateRule, start: Incumbent, seed: int
) -> RouterStage:
    """Stage I of a method.

    Raises:
        UsageError: Enumeration of a deep router, which has too many entries.
    """
    layers, modules = space.router_shape
    dim = layers * modules
    if config.optimizer == "enumerate":
        if dim > 16:
            raise UsageError(f"router.optimizer 'enumerate' takes at most 16 router entries, these prompts have {dim}")
        from bbprompt.optimizers.enumerate import Enumeration

        return RouterStage(space, rule, Enumeration(dim, config.batch), start, "enumerate")
    from bbprompt.optimizers.gp import GPUCB

    binary = config.space == "binary"
    bounds = np.array([[0.0] * dim, [1.0] * dim] if binary else [[-5.0] * dim, [5.0] * dim])
    initial = _upstream_rows(space, binary) if config.warm_start else None
    search = GPUCB(
        bounds,
        seed,
        kappa=config.kappa,
        batch=config.batch,
        initial=initial,
        n_random=config.random + (0 if initial is None else len(initial)),
        binary=binary,
    )
    return RouterStage(space, rule, search, start, "bo-ucb")


def prompt_stage(config: PromptStageConfig, start: Incumbent, seed: int) -> Stage:
    """Stage II of a method, from the routed prompt."""
    from bbprompt.optimizers.cmaes import CMAES

    layers, dim = start.point.shape
    bounds = None if config.bound is None else np.array([[-config.bound], [config.bound]])

    def search(size: int, sigma: float, salt: int) -> Optimizer:
        box = None if bounds is None else np.repeat(bounds, size, axis=1)
        return CMAES(np.zeros(size), sigma, seed + salt, popsize=config.popsize, bounds=box)

    if config.layout == "joint":
        return JointStage(start, search(layers * dim, config.sigma_first, 0))
    sigmas = [config.sigma_first] + [config.sigma] * (layers - 1)
    # Seeds far apart, so that no two layers and no two neighbouring runs share a generator.
    return LayerStage(start, [search(dim, sigma, 1_000_003 * i) for i, sigma in enumerate(sigmas)], config.keep)


def _upstream_rows(space: PromptSpace, binary: bool) -> NDArray[np.float64] | None:
    """Upstream routers as rows of the search space, without repeats, in task order."""
    if not len(space.routers):
        return None
    rows = space.routers.reshape(len(space.routers), -1)
    rows = (rows > 0).astype(np.float64) if binary else rows.clip(-5.0, 5.0)
    distinct = list(dict.fromkeys(map(tuple, rows.tolist())))
    kept = [row for row in distinct if not binary or any(row)]
    return np.array(kept) if kept else None


def stages_of(method: MethodConfig) -> tuple[str, ...]:
    """Names of the stages a method has, in order."""
    return tuple(name for name, stage in (("router", method.router), ("prompt", method.prompt)) if stage)
