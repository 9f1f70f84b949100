"""Memory: how much is free, how many tokens fit into it, fewer where it runs out, and an allocator that keeps it."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from bbprompt.errors import OracleError
from bbprompt.units import best_batch_tokens

__all__ = ["Portion", "batch_tokens_for", "free_bytes", "is_exhausted", "keep_freed_memory", "room_to_keep"]

_log = logging.getLogger("bbprompt")

_T = TypeVar("_T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT = 1 << 30
#: Tokens at once below which nothing is halved further.
_LEAST_TOKENS = 64
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device | str) -> int:
    """Memory that could still be taken on a device: of the GPU, or of this machine within its control group."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [sys.maxsize]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(1024 * int(fields["MemAvailable"].split()[0]))
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(limit - used + _droppable())
    return max(min(free), 0)


def _droppable() -> int:
    """Bytes in use by the control group for files that were read, such as a checkpoint's, and not lately."""
    with contextlib.suppress(OSError, ValueError):
        fields = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return int(fields.get("inactive_file", 0))
    return 0


def room_to_keep(device: torch.device | str) -> int:
    """Bytes that states kept between calls may take: a quarter of what is free."""
    return free_bytes(device) // 4


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
    while tokens > _LEAST_TOKENS and tokens * per_token > room:
        tokens //= 2
    return tokens


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # torch has a class for a GPU's memory; the CPU's allocator raises a bare RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


class Portion:
    """The tokens that run through a model at once: half as many for good where memory runs out.

    Args:
        tokens: To begin with.
        device: Where the model runs.
        forget: Called when there are fewer; lets go of what was made for more.
    """

    def __init__(self, tokens: int, device: torch.device | str, forget: Callable[[], None] = lambda: None) -> None:
        self.tokens = tokens
        self._on_gpu, self._forget = torch.device(device).type == "cuda", forget

    def fit(self, compute: Callable[[], _T]) -> _T:
        """What `compute` returns, which runs `tokens` at once; asked anew with fewer where memory runs out.

        Raises:
            OracleError: It runs out with the fewest, too.
        """
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not is_exhausted(error):
                    raise
                if self.tokens <= _LEAST_TOKENS:
                    raise OracleError(
                        f"the model does not fit into memory with {self.tokens} tokens at once; free memory, or set "
                        "--max-tokens"
                    ) from error
            # Behind the handler: while an error is handled, the frames that it passed hold their tensors.
            self.tokens //= 2
            self._forget()
            if self._on_gpu:
                torch.cuda.empty_cache()
            _log.warning("memory ran out: %d tokens run at once from now on", self.tokens)


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
