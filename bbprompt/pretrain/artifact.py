"""What a training leaves: the prompts as an artifact that `tune` loads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.pretrain.mp2 import Trainer
from bbprompt.prompts import ModularPrompt, Pooling, PromptConfig

__all__ = ["artifact"]


def _pooling(trainer: Trainer) -> Pooling | None:
    """What was learned of scale and threshold, where the readout is prototypes."""
    if trainer.config.readout != "prototype":
        return None
    p = trainer.prompts
    return Pooling(
        scale=round(p.log_scale.exp().item(), 4), prefix=trainer.config.prefix, threshold=round(p.threshold.item(), 4)
    )


def artifact(trainer: Trainer, backbone_id: str, backbone_digest: str, training: dict[str, object]) -> ModularPrompt:
    """The prompts as they stand, as an artifact in memory (float16 precision, as it will be stored).

    A single prompt has no routers, so its artifact lists no upstream tasks to choose among; `training` and the
    sources name them.
    """
    p, config = trainer.prompts, trainer.config
    # Modules of unit size make the tuner's step sizes mean the same for every artifact; A takes the factor up.
    size = p.bank.detach().pow(2).mean((1, 2), keepdim=True).sqrt()

    def array(tensor: Tensor) -> NDArray[np.float32]:
        values: NDArray[np.float32] = tensor.detach().float().cpu().half().float().numpy()
        return values

    return ModularPrompt(
        PromptConfig(
            kind=config.kind,
            backbone=backbone_id,
            backbone_digest=backbone_digest,
            layers=p.bank.shape[0],
            hidden=trainer.encoder.hidden,
            prompt_length=config.prompt_length,
            modules=config.modules,
            intrinsic_dim=config.intrinsic_dim,
            readout=config.readout,
            pooling=_pooling(trainer),
            mixing="normalized" if config.normalized else "mean",
            placeholders=trainer.frame.placeholders,
            tasks=trainer.batches.names if config.routed else (),
            training=training,
            sources=trainer.batches.sources,
            license=config.license,
        ),
        array(p.projection * size),
        array(p.bank / size),
        array(p.router),
        array(p.head_weight),
        array(p.head_bias),
    )
