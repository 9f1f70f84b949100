"""Sequences cut into chunks that run through a model at once, and what comes out put back into their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bbprompt.texts.mrc import Encoded

__all__ = ["Chunk", "chunks_of", "in_order"]

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
