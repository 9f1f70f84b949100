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
    ray: str | None = None,
    workers: int | None = None,
) -> Oracle:
    """Open a frozen model.

    Args:
        backend: "local".
        prompt: The artifact behind the oracle.
        backbone: Hub id or directory; None for the one the prompts were trained for.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" (float32), "float32" or "bfloat16".
        batch_tokens: Tokens at once; None for the device's default.
        max_tokens: Longest sequence; None for the backbone's limit.
        threads: CPU threads; None for all cores, or 1 for each worker on Ray.
        ray: "local", "auto" or HOST:PORT: share the work out over actors of a Ray cluster; None: do not.
        workers: How many actors; None for one for each GPU or as many as the CPUs hold.

    Raises:
        UsageError: A backend or device that is not there.
        ArtifactError: Backbone or prompts cannot be loaded or do not fit each other.
    """
    if backend != "local":
        raise UsageError(f"--backend '{backend}': only 'local' is supported by this version")
    if ray is not None:
        from bbprompt.backends.rayoracle import open_ray

        return open_ray(
            ray,
            prompt,
            workers=workers,
            backbone=backbone,
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            threads=threads,
            cores=cores(),
        )
    if workers is not None:
        raise UsageError("--workers: there is one model here; give --ray local, auto or HOST:PORT as well")
    import torch

    from bbprompt.backends.backbone import load_backbone
    from bbprompt.backends.local import LocalOracle

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch")
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads or cores())
    return LocalOracle(
        load_backbone(backbone or prompt.config.backbone),
        prompt,
        device=chosen,
        dtype="float32" if dtype == "auto" else dtype,
        batch_tokens=batch_tokens or (4096 if chosen == "cpu" else 65536),
        max_tokens=max_tokens,
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
