"""How long something takes, several ways in turn; and how fast bare products are."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from benchmarks.setting import Setting

__all__ = ["gemm_rate", "interleaved", "swept"]

_Way = TypeVar("_Way", bound=Hashable)


def interleaved(ways: Mapping[_Way, Callable[[], Any]], rounds: int, threads: int) -> dict[_Way, float]:
    """Least seconds of each way over some rounds, the ways in turn."""

    def once(work: Callable[[], Any]) -> Callable[[int], Any]:
        return lambda _: work()

    return swept({name: once(work) for name, work in ways.items()}, (0,), rounds, threads)


def swept(
    ways: Mapping[_Way, Callable[[int], Any]], steps: Sequence[int], rounds: int, threads: int
) -> dict[_Way, float]:
    """Least seconds that each way takes for all steps, over some rounds; the ways in turn at each step.

    The last two steps go first, untimed. With one thread the clock is the process's own CPU time, which other programs
    on the machine hardly touch.
    """
    clock = _clock(threads)
    for step in steps[-2:]:
        for work in ways.values():
            work(step)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        taken = dict.fromkeys(ways, 0.0)
        for step in steps:
            for name, work in ways.items():
                began = clock()
                work(step)
                taken[name] += clock() - began
        best = {name: min(best[name], seconds) for name, seconds in taken.items()}
    return best


def gemm_rate(setting: Setting, dtype: torch.dtype, threads: int) -> float:
    """Operations a second of the feed-forward pair at these shapes, weights pre-packed; the best of some."""
    clock, rows = _clock(threads), sum(setting.lengths)
    up, down = torch.randn(setting.inner, setting.hidden), torch.randn(setting.hidden, setting.inner)
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype)) for weight in (up, down)]
    states, best = torch.randn(rows, setting.hidden).to(dtype), float("inf")
    for _ in range(6):
        began = clock()
        inner = torch.ops.mkldnn._linear_pointwise(states, packed[0], None, "none", [], "")
        torch.ops.mkldnn._linear_pointwise(inner, packed[1], None, "none", [], "")
        best = min(best, clock() - began)
    return 4 * rows * setting.hidden * setting.inner / best


def _clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter
