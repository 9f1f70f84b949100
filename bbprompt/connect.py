"""Where the frozen model is: from a backend's name to an open oracle."""

from __future__ import annotations

import os

from bbprompt.errors import UsageError
from bbprompt.oracle import Oracle
from bbprompt.prompts import ModularPrompt

__all__ = ["cores", "open_oracle"]


def open_oracle(
    backend: str,
    prompt: ModularPrompt,
    *,
    backbone: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> Oracle:
    """Open a frozen model.

    Args:
        backend: "local".
        prompt: The artifact behind the oracle.
        backbone: Hub id or directory; None for the one the prompts were trained for.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" (mixed on CPUs with AMX, else float32), "float32", "mixed" or "bfloat16".
        batch_tokens: Tokens at once; None for the most that is fast and fits into the free memory.
        max_tokens: Longest sequence; None for the backbone's limit.
        threads: CPU threads; None for all cores.

    Raises:
        UsageError: A backend or device that is not there.
        ArtifactError: Backbone or prompts cannot be loaded or do not fit each other.
    """
    if backend != "local":
        raise UsageError(f"--backend '{backend}': only 'local' is supported by this version")
    import torch

    from bbprompt.backends.backbone import load_backbone
    from bbprompt.backends.local import LocalOracle
    from bbprompt.backends.memory import batch_tokens_for, keep_freed_memory
    from bbprompt.backends.precision import best_precision

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch")
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads or cores())
    keep_freed_memory()
    loaded = load_backbone(backbone or prompt.config.backbone)
    return LocalOracle(
        loaded,
        prompt,
        device=chosen,
        dtype=best_precision(chosen) if dtype == "auto" else dtype,
        batch_tokens=batch_tokens or batch_tokens_for(loaded.hidden, 4 * loaded.hidden, chosen),
        max_tokens=max_tokens,
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
