"""The frozen model on this machine: from a name to an open oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.memory import batch_tokens_for, keep_freed_memory
from bbprompt.backends.overlay import overlaid
from bbprompt.backends.precision import best_precision
from bbprompt.backends.stock import StockOracle
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.oracle import Oracle
from bbprompt.prompts import ModularPrompt

__all__ = ["open_here"]


def open_here(
    prompt: ModularPrompt,
    *,
    backbone: str | None,
    device: str,
    dtype: str,
    batch_tokens: int | None,
    max_tokens: int | None,
    threads: int,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> Oracle:
    """Open a model in this process; the arguments are those of `bbprompt.connect.open_oracle`, with nothing to choose.

    Raises:
        UsageError: The precision is not for such a model.
        ArtifactError: Backbone, prompts or weights cannot be loaded or do not fit each other.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    model = load_backbone(backbone or prompt.config.backbone, head=prompt.config.readout == "verbalizer")
    if weights is not None:
        then = prompt.config.backbone_digest
        if model.digest != then:
            raise ArtifactError(
                f"the weights were tuned from {prompt.config.backbone} with the digest {then[:12]}, and {model.id} has "
                f"{model.digest[:12]}; restore it, or tune again"
            )
        model = overlaid(model, weights)
    stock = not model.packed
    if stock and dtype == "mixed":
        raise UsageError(f"--dtype mixed: only for encoders, which {model.id} is not; use float32 or bfloat16")
    precision = dtype if dtype != "auto" else "float32" if stock else best_precision(device)
    return (StockOracle if stock else LocalOracle)(
        model,
        prompt,
        device=device,
        dtype=precision,
        batch_tokens=batch_tokens or batch_tokens_for(model.hidden, 4 * model.hidden, device),
        max_tokens=max_tokens,
    )
