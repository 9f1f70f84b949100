"""The two stages: what is searched, and how a row of an optimizer becomes an intrinsic point.

A stage has the shape of an optimizer, one level up: `ask` gives candidate points (n, L, d), `tell` takes
their losses, `incumbent` is the point it would return now. Stages know optimizers and prompt spaces, not
models or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from bbprompt.optimizers.protocol import Optimizer
from bbprompt.prompts import PromptSpace
from bbprompt.router import GateRule
from bbprompt.stage_settings import PromptStageConfig, RouterStageConfig

if TYPE_CHECKING:
    from bbprompt.optimizers.aside import Aside

__all__ = [
    "Incumbent",
    "LayerStage",
    "Routing",
    "RowStage",
    "Stage",
    "padded",
    "prompt_stage",
    "router_helper",
    "router_stage",
]

Points = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Routing:
    """How modules were mixed into a point: the router `(L, K)` and the weights `(L, K)` that it stands for."""

    router: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Incumbent:
    """The best of a stage: its point `(L, d)`, train loss and the routing it came from, if any."""

    point: Points
    loss: float
    routing: Routing | None = None


class Stage(Protocol):
    """A search over points."""

    @property
    def name(self) -> str:
        """Either "router" or "prompt"."""

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


class RowStage:
    """A search whose rows each stand for one whole point.

    Args:
        name: "router" or "prompt".
        optimizer: What drives it, in words.
        search: The optimizer over rows.
        decode: Rows `(n, dim)` to points `(n, L, d)`.
        start: The point to beat; it stays the incumbent until a candidate has a lower loss.
        routed: What a row mixes, where rows are routers, so that the incumbent says what it came from.
    """

    def __init__(
        self,
        name: str,
        optimizer: str,
        search: Optimizer,
        decode: Callable[[NDArray[np.float64]], Points],
        start: Incumbent,
        routed: Callable[[NDArray[np.float64]], Routing] | None = None,
    ) -> None:
        self.name, self.optimizer = name, optimizer
        self._search, self._decode, self._best, self._routed = search, decode, start, routed
        self._asked: tuple[NDArray[np.float64], Points] | None = None

    @property
    def incumbent(self) -> Incumbent:
        """The candidate of the lowest train loss, or the start if none beats it."""
        return self._best

    @property
    def stop(self) -> str | None:
        """The optimizer's reason to stop."""
        return self._search.stop

    def ask(self) -> Points:
        """Candidates `(n, L, d)`."""
        rows = self._search.ask()
        self._asked = rows, self._decode(rows)
        return self._asked[1]

    def tell(self, losses: NDArray[np.float64]) -> None:
        """Report the losses of the last ask."""
        if self._asked is None:
            raise RuntimeError("tell without ask")
        rows, points = self._asked
        self._search.tell(rows, losses)
        lowest = int(losses.argmin())
        if losses[lowest] < self._best.loss:
            routing = self._best.routing if self._routed is None else self._routed(rows[lowest])
            # The very point that was scored: made alone it may differ in the last bit.
            self._best = Incumbent(points[lowest].copy(), float(losses[lowest]), routing)
        self._asked = None


class LayerStage:
    """Stage II by divide and conquer (BBTv2; MP2, section 3.4).

    One search a layer, visited in turn from the input up. While a layer is visited all others keep their
    current prompts, so its candidates share every state below it.

    Args:
        start: The routed point.
        searches: One optimizer over offsets `(d,)` a layer.
        keep: See `PromptStageConfig.keep`.
        fixed: See `PromptSpace.fixed`.
    """

    name = "prompt"
    optimizer = "cmaes"

    def __init__(self, start: Incumbent, searches: list[Optimizer], keep: str, fixed: int = 0) -> None:
        self._start, self._searches, self._keep, self._fixed = start, searches, keep, fixed
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
        points[:, self._layer] = self._start.point[self._layer] + padded(self._asked, self._fixed)
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
            self._offsets[self._layer] = padded(offset, self._fixed)
            self._current = Incumbent(self._start.point + self._offsets, loss, self._start.routing)
        self._visit += 1
        self._asked = None

    @property
    def _layer(self) -> int:
        return self._visit % len(self._searches)


def router_helper(config: RouterStageConfig | None) -> Aside | None:
    """The process that will propose beside a stage I that is ahead, started: it loads for a while; None for others."""
    if config is None or config.optimizer != "bo" or not config.ahead:
        return None
    from bbprompt.optimizers.aside import Aside

    helper = Aside()
    helper.start()
    return helper


def router_stage(
    config: RouterStageConfig,
    space: PromptSpace,
    rule: GateRule,
    start: Incumbent,
    seed: int,
    helper: Aside | None = None,
) -> RowStage:
    """Stage I of a method; `helper` as `router_helper` started it, or None for one of its own."""
    layers, modules = space.router_shape
    dim = layers * modules

    def stage(search: Optimizer, label: str) -> RowStage:
        def decode(rows: NDArray[np.float64]) -> Points:
            return space.mix(rows.reshape(-1, layers, modules), rule)

        def routed(row: NDArray[np.float64]) -> Routing:
            router = row.reshape(layers, modules)
            return Routing(router, space.weights(router, rule))

        return RowStage("router", label, search, decode, start, routed)

    if config.optimizer == "enumerate":
        from bbprompt.optimizers.enumerate import Enumeration

        return stage(Enumeration(dim, config.batch), "enumerate")
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
        ahead=config.ahead,
        aside=helper,
    )
    return stage(search, "bo-ucb")


def prompt_stage(config: PromptStageConfig, start: Incumbent, seed: int, fixed: int = 0) -> Stage:
    """Stage II of a method, from the routed prompt; the last `fixed` entries of each layer stay."""
    from bbprompt.optimizers.cmaes import CMAES

    layers, dim = len(start.point), start.point.shape[1] - fixed
    bounds = None if config.bound is None else np.array([[-config.bound], [config.bound]])

    def search(size: int, sigma: float, salt: int) -> Optimizer:
        box = None if bounds is None else np.repeat(bounds, size, axis=1)
        return CMAES(np.zeros(size), sigma, seed + salt, popsize=config.popsize, bounds=box)

    if config.layout == "joint":

        def decode(rows: NDArray[np.float64]) -> Points:
            return start.point + padded(rows.reshape(-1, layers, dim), fixed)

        return RowStage("prompt", "cmaes", search(layers * dim, config.sigma_first, 0), decode, start)
    sigmas = [config.sigma_first] + [config.sigma] * (layers - 1)
    # Seeds far apart, so that no two layers and no two neighbouring runs share a generator.
    searches = [search(dim, sigma, 1_000_003 * i) for i, sigma in enumerate(sigmas)]
    return LayerStage(start, searches, config.keep, fixed)


def padded(offsets: Points, fixed: int) -> Points:
    """Offsets `(..., d - fixed)` of what a search moves as offsets `(..., d)` of a point."""
    return np.pad(offsets, [(0, 0)] * (offsets.ndim - 1) + [(0, fixed)]) if fixed else offsets


def _upstream_rows(space: PromptSpace, binary: bool) -> NDArray[np.float64] | None:
    """Upstream routers as rows of the search space, without repeats, in task order."""
    if not len(space.routers):
        return None
    rows = space.routers.reshape(len(space.routers), -1)
    rows = (rows > 0).astype(np.float64) if binary else rows.clip(-5.0, 5.0)
    distinct = list(dict.fromkeys(map(tuple, rows.tolist())))
    kept = [row for row in distinct if not binary or any(row)]
    return np.array(kept) if kept else None
