"""Whether prompts and backbone belong together, and what a local model says of itself."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from bbprompt import __version__
from bbprompt.backends.backbone import Backbone
from bbprompt.errors import ArtifactError
from bbprompt.oracle import OracleInfo
from bbprompt.prompts import ModularPrompt

__all__ = ["check_fit", "info_of"]


def check_fit(prompt: ModularPrompt, backbone: Backbone) -> None:
    """Refuse prompts that were made for another backbone, or whose config.json contradicts it.

    Raises:
        ArtifactError: They do not fit.
    """
    config = prompt.config
    if config.backbone_digest != backbone.digest:
        raise ArtifactError(
            f"the prompts were trained for {config.backbone} (weights {config.backbone_digest[:12]}), "
            f"not for {backbone.id} (weights {backbone.digest[:12]}); choose other --prompts or another "
            "--backbone, or train some: bbprompt pretrain"
        )
    rows = int(backbone.model.get_input_embeddings().weight.shape[0])
    problem = None
    if config.hidden != backbone.hidden:
        problem = f"hidden size {config.hidden}, the backbone has {backbone.hidden}"
    elif not 1 <= config.layers <= backbone.layers:
        problem = f"{config.layers} layers, the backbone has {backbone.layers}"
    elif max(config.placeholders, default=-1) >= rows:
        problem = f"placeholder {max(config.placeholders)}, the backbone has {rows} tokens"
    if problem is not None:
        raise ArtifactError(
            f"--prompts: those for {config.backbone} are damaged, their config.json says {problem}; fetch "
            "them again, or choose others"
        )


def _describe(device: str) -> str:
    """The device in words."""
    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(torch.device(device))


def _versions() -> str:
    """What decides the last bits of scores, besides the processor."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "transformers"))
    return f"bbprompt {__version__}, python {platform.python_version()}, torch {torch.__version__}, {libraries}"


def info_of(
    backbone: Backbone, device: str, dtype: str, limit: int, batch_tokens: int, prompt: ModularPrompt | None = None
) -> OracleInfo:
    """What a local model says of itself; without prompts it has no layers that carry one.

    Args:
        backbone: The frozen model.
        device: "cpu" or "cuda".
        dtype: Its precision.
        limit: Longest input in tokens.
        batch_tokens: Tokens that run through it at once.
        prompt: The artifact behind it.
    """
    config = prompt.config if prompt is not None else None
    return OracleInfo(
        backbone=backbone.id,
        backbone_digest=backbone.digest,
        prompts_digest=prompt.digest if prompt is not None else "",
        layers=config.layers if config is not None else 0,
        dim=config.intrinsic_dim if config is not None else 0,
        precision=dtype,
        device=_describe(device),
        max_tokens=limit,
        readout=config.readout if config is not None else "span" if backbone.head is None else "verbalizer",
        versions=_versions(),
        batch_tokens=batch_tokens,
    )
