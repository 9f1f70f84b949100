"""What candidates of a stock model share: the layers below the first one in which their prompts differ.

How a model runs from there on is the business of `backends.body`. The encoder has a form of its own, in
`backends.population`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

__all__ = ["Given", "StockTrunk"]


@dataclass(frozen=True, slots=True)
class Given:
    """What a block gave for some texts under one candidate.

    Attributes:
        states: `(N, S, H)`.
        more: What it gave beside them, as a tuple, and holds for all texts, such as T5's position bias
            `(1, heads, S, S)`; None in the place of anything else. None for a block that gives states alone.
    """

    states: Tensor
    more: tuple[Tensor | None, ...] | None

    @classmethod
    def of(cls, out: Any) -> Self:
        """From what a block returned."""
        if isinstance(out, Tensor):
            return cls(out, None)
        states, *more = out
        return cls(states, tuple(each if isinstance(each, Tensor) and len(each) == 1 else None for each in more))

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self.states.nbytes + sum(each.nbytes for each in self.more or () if each is not None)

    def times(self, candidates: int) -> Any:
        """What the block would return for so many candidates."""
        states = self.states.repeat(candidates, 1, 1)
        return states if self.more is None else (states, *self.more)


@dataclass(slots=True)
class StockTrunk:
    """What the candidates of a request share: the layers below the first in which their prompts differ.

    Attributes:
        prompts: `(P, H)` of each of these layers.
        front: What the last of them gave for what stands before the texts, where that runs once for all of them.
        seen: Its keys and values in these layers, of one candidate.
        texts: Number of a chunk -> how many of these layers it has run through, and what the last of them gave.
    """

    prompts: list[Tensor] = field(default_factory=list)
    front: Given | None = None
    seen: Any = None
    texts: dict[int, tuple[int, Given]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        layers = () if self.seen is None else self.seen.layers
        cached = [each for layer in layers for each in vars(layer).values() if isinstance(each, Tensor)]
        given = [each for _, each in self.texts.values()] + ([] if self.front is None else [self.front])
        return sum(each.nbytes for each in (*self.prompts, *cached)) + sum(each.bytes for each in given)
