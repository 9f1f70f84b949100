"""How fast a training is, and what the machine could do: tokens a second against its own matrix products."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

__all__ = ["gemm_rate", "step_flops"]


def gemm_rate(
    dtype: torch.dtype, device: torch.device, rows: int, inner: int, outer: int, seconds: float = 0.2
) -> float:
    """Measure the matrix product `(rows, inner) x (inner, outer)`: floating point operations a second.

    The best of the repetitions that fit into `seconds` (at least three): what the machine can do, not what its
    other work left over.
    """
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, outer, device=device).to(dtype)

    def once() -> float:
        begin = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    once()
    times = [once() for _ in range(3)]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(once())
    return 2.0 * rows * inner * outer / min(times)


def step_flops(lengths: Sequence[int], layers: int, hidden: int, ffn: int, read: int) -> float:
    """Floating point operations of one forward and backward pass through the frozen layers.

    A linear map of p weights takes 2p a token forward and 2p backward: the weights are frozen, so only the states
    have gradients. Attention takes 4 S H a token and layer forward and twice that backward. In the last layer only
    the `read` positions go on behind keys and values.

    Args:
        lengths: Tokens of each text.
        layers: Number of layers.
        hidden: H.
        ffn: Width of the feed-forward part.
        read: Positions that the head reads, over all texts.
    """
    tokens = sum(lengths)
    block = 4 * hidden * hidden + 2 * hidden * ffn
    linear = 4.0 * tokens * (block * (layers - 1) + 2 * hidden * hidden)
    linear += 4.0 * read * (2 * hidden * hidden + 2 * hidden * ffn)
    attention = 12.0 * hidden * sum(size * size for size in lengths) * layers
    return linear + attention
