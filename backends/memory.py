"""Memory: how much is free, how many tokens fit into it, and an allocator that keeps what it has."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import sys
from pathlib import Path

import torch

from bbprompt.units import best_batch_tokens

__all__ = ["batch_tokens_for", "free_bytes", "is_exhausted", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT = 1 << 30


def free_bytes(device: torch.device | str) -> int:
    """Memory that could still be taken on a device: of the GPU, or of this machine within its control group."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [sys.maxsize]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(1024 * int(fields["MemAvailable"].split()[0]))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(min(free), 0)


def batch_tokens_for(hidden: int, inner: int, device: torch.device | str) -> int:
    """Tokens that run at once by default: the device's best, halved until a quarter of the free memory holds them.

    Args:
        hidden: H.
        inner: Width of the feed-forward maps.
        device: Where they run.
    """
    # Of a token at once in float32: states, residual and mixed (4 H), projections and their grid (6 H), inner (2 F).
    per_token = 4 * (10 * hidden + 2 * inner)
    tokens = best_batch_tokens(torch.device(device).type)
    room = free_bytes(device) // 4
    while tokens > 64 and tokens * per_token > room:
        tokens //= 2
    return tokens


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # torch has a class for a GPU's memory; the CPU's allocator raises a bare RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def keep_freed_memory() -> bool:
    """Let the C library keep large freed blocks instead of unmapping them; whether it could be told.

    States of some MB are allocated and freed at every step; mapping and clearing fresh pages costs more than small
    layers do. Holds for the process, up to 1 GiB; other C libraries than glibc are left as they are. Threads share one
    arena: one of their own is given back page by page whatever it was told, and a server's forward in a thread was a
    tenth slower for it.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6")
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    told = ((_M_MMAP_THRESHOLD, _KEPT), (_M_TRIM_THRESHOLD, _KEPT), (_M_ARENA_MAX, 1))
    return all(libc.mallopt(*each) for each in told)
