"""Candidates through the encoder: what they share is computed once.

Exact savings: the layers below the first one in which the candidates differ are computed once for all of them and
kept until their prompts change; in that layer queries, keys and values differ at the placeholder rows only; the
last layer is computed only at the rows that are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.deviation import deviate
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.head import Plan
from bbprompt.backends.layout import Layout
from bbprompt.units import Unit

__all__ = ["Lane", "Place", "Population", "Prepared", "Runner", "Trunk"]

#: Candidates of a request whose prompts are made at once, which is hardly dearer than making one's: the projection is
#: read from memory once for all of them; and bytes that they may take while it runs.
_TOGETHER, _MADE = 64, 1 << 26


@dataclass(slots=True)
class Trunk:
    """What candidates share.

    Attributes:
        states: States entering layers 0, 1, … of one candidate; a run needs the first. None where nothing is kept.
        points: The points they were computed with.
        shared: A layer and its projections of the states that enter it, without prompts.
    """

    states: list[Tensor]
    points: NDArray[np.float32] | None = None
    shared: tuple[int, Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(state.nbytes for state in self.states) + (self.shared[1].nbytes if self.shared else 0)

    def forget(self) -> None:
        """Let go of all of it."""
        self.states.clear()
        self.points = self.shared = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where prompts go and what is read in some packed texts.

    Attributes:
        layout: Where the tokens lie.
        slots: Packed rows that the prompt is added to (placeholders, or rows of its own), text by text.
        read: `(N, R)` packed rows that are read; None for all.
    """

    layout: Layout
    slots: Tensor
    read: Tensor | None

    @property
    def texts(self) -> int:
        """How many texts these are."""
        return len(self.layout.order)


@dataclass(frozen=True, slots=True)
class Lane:
    """What one precision needs of a chunk.

    Attributes:
        place: Where tokens and prompts lie and what is read; the rows are the same in every lane.
        trunk: States shared by candidates.
    """

    place: Place
    trunk: Trunk


@dataclass(frozen=True, slots=True)
class Prepared:
    """Some sequences of a batch, ready to run.

    Attributes:
        ids: Their tokens.
        plan: How the head reads them.
        main: In the oracle's precision.
        rough: In bfloat16 where that is another and is used.
    """

    ids: tuple[tuple[int, ...], ...]
    plan: Plan
    main: Lane
    rough: Lane | None

    @property
    def tokens(self) -> int:
        """How many there are in all sequences."""
        return sum(map(len, self.ids))

    @property
    def trunks(self) -> list[Trunk]:
        """Of each lane."""
        return [lane.trunk for lane in (self.main, self.rough) if lane is not None]


@dataclass(frozen=True, slots=True)
class Population:
    """The candidates of a request, and what follows from all of them; see `Runner.population`.

    Attributes:
        points: `(n, L, d)`.
        differs: `(L,)` in which layers they differ: how a prompt is made must not depend on how a request is cut.
        fork: The first layer in which they differ, or the last.
        moved: `(n, D, d)`, the points of the D layers in which they differ, where prompts are made.
        common: `(L, d)`, those of the first candidate, there too: in the other layers they are everyone's.
        made: Layer -> prompts `(n, P, H)` of all of them, where those of all layers take little memory.
    """

    points: NDArray[np.float32]
    differs: NDArray[np.bool_]
    fork: int
    moved: Tensor
    common: Tensor
    made: dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class _Own:
    """Candidates that run together.

    Attributes:
        of: The population that they are of.
        first: Number of the first one.
        last: Number behind the last one.
        led: The first candidate of the population goes before them.
    """

    of: Population
    first: int
    last: int
    led: bool = False

    @property
    def count(self) -> int:
        """How many they are."""
        return self.last - self.first + self.led

    def some(self, rows: Tensor) -> Tensor:
        """Theirs of rows of all candidates; by slices, for a list of numbers would have a GPU be waited for."""
        own = rows[self.first : self.last]
        return torch.cat([rows[:1], own]) if self.led else own


class Runner:
    """Runs candidates through a frozen encoder.

    Args:
        encoder: The encoder.
        projection: A, `(L, d, P * H)`: prompts are u A, added before the first L layers.
        rough: The same encoder in bfloat16, for `run_deviations`; None without.
    """

    def __init__(self, encoder: Encoder, projection: Tensor, rough: Encoder | None = None) -> None:
        self.encoder, self.rough, self._projection = encoder, rough, projection
        # Of each layer the point that candidates shared last, and its prompt.
        self._made: dict[int, tuple[NDArray[np.float32], Tensor]] = {}

    def fork(self, points: NDArray[np.float32]) -> int:
        """The first layer in which candidates `(n, L, d)` differ, or the last."""
        return self._first(_differences(points))

    def _first(self, differs: NDArray[np.bool_]) -> int:
        return min(int(differs.argmax()) if differs.any() else len(differs), len(self.encoder.layers) - 1)

    def population(self, points: NDArray[np.float32]) -> Population:
        """See in what candidates `(n, L, d)` differ, and move that to where prompts are made; no GPU is waited for."""
        differs = _differences(points)
        moved, common = (self._moved(part) for part in (points[:, differs], points[0]))
        return Population(points, differs, self._first(differs), moved, common, {})

    def _moved(self, points: NDArray[np.float32]) -> Tensor:
        host, device = torch.from_numpy(points), self._projection.device
        return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)

    def run(
        self,
        place: Place,
        trunk: Trunk,
        population: Population,
        unit: Unit,
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Run a unit of candidates, all at once.

        Args:
            place: The texts.
            trunk: Their trunk; changed, without effect on any result.
            population: All candidates of the request: what is shared follows from all of them, so that the scores of a
                unit do not depend on who computes the others.
            unit: Which of them to run.
            finish: What becomes of the last states, `(m, N, R, H)` or `(m, T, H)`.

        Returns:
            What `finish` gave for the m candidates of the unit.
        """
        states = self._grow(place, trunk, population)
        shared = self._shared(place, trunk, population)
        return self._branch(place, states, shared, _Own(population, unit.first, unit.last), finish)

    def run_deviations(
        self,
        place: Place,
        trunk: Trunk,
        population: Population,
        held: int,
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Run all candidates, all but the first as deviations from it in bfloat16; see `run`.

        Args:
            place: The texts.
            trunk: Their trunk.
            population: All candidates of the request.
            held: Tokens whose states are held at once, candidates times texts; but for rounding, a score does not
                depend on it.
            finish: What becomes of the last states.
        """
        states = self._grow(place, trunk, population)
        shared = self._shared(place, trunk, population)
        size, last = max(held // states.shape[1], 1), len(population.points)
        # The first candidate leads every piece, so that a score does not depend on how it was cut.
        pieces = [_Own(population, i, min(i + size, last), led=True) for i in range(1, last, size)]
        done = [self._deviate(place, states, shared, piece, finish) for piece in pieces]
        return torch.cat([done[0], *(piece[1:] for piece in done[1:])])

    def _grow(self, place: Place, trunk: Trunk, population: Population) -> Tensor:
        """States `(1, T, H)` entering the layer where the candidates part.

        Computed from the deepest kept layer below which the prompts are the same; always for one candidate
        alone, so that a reply does not depend on what was scored before.
        """
        reach, fork, point = 0, population.fork, population.points[0]
        if trunk.points is not None:
            while reach < len(trunk.states) - 1 and reach < fork and _same(trunk.points, point, reach):
                reach += 1
        if reach < fork:
            trunk.shared = None
        del trunk.states[reach + 1 :]
        trunk.points = point.copy()
        for layer in range(reach, fork):
            prompts = None if layer >= len(self._projection) else self._common(population, layer)
            states = _added(trunk.states[layer].clone(), place, prompts)
            trunk.states.append(self.encoder.layer(layer, states, place.layout))
        return trunk.states[fork]

    def _shared(self, place: Place, trunk: Trunk, population: Population) -> Tensor | None:
        """The projections of the layer where they part, without its prompts `(1, T, ...)`; None for one candidate."""
        fork = population.fork
        if len(population.points) == 1 or fork >= len(self._projection):
            return None
        if trunk.shared is None or trunk.shared[0] != fork:
            trunk.shared = (fork, self.encoder.project(fork, trunk.states[fork], self._keys_only(place, fork)))
        return trunk.shared[1]

    def _keys_only(self, place: Place, layer: int) -> bool:
        return layer == len(self.encoder.layers) - 1 and place.read is not None

    def _branch(
        self, place: Place, trunk: Tensor, shared: Tensor | None, own: _Own, finish: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Candidates that share everything below the layer where they part."""
        states = _copies(trunk, own.count)
        fork, last = own.of.fork, len(self.encoder.layers) - 1
        for layer in range(fork, last + 1):
            prompts = self._prompts(own, layer)
            projected = self._projected(place, shared, prompts, own.count, layer) if layer == fork else None
            states = _added(states, place, prompts)
            states = self.encoder.layer(layer, states, place.layout, place.read if layer == last else None, projected)
        return finish(states)

    def _deviate(
        self, place: Place, trunk: Tensor, shared: Tensor | None, own: _Own, finish: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The same with all but the first candidate as deviations from it.

        A last layer that is read at a few rows is float32 throughout: so little is left of it that its rounding would
        cost more than it saves.
        """
        if self.rough is None:
            raise ValueError("deviations need a bfloat16 encoder")
        states = _copies(trunk, own.count)
        fork, last = own.of.fork, len(self.encoder.layers) - 1
        for layer in range(fork, last + (place.read is None)):
            prompts = self._prompts(own, layer)
            projected = self._projected(place, shared, prompts, own.count, layer) if layer == fork else None
            states = deviate(self.encoder, self.rough, layer, _added(states, place, prompts), place.layout, projected)
        if place.read is None:
            return finish(states)
        prompts, done = self._prompts(own, last), []
        for n in range(own.count):
            only = prompts if prompts is None or len(prompts) == 1 else prompts[n : n + 1]
            projected = self._projected(place, shared, only, 1, last) if last == fork else None
            ends = _added(states[n : n + 1], place, only)
            done.append(finish(self.encoder.layer(last, ends, place.layout, place.read, projected)))
        return torch.cat(done)

    def _prompts(self, own: _Own, layer: int) -> Tensor | None:
        """Prompts u A of a layer, `(m, P, H)`; `(1, P, H)` where all candidates have the same; None where it has none.

        Those in which the candidates of a request differ are made in one product for all of them, and kept while it
        runs, unless they are many: then for those that run together, for who computes a few must not make them all.
        """
        if layer >= len(self._projection):
            return None
        of = own.of
        if not of.differs[layer]:
            return self._common(of, layer)
        count, layers, _ = of.moved.shape
        moved = of.moved[:, int(of.differs[:layer].sum())]
        size = count * layers * self._projection.shape[2] * self.encoder.dtype.itemsize
        if count > _TOGETHER or size > _MADE:
            return self._made_of(own.some(moved), layer)
        if layer not in of.made:
            of.made[layer] = self._made_of(moved, layer)
        return own.some(of.made[layer])

    def _common(self, population: Population, layer: int) -> Tensor:
        """The prompt `(1, P, H)` of the first candidate in a layer, which is kept."""
        made, point = self._made.get(layer), population.points[0, layer]
        if made is None or not np.array_equal(made[0], point):
            made = self._made[layer] = (point.copy(), self._made_of(population.common[layer][None], layer))
        return made[1]

    def _made_of(self, points: Tensor, layer: int) -> Tensor:
        prompts = points @ self._projection[layer]
        return prompts.view(len(points), -1, self.encoder.hidden).to(self.encoder.dtype)

    def _projected(
        self, place: Place, shared: Tensor | None, prompts: Tensor | None, count: int, layer: int
    ) -> Tensor | None:
        """Projections of the layer for each candidate: the shared ones, changed at the placeholder rows."""
        if shared is None or prompts is None:
            return None
        gain = self.encoder.shift(layer, prompts, self._keys_only(place, layer))
        return _added(_copies(shared, count), place, gain)


def _copies(rows: Tensor, count: int) -> Tensor:
    """`(1, T, C)` as many times, to be written to."""
    return rows.expand(count, -1, -1).clone(memory_format=torch.contiguous_format)


def _added(rows: Tensor, place: Place, gain: Tensor | None) -> Tensor:
    """Add `gain`, `(n, P, C)` or `(1, P, C)`, to `rows` `(n, T, C)` at the placeholders of every text, in place."""
    if gain is None:
        return rows
    return rows.index_add_(1, place.slots, gain[:, None].expand(len(rows), place.texts, -1, -1).flatten(1, 2))


def _same(one: NDArray[np.float32], other: NDArray[np.float32], layer: int) -> bool:
    return layer >= len(one) or bool(np.array_equal(one[layer], other[layer]))


def _differences(points: NDArray[np.float32]) -> NDArray[np.bool_]:
    """`(L,)` in which layers the candidates differ."""
    differs: NDArray[np.bool_] = (points != points[:1]).any(axis=(0, 2))
    return differs
