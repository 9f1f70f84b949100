"""How texts of different length lie in one matrix without padding, in groups that attend together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Group", "Layout", "pack"]

#: Attention on a CPU: keys fill whole vectors of so many, as those of the last one otherwise go one by one.
_ALIGNED = 16
#: And in bfloat16 between 32 and 64 queries and keys become 64: fewer take a path that several threads do not speed up,
#: which is no matter up to 32.
_NARROW, _WIDE = 32, 64


@dataclass(frozen=True, slots=True)
class Group:
    """Texts of similar length that attend together.

    Attributes:
        width: W, columns that are asked for: the tokens of the longest text, or a few more.
        rows: `(G, S)`, S >= W: row within the group of each cell of its padded grid; 0 where the cell is padding.
        cells: Flat cell of the grid's first W columns for each row of the group.
        mask: `(G, 1, 1, S)` True where a cell holds a token.
        texts: `(G,)` which texts these are.
        even: No cell is padding: the rows are the grid.
    """

    width: int
    rows: Tensor
    cells: Tensor
    mask: Tensor
    texts: Tensor
    even: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """How N texts of different length lie in T packed rows: shortest first, in groups.

    Attributes:
        starts: `(N,)` packed row of the first token of each text, on the host; token j of text i is `starts[i] + j`.
        order: The texts in packed order.
        groups: Consecutive groups that cover all T rows.
    """

    starts: Tensor
    order: tuple[int, ...]
    groups: tuple[Group, ...]

    def rows(self, tokens: Tensor) -> Tensor:
        """Packed rows `(N, R)` of some tokens of each text, `(N, R)` or `(R,)` on the host."""
        return (self.starts[:, None] + tokens).to(self.groups[0].rows.device)


def pack(
    lengths: Sequence[int],
    device: torch.device | str = "cpu",
    slack: int = 16,
    fast: torch.dtype | None = None,
) -> Layout:
    """Lay texts of the given `lengths` (tokens) out.

    Args:
        lengths: Tokens of each text.
        device: Where they are read.
        slack: Within a group lengths differ by less than this.
        fast: Widen the grids to what attention in this precision is fastest on; None: as narrow as can be.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    starts = torch.zeros(len(lengths), dtype=torch.long)
    groups, first, begin = [], 0, 0
    for end in range(1, len(order) + 1):
        if end < len(order) and lengths[order[end]] - lengths[order[begin]] < slack:
            continue
        members = order[begin:end]
        sizes = torch.as_tensor([lengths[i] for i in members])
        width = int(sizes.max())
        columns = width
        if fast is not None and torch.device(device).type == "cpu":
            width, columns = _widened(width, int(sizes.min()) == width, fast)
        mask = torch.arange(columns)[None, :] < sizes[:, None]
        rows = torch.zeros(mask.shape, dtype=torch.long)
        rows[mask] = torch.arange(int(sizes.sum()))
        starts[members] = first + sizes.cumsum(0) - sizes
        cells = mask[:, :width].flatten().nonzero().squeeze(1)
        groups.append(
            Group(
                width,
                rows.to(device),
                cells.to(device),
                mask[:, None, None, :].to(device),
                torch.as_tensor(members, device=device),
                bool(mask.all()),
            )
        )
        first, begin = first + int(sizes.sum()), end
    return Layout(starts, tuple(order), tuple(groups))


def _widened(width: int, even: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Queries and keys of a text for texts of at most `width` tokens."""
    columns = -(-width // _ALIGNED) * _ALIGNED
    if dtype is torch.bfloat16:
        return (_WIDE, _WIDE) if _NARROW < columns <= _WIDE else (width, columns)
    # Rows of one length are a grid without a copy, which would cost in float32 what the wider grid saves.
    return (width, width) if even else (width, columns)
