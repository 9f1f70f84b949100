"""Candidates through the encoder: what they share is computed once.

Exact savings: the layers below the first one in which the candidates differ are computed once for all of them and
kept until their prompts change; in that layer queries, keys and values differ at the placeholder rows only; the
last layer is computed only at the rows that are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.deviation import deviate
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.head import Plan
from bbprompt.backends.layout import Layout
from bbprompt.units import Unit

__all__ = ["Lane", "Place", "Prepared", "Runner", "Trunk"]


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
class _Own:
    """Candidates that run together.

    Attributes:
        points: `(m, L, d)`.
        differs: `(L,)` in which layers the candidates of the whole request differ: how a prompt is made must not depend
            on how a request is cut.
        moved: `(m, D, d)`, the points of the D layers in which they differ, where prompts are made.
    """

    points: NDArray[np.float32]
    differs: NDArray[np.bool_]
    moved: Tensor

    def one(self, number: int) -> Self:
        """One of the candidates."""
        only = slice(number, number + 1)
        return type(self)(self.points[only], self.differs, self.moved[only])


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

    def run(
        self,
        place: Place,
        trunk: Trunk,
        points: NDArray[np.float32],
        unit: Unit,
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Run a unit of candidates, all at once.

        Args:
            place: The texts.
            trunk: Their trunk; changed, without effect on any result.
            points: `(n, L, d)`, all candidates of the request: what is shared follows from all of them, so that the
                scores of a unit do not depend on who computes the others.
            unit: Which of them to run.
            finish: What becomes of the last states, `(m, N, R, H)` or `(m, T, H)`.

        Returns:
            What `finish` gave for the m candidates of the unit.
        """
        differs = _differences(points)
        fork = self._first(differs)
        states = self._grow(place, trunk, points[0], fork)
        shared = self._shared(place, trunk, fork, len(points))
        own = self._own(points[unit.first : unit.last], differs)
        return self._branch(place, states, shared, own, fork, finish)

    def run_deviations(
        self,
        place: Place,
        trunk: Trunk,
        points: NDArray[np.float32],
        held: int,
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Run all candidates, all but the first as deviations from it in bfloat16; see `run`.

        Args:
            place: The texts.
            trunk: Their trunk.
            points: `(n, L, d)`.
            held: Tokens whose states are held at once, candidates times texts; but for rounding, a score does not
                depend on it.
            finish: What becomes of the last states.
        """
        differs = _differences(points)
        fork = self._first(differs)
        states = self._grow(place, trunk, points[0], fork)
        shared = self._shared(place, trunk, fork, len(points))
        size = max(held // states.shape[1], 1)
        firsts = range(1, len(points), size)
        # The first candidate leads every piece, so that a score does not depend on how it was cut.
        pieces = [self._own(np.concatenate((points[:1], points[i : i + size])), differs) for i in firsts]
        done = [self._deviate(place, states, shared, piece, fork, finish) for piece in pieces]
        return torch.cat([done[0], *(piece[1:] for piece in done[1:])])

    def fork(self, points: NDArray[np.float32]) -> int:
        """The first layer in which candidates differ, or the last."""
        return self._first(_differences(points))

    def _own(self, points: NDArray[np.float32], differs: NDArray[np.bool_]) -> _Own:
        """Move all in which candidates differ at once; a GPU is not waited for."""
        moved, device = torch.from_numpy(points[:, differs]), self._projection.device
        if device.type == "cuda":
            moved = moved.pin_memory()
        return _Own(points, differs, moved.to(device, non_blocking=True))

    def _first(self, differs: NDArray[np.bool_]) -> int:
        return min(int(differs.argmax()) if differs.any() else len(differs), len(self.encoder.layers) - 1)

    def _grow(self, place: Place, trunk: Trunk, point: NDArray[np.float32], fork: int) -> Tensor:
        """States `(1, T, H)` entering layer `fork` of a candidate.

        Computed from the deepest kept layer below which the prompts are the same; always for one candidate
        alone, so that a reply does not depend on what was scored before.
        """
        reach = 0
        if trunk.points is not None:
            while reach < len(trunk.states) - 1 and reach < fork and _same(trunk.points, point, reach):
                reach += 1
        if reach < fork:
            trunk.shared = None
        del trunk.states[reach + 1 :]
        trunk.points = point.copy()
        alone = self._own(point[None], np.zeros(len(point), dtype=np.bool_))
        for layer in range(reach, fork):
            states = self._add(place, trunk.states[layer].clone(), alone, layer)
            trunk.states.append(self.encoder.layer(layer, states, place.layout))
        return trunk.states[fork]

    def _shared(self, place: Place, trunk: Trunk, fork: int, count: int) -> Tensor | None:
        """The projections of layer `fork` without its prompts `(1, T, ...)`; None for one candidate."""
        if count == 1 or fork >= len(self._projection):
            return None
        if trunk.shared is None or trunk.shared[0] != fork:
            trunk.shared = (fork, self.encoder.project(fork, trunk.states[fork], self._keys_only(place, fork)))
        return trunk.shared[1]

    def _keys_only(self, place: Place, layer: int) -> bool:
        return layer == len(self.encoder.layers) - 1 and place.read is not None

    def _branch(
        self,
        place: Place,
        trunk: Tensor,
        shared: Tensor | None,
        own: _Own,
        fork: int,
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Candidates that share everything below layer `fork`."""
        states = _copies(trunk, len(own.points))
        last = len(self.encoder.layers) - 1
        for layer in range(fork, last + 1):
            projected = self._projected(place, shared, own, layer) if layer == fork else None
            states = self._add(place, states, own, layer)
            states = self.encoder.layer(layer, states, place.layout, place.read if layer == last else None, projected)
        return finish(states)

    def _deviate(
        self,
        place: Place,
        trunk: Tensor,
        shared: Tensor | None,
        own: _Own,
        fork: int,
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The same with all but the first candidate as deviations from it; the last layer is float32 throughout."""
        if self.rough is None:
            raise ValueError("deviations need a bfloat16 encoder")
        states = _copies(trunk, len(own.points))
        last = len(self.encoder.layers) - 1
        for layer in range(fork, last):
            projected = self._projected(place, shared, own, layer) if layer == fork else None
            states = self._add(place, states, own, layer)
            states = deviate(self.encoder, self.rough, layer, states, place.layout, projected)
        done = []
        for n in range(len(own.points)):
            point = own.one(n)
            projected = self._projected(place, shared, point, last) if last == fork else None
            ends = self._add(place, states[n : n + 1], point, last)
            done.append(finish(self.encoder.layer(last, ends, place.layout, place.read, projected)))
        return torch.cat(done)

    def _prompts(self, own: _Own, layer: int) -> Tensor:
        """Prompts u A of a layer, `(m, P, H)`; `(1, P, H)` where all candidates have the same, which is kept."""
        if own.differs[layer]:
            return self._made_of(own.moved[:, int(own.differs[:layer].sum())], layer)
        point, made = own.points[0, layer], self._made.get(layer)
        if made is None or not np.array_equal(made[0], point):
            moved = torch.from_numpy(point[None]).to(self._projection.device)
            made = self._made[layer] = (point.copy(), self._made_of(moved, layer))
        return made[1]

    def _made_of(self, points: Tensor, layer: int) -> Tensor:
        prompts = points @ self._projection[layer]
        return prompts.view(len(points), -1, self.encoder.hidden).to(self.encoder.dtype)

    def _projected(self, place: Place, shared: Tensor | None, own: _Own, layer: int) -> Tensor | None:
        """Projections of the layer for each candidate: the shared ones, changed at the placeholder rows."""
        if shared is None:
            return None
        gain = self.encoder.shift(layer, self._prompts(own, layer), self._keys_only(place, layer))
        return _add(_copies(shared, len(own.points)), place, gain)

    def _add(self, place: Place, states: Tensor, own: _Own, layer: int) -> Tensor:
        """Add the layer's prompts to the placeholder rows of every text, where the layer has any; in place."""
        return states if layer >= len(self._projection) else _add(states, place, self._prompts(own, layer))


def _copies(rows: Tensor, count: int) -> Tensor:
    """`(1, T, C)` as many times, to be written to."""
    return rows.expand(count, -1, -1).clone(memory_format=torch.contiguous_format)


def _add(rows: Tensor, place: Place, gain: Tensor) -> Tensor:
    """Add `gain`, `(n, P, C)` or `(1, P, C)`, to `rows` `(n, T, C)` at the placeholders of every text, in place."""
    return rows.index_add_(1, place.slots, gain[:, None].expand(len(rows), place.texts, -1, -1).flatten(1, 2))


def _same(one: NDArray[np.float32], other: NDArray[np.float32], layer: int) -> bool:
    return layer >= len(one) or bool(np.array_equal(one[layer], other[layer]))


def _differences(points: NDArray[np.float32]) -> NDArray[np.bool_]:
    """`(L,)` in which layers the candidates differ."""
    differs: NDArray[np.bool_] = (points != points[:1]).any(axis=(0, 2))
    return differs
