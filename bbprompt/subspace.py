"""Prompts without an artifact: a random subspace, the same for the same seed.

Black-box tuning (Sun et al. 2022, section 3) searches u in p = u A under a fixed random A. Here that is an artifact
in memory with the one module 0, no upstream tasks and, under a readout that needs none, no head: everything that
tunes prompts takes it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bbprompt.oracle import ReadoutKind
from bbprompt.prompts import ModularPrompt, Pooling, PromptConfig

__all__ = ["SubspaceConfig", "random_prompt"]


class SubspaceConfig(BaseModel):
    """The `space` section of a method that starts from no artifact.

    Attributes:
        readout: How options are scored.
        depth: "deep" adds a prompt before every layer, "shallow" before the first.
        length: P, placeholder positions.
        dim: d, intrinsic dimension.
        scale: Root mean square of a prompt's entries where the entries of u are standard normal.
        placeholder: Token id at the prompt positions: the first of P consecutive ones, or with `repeat` the only one.
        repeat: Put the same token at every prompt position.
        pooling: How a prototype readout makes embeddings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    readout: Literal["prototype", "verbalizer"]
    depth: Literal["deep", "shallow"] = "deep"
    length: Annotated[int, Field(ge=1, strict=True)] = 8
    dim: Annotated[int, Field(ge=1, strict=True)] = 32
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    placeholder: Annotated[int, Field(ge=0, strict=True)] = 1000
    repeat: bool = False
    pooling: Pooling = Pooling()

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Token ids at the prompt positions."""
        return tuple(self.placeholder + (0 if self.repeat else i) for i in range(self.length))


def random_prompt(
    space: SubspaceConfig,
    seed: int,
    *,
    backbone: str,
    backbone_digest: str,
    layers: int,
    hidden: int,
    scales: Sequence[float] | None = None,
) -> ModularPrompt:
    """Build the artifact of a random subspace; the point 0 is the model with its placeholders and no prompt.

    Args:
        space: Sizes and readout.
        seed: Of the projection.
        backbone: Id of the model.
        backbone_digest: SHA-256 of its weights.
        layers: Its number of layers.
        hidden: H, width of its states.
        scales: Size of the prompts of each layer that carries one, instead of `space.scale`.
    """
    depth = layers if space.depth == "deep" else 1
    sizes = [space.scale] * depth if scales is None else list(scales)
    width = space.length * hidden
    projection = np.empty((depth, space.dim, width), np.float32)
    for layer, size in enumerate(sizes):
        # A generator a layer, so that a deep subspace begins with the shallow one of the same seed.
        rng = np.random.default_rng([seed, layer])
        projection[layer] = rng.standard_normal((space.dim, width), np.float32) * np.float32(size / np.sqrt(space.dim))
    kind: ReadoutKind = space.readout
    config = PromptConfig(
        kind="random",
        backbone=backbone,
        backbone_digest=backbone_digest,
        layers=depth,
        hidden=hidden,
        prompt_length=space.length,
        modules=1,
        intrinsic_dim=space.dim,
        readout=kind,
        pooling=space.pooling if kind == "prototype" else None,
        placeholders=space.placeholders,
        training={"seed": seed},
    )
    return ModularPrompt(
        config,
        projection,
        np.zeros((depth, 1, space.dim), np.float32),
        np.zeros((0, depth, 1), np.float32),
        np.zeros((0, hidden), np.float32),
        np.zeros(0, np.float32),
    )
