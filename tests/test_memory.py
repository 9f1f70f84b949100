"""How many tokens fit."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from bbprompt.backends import memory


def test_free_memory_is_measured() -> None:
    assert 1 << 20 < memory.free_bytes("cpu") < 1 << 50


@pytest.mark.parametrize(("limit", "free"), [("1000000\n", 480_000), ("max\n", None)])
def test_files_that_were_read_leave_memory_free(
    limit: str, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\nfile 100000\ninactive_file 80000\nactive_file 20000\n")
    whole = memory.free_bytes("cpu")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert memory.free_bytes("cpu") == free if free else memory.free_bytes("cpu") > whole // 2
    for stat in ("anon 500000\n", "no numbers\n", None):  # the limit holds whatever is said of files
        (tmp_path / "memory.stat").write_text(stat) if stat else (tmp_path / "memory.stat").unlink()
        assert memory.free_bytes("cpu") == 400_000 if free else memory.free_bytes("cpu") > whole // 2


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


def test_what_failed_is_let_go_before_it_is_tried_again() -> None:
    portion, tried = memory.Portion(100, "cpu", lambda: forgot.append(True)), []
    held: list[weakref.ref[torch.Tensor]] = []
    forgot: list[bool] = []

    def compute() -> int:
        assert all(tensor() is None for tensor in held), "the failed attempt still holds its tensors"
        states = torch.zeros(8)
        held.append(weakref.ref(states))
        tried.append(portion.tokens)
        if portion.tokens > 60:
            raise torch.OutOfMemoryError(str(states.shape))
        return portion.tokens

    assert portion.fit(compute) == 50
    assert tried == [100, 50]
    assert forgot == [True]
    assert portion.fit(compute) == 50, "it must remember"


def test_other_errors_pass_and_halve_nothing() -> None:
    portion = memory.Portion(100, "cpu")

    def compute() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        portion.fit(compute)
    assert portion.tokens == 100
