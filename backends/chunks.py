"""Sequences cut into chunks that run through a model at once, and what comes out put back into their order.

And what is kept of chunks that many candidates share; how they run from there on is `backends.body`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bbprompt.texts.mrc import Encoded

__all__ = ["Chunk", "Given", "Trunk", "chunks_of", "in_order"]

#: A chunk runs a cell of padding at most for so many tokens, where texts are many enough.
_PADDING = 12
#: A chunk that runs one in so many of the tokens that could run at once is large enough to end for its padding.
_LARGE = 32


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some of N sequences.

    Attributes:
        numbers: Which they are.
        sequences: They themselves.
    """

    numbers: tuple[int, ...]
    sequences: tuple[Encoded, ...]

    @property
    def cells(self) -> int:
        """Tokens and padding, with every sequence as wide as the longest."""
        return len(self.sequences) * max(len(item.ids) for item in self.sequences)


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
class Trunk:
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


def chunks_of(sequences: Sequence[Encoded], most: int, *, shared: int = 0, padded: bool = True) -> list[Chunk]:
    """Cut sequences into chunks of at most `most` cells, or of one sequence.

    Args:
        sequences: At least one.
        most: Tokens that run at once, padding included.
        shared: Tokens in front of every sequence, which take their place but run once for all.
        padded: The model computes padding: those of similar length go together. Otherwise they stay in order.
    """
    lengths = [len(item.ids) for item in sequences]
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i)) if padded else list(range(len(lengths)))
    pieces: list[list[int]] = [[]]
    width = tokens = 0
    for number in order:
        size, count = lengths[number], len(pieces[-1])
        cells, held = (count + 1) * max(width, size), tokens + size
        large = count * (width - shared) * _LARGE >= most
        wasteful = padded and large and (cells - held) * _PADDING > held - (count + 1) * shared
        if count and (cells > most or wasteful):
            pieces.append([])
            width = tokens = 0
        pieces[-1].append(number)
        width, tokens = max(width, size), tokens + size
    return [Chunk(tuple(piece), tuple(sequences[i] for i in piece)) for piece in pieces]


def in_order(chunks: Sequence[Chunk], outputs: Sequence[Tensor]) -> list[Tensor]:
    """What a model gave for chunks, in the order of the sequences, and in as many pieces of the same sizes.

    Args:
        chunks: Of `chunks_of`.
        outputs: Of each `(n, sequences of the chunk, ...)`; alike in what follows unless the chunks are in order.
    """
    order = [number for chunk in chunks for number in chunk.numbers]
    if order == sorted(order):
        return list(outputs)
    back = torch.from_numpy(np.argsort(order)).to(outputs[0].device)
    whole = torch.cat(list(outputs), dim=1)[:, back]
    return list(torch.split(whole, [len(chunk.numbers) for chunk in chunks], dim=1))
