"""Where the frozen model is: from a backend's name to an open oracle."""

from __future__ import annotations

import os

from bbprompt.errors import UsageError
from bbprompt.oracle import Oracle
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.subspace import SubspaceConfig, random_prompt

__all__ = ["cores", "open_oracle", "open_prompts"]


def open_prompts(name: str, space: SubspaceConfig | None, backbone: str | None, seed: int) -> ModularPrompt:
    """Load an artifact, or build a method's random subspace.

    Args:
        name: Directory, bundled name, hub id, or "none".
        space: For "none": the subspace of the method.
        backbone: For "none": the model that it is for; None for the default one.
        seed: For "none": of the projection.

    Raises:
        UsageError: "none", and the method has no subspace.
        ArtifactError: There is no such artifact or backbone.
    """
    if name != "none":
        return ModularPrompt.load(resolve_prompts(name))
    if space is None:
        raise UsageError("--prompts none: the method has no section `space`; choose a method that needs no prompts")
    from bbprompt.backends.backbone import DEFAULT_BACKBONE, load_backbone

    model = load_backbone(backbone or DEFAULT_BACKBONE, head=space.readout == "verbalizer")
    return random_prompt(
        space,
        seed,
        backbone=model.id,
        backbone_digest=model.digest,
        layers=model.layers,
        hidden=model.hidden,
    )


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
    from bbprompt.backends.causal import CausalOracle
    from bbprompt.backends.local import LocalOracle

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch")
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads or cores())
    model = load_backbone(backbone or prompt.config.backbone, head=prompt.config.readout == "verbalizer")
    oracle = CausalOracle if model.head is not None and model.head.causal else LocalOracle
    return oracle(
        model,
        prompt,
        device=chosen,
        dtype="float32" if dtype == "auto" else dtype,
        batch_tokens=batch_tokens or (4096 if chosen == "cpu" else 65536),
        max_tokens=max_tokens,
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
