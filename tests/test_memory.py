"""How many tokens fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bbprompt.backends import memory


def test_free_memory_is_measured() -> None:
    assert 1 << 20 < memory.free_bytes("cpu") < 1 << 50


@pytest.mark.parametrize(("free", "tokens"), [(1 << 40, 4096), (100 << 20, 512), (0, 64)])
def test_tokens_follow_free_memory(free: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert memory.batch_tokens_for(384, 1536, "cpu") == tokens


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (torch.OutOfMemoryError("no"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("shapes"), False),
        (ValueError(), False),
    ],
)
def test_which_errors_mean_memory(error: BaseException, exhausted: bool) -> None:
    assert memory.is_exhausted(error) is exhausted


def test_what_the_cpu_allocator_raises_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory.is_exhausted(caught.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_the_allocator_can_be_told() -> None:
    code = "from bbprompt.backends.memory import keep_freed_memory as keep; print(keep() and keep())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("True", "False")
