"""Whether prompts and backbone belong together, and what a device is called."""

from __future__ import annotations

import torch

from bbprompt.backends.backbone import Backbone
from bbprompt.errors import ArtifactError
from bbprompt.prompts import ModularPrompt

__all__ = ["check_fit", "describe"]


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
            "--backbone"
        )
    rows = int(backbone.model.get_input_embeddings().weight.shape[0])
    problem = None
    if config.hidden != backbone.hidden:
        problem = f"hidden size {config.hidden}, the backbone has {backbone.hidden}"
    elif config.layers not in (1, backbone.layers):
        problem = f"{config.layers} layers, the backbone has {backbone.layers}"
    elif max(config.placeholders) >= rows:
        problem = f"placeholder {max(config.placeholders)}, the backbone has {rows} tokens"
    if problem is not None:
        raise ArtifactError(f"the prompts for {config.backbone} are damaged: their config.json says {problem}")


def describe(device: str) -> str:
    """The device in words."""
    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(torch.device(device))
