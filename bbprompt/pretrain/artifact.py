"""What a training leaves, and may begin with: prompts as an artifact that `tune` loads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.errors import UsageError
from bbprompt.pretrain.mp2 import Trainer
from bbprompt.prompts import ModularPrompt, Pooling, PromptConfig

__all__ = ["artifact", "begin_from"]


def _pooling(trainer: Trainer) -> Pooling | None:
    """What was learned of scale and threshold, where the readout is prototypes."""
    if trainer.config.readout != "prototype":
        return None
    p = trainer.prompts
    return Pooling(
        scale=round(p.log_scale.exp().item(), 4), prefix=trainer.config.prefix, threshold=round(p.threshold.item(), 4)
    )


def artifact(
    trainer: Trainer,
    backbone_id: str,
    backbone_digest: str,
    training: dict[str, object],
    begun_with: tuple[str, ...] = (),
) -> ModularPrompt:
    """The prompts as they stand, as an artifact in memory (float16 precision, as it will be stored).

    A single prompt has no routers, so its artifact lists no upstream tasks to choose among; `training` and the
    sources name them. What the prompts were begun with counts as a source too: `begun_with`.
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
            sources=tuple(dict.fromkeys((*trainer.batches.sources, *begun_with))),
            license=config.license,
        ),
        array(p.projection * size),
        array(p.bank / size),
        array(p.router),
        array(p.head_weight),
        array(p.head_bias),
    )


def begin_from(trainer: Trainer, start: ModularPrompt, backbone_digest: str) -> None:
    """Go on from the prompts of an artifact instead of random ones; the optimizer begins anew.

    Tasks that the artifact has no router for begin with an untrained one; one prompt for all tasks begins with the mean
    of the modules, of whatever kind the artifact is. Where the recipe's `fade` says so, the artifact has prompts before
    every layer: that of the input is gone on with, and the others fade out.

    Raises:
        UsageError: The artifact has another shape, readout or frozen model than the recipe; names what differs.
    """
    p, config, known = trainer.prompts, trainer.config, start.config
    layers, modules = p.bank.shape[0], start.modules.mean(1, keepdims=True) if config.single else start.modules
    wanted: dict[str, object] = {}
    if config.routed:
        wanted = {"kind": "mp2-deep" if config.fade else config.kind, "modules": config.modules}
    wanted |= {
        "readout": config.readout,
        "placeholders": trainer.frame.placeholders,
        "intrinsic_dim": config.intrinsic_dim,
        "layers": len(trainer.encoder.layers) if config.fade else layers,
        "backbone_digest": backbone_digest,
    }
    for name, value in wanted.items():
        if (held := getattr(known, name)) != value:
            raise UsageError(f"start: {config.start}: has {name} {held}, but the recipe asks for {value}")

    def put(parameter: Tensor, values: NDArray[np.float32]) -> None:
        parameter.copy_(torch.from_numpy(values))

    with torch.no_grad():
        put(p.bank, modules[:layers])
        put(p.projection, start.projection[:layers])
        put(p.head_weight, start.head_weight)
        put(p.head_bias, start.head_bias)
        for row, task in enumerate(trainer.batches.names if config.routed else ()):
            if task in known.tasks:
                put(p.router[row], start.routers[known.tasks.index(task), :layers])
        if known.pooling is not None:
            p.log_scale.fill_(math.log(known.pooling.scale))
            p.threshold.fill_(known.pooling.threshold)
    if config.fade:
        p.fading = torch.from_numpy(_mixtures(start, trainer.batches.names)[:, layers:]).to(p.bank.device)


def _mixtures(start: ModularPrompt, tasks: Sequence[str]) -> NDArray[np.float32]:
    """Prompts `(T, L, P, H)` of an artifact by the tasks' own routers; an even mixture where it knows no such task."""
    space = start.space
    own = space.mix(space.routers, space.rule)
    points = [own[space.tasks.index(task)] if task in space.tasks else space.even() for task in tasks]
    return start.prompts(np.stack(points))
