"""Where the frozen model is: from a backend's name to an open model."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bbprompt.embedding import Embedder
from bbprompt.errors import UsageError
from bbprompt.example import Form
from bbprompt.oracle import Oracle
from bbprompt.prompts import ModularPrompt
from bbprompt.random_projection import BackboneFacts

__all__ = ["cores", "measure_backbone", "open_embedder", "open_oracle"]


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
        dtype: "auto" (float32), "float32" or "bfloat16".
        batch_tokens: Tokens at once; None for the device's default.
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

    chosen = _device(device)
    torch.set_num_threads(threads or cores())
    return LocalOracle(
        load_backbone(backbone or prompt.config.backbone),
        prompt,
        device=chosen,
        dtype="float32" if dtype == "auto" else dtype,
        batch_tokens=batch_tokens or (4096 if chosen == "cpu" else 65536),
        max_tokens=max_tokens,
    )


def open_embedder(
    backend: str,
    *,
    backbone: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> Embedder:
    """Open a frozen model that is only read, without prompts; the arguments are those of `open_oracle`.

    Raises:
        UsageError: The backend is not local, or the device is not there.
        ArtifactError: The backbone cannot be loaded.
    """
    if backend != "local":
        raise UsageError(f"--backend '{backend}': this method reads the model's states, which only 'local' gives")
    import torch

    from bbprompt.backends.backbone import DEFAULT_BACKBONE, load_backbone
    from bbprompt.backends.embedding import LocalEmbedder

    chosen = _device(device)
    torch.set_num_threads(threads or cores())
    return LocalEmbedder(
        load_backbone(backbone or DEFAULT_BACKBONE),
        device=chosen,
        dtype="float32" if dtype == "auto" else dtype,
        batch_tokens=batch_tokens or (4096 if chosen == "cpu" else 65536),
        max_tokens=max_tokens,
    )


def measure_backbone(
    backend: str,
    forms: Sequence[Form],
    prompt_length: int,
    *,
    backbone: str | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> BackboneFacts:
    """What a random projection has to know of the frozen model, measured on the few-shot texts.

    Raises:
        UsageError: The backend is not local.
        ArtifactError: The backbone cannot be loaded.
    """
    if backend != "local":
        raise UsageError(
            f"--backend '{backend}': a random projection is scaled by the model's states, which only 'local' gives"
        )
    import torch

    from bbprompt.backends.backbone import DEFAULT_BACKBONE, load_backbone
    from bbprompt.backends.scale import measure

    torch.set_num_threads(threads or cores())
    return measure(load_backbone(backbone or DEFAULT_BACKBONE), forms, prompt_length, max_tokens)


def _device(asked: str) -> str:
    """The device to use; raises `UsageError` where it is not there."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
