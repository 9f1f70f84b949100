"""A population in bfloat16 without bfloat16's noise: deviations from a reference that runs in float32.

Rounding a state x to bfloat16 costs 2^-9 of x. Candidates of one generation differ little from each other, so
that error is as large as what tells them apart. But a linear map is linear: W x = W x0 + W (x - x0). The first
candidate x0 runs in float32; of the others only the deviations x - x0 go through bfloat16 products, whose error is
then 2^-9 of the deviation, however small that is. Everything between the products (attention, LayerNorm, GELU,
sums) is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import Layout

__all__ = ["deviate"]

#: Rows that go through the feed-forward maps together: their inner states stay in a core's cache.
_ROWS = 256


def deviate(
    exact: Encoder, rough: Encoder, index: int, states: Tensor, layout: Layout, projected: Tensor | None = None
) -> Tensor:
    """Run layer `index` for a population.

    Args:
        exact: The encoder in float32.
        rough: The same encoder in bfloat16.
        index: Layer, from 0.
        states: `(n, T, H)` float32; the first is the reference. Overwritten.
        layout: Where the texts lie in T.
        projected: Queries, keys and values `(n, T, 3H)` in float32, where they are known.

    Returns:
        `(n, T, H)` float32.
    """
    run = _in_blocks if states.device.type == "cpu" else _at_once
    return run(exact, rough, index, states, layout, projected)


def _at_once(
    exact: Encoder, rough: Encoder, index: int, states: Tensor, layout: Layout, projected: Tensor | None
) -> Tensor:
    """All candidates in each product, as a GPU wants it."""
    weights, low = exact.layers[index], rough.layers[index]
    h, epsilon = exact.hidden, exact.epsilon
    reference, others = states[:1], states[1:]
    if projected is None:
        seen = exact.project(index, reference)
        own = seen + low.query_key_value.linear((others - reference).bfloat16())
    else:
        seen, own = projected[:1], projected[1:]
    mixed = exact.attend(seen, layout)
    summed = reference + weights.attention_out(mixed)
    gain = low.attention_out.linear((exact.attend(own, layout) - mixed).bfloat16())
    others = others - reference + gain + summed
    base = F.layer_norm(summed, (h,), *weights.attention_norm, epsilon)
    gap = F.layer_norm(others, (h,), *weights.attention_norm, epsilon) - base
    wide = weights.up(base)
    active = F.gelu(wide)
    total = base + weights.down(active)
    inner = F.gelu(low.up.linear(gap.bfloat16()) + wide) - active
    gap = gap + low.down.linear(inner.bfloat16()) + total
    return F.layer_norm(torch.cat([total, gap]), (h,), *weights.norm, epsilon)


def _in_blocks(
    exact: Encoder, rough: Encoder, index: int, states: Tensor, layout: Layout, projected: Tensor | None
) -> Tensor:
    """A candidate and some rows at a time, which stay in a core's cache."""
    weights, low = exact.layers[index], rough.layers[index]
    h, epsilon = exact.hidden, exact.epsilon
    reference, steps = states[0], range(0, states.shape[1], _ROWS)
    seen = exact.project(index, states[:1]) if projected is None else projected[:1]
    mixed = exact.attend(seen, layout)
    summed = reference + weights.attention_out(mixed)[0]
    own = torch.empty_like(seen) if projected is None else seen
    for n in range(1, len(states)):
        if projected is None:
            for begin in steps:
                rows = slice(begin, begin + _ROWS)
                gap = low.query_key_value.linear((states[n, rows] - reference[rows]).bfloat16())
                torch.add(seen[0, rows], gap, out=own[0, rows])
        else:
            own = projected[n : n + 1]
        gain = exact.attend(own, layout)[0]
        for begin in steps:
            rows = slice(begin, begin + _ROWS)
            out = low.attention_out.linear(gain[rows].sub_(mixed[0, rows]).bfloat16())
            states[n, rows] = (states[n, rows] - reference[rows]).add_(out).add_(summed[rows])
    states[0] = summed
    for begin in steps:
        block = states[:, begin : begin + _ROWS]
        base = F.layer_norm(block[0], (h,), *weights.attention_norm, epsilon)
        wide = weights.up(base)
        active = F.gelu(wide)
        total = base + weights.down(active)
        for n in range(1, len(states)):
            gap = F.layer_norm(block[n], (h,), *weights.attention_norm, epsilon).sub_(base)
            inner = F.gelu(low.up.linear(gap.bfloat16()) + wide)
            gap = gap.add_(low.down.linear(inner.sub_(active).bfloat16())).add_(total)
            block[n] = F.layer_norm(gap, (h,), *weights.norm, epsilon)
        block[0] = F.layer_norm(total, (h,), *weights.norm, epsilon)
    return states
