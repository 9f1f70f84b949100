"""Prompts that a run keeps itself: written out for each layer, with all that is needed to apply them.

The projection of a random subspace would be hundreds of megabytes, and a prompt that was tuned by gradients has none.
In memory either is an artifact of one dimension, whose projection is the prompt, and the point 1 in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from bbprompt.errors import ArtifactError
from bbprompt.oracle import ReadoutKind
from bbprompt.prompts import ModularPrompt, Pooling, PromptConfig
from bbprompt.texts.mrc import NO_TOKEN

__all__ = ["frozen_prompt", "frozen_tensors", "written_out"]


def written_out(
    prompt: NDArray[np.floating],
    placeholders: Sequence[int],
    head: tuple[NDArray[np.floating], NDArray[np.floating]],
    backbone: tuple[str, str],
    readout: ReadoutKind,
    pooling: Pooling | None,
) -> tuple[ModularPrompt, NDArray[np.float32]]:
    """A prompt as an artifact of one dimension, and the point in it that is this prompt.

    Args:
        prompt: `(L, P, H)`.
        placeholders: P token ids, or P times `NO_TOKEN` for a prompt that is prepended.
        head: Weight `(2, H)` and bias `(2,)` of the answer head; `(0, H)` and `(0,)` where the readout has none.
        backbone: Name and digest of the model that it is for.
        readout: How options are scored.
        pooling: Of a prototype readout; not looked at for others.
    """
    layers, length, hidden = prompt.shape
    config = PromptConfig(
        kind="random",
        backbone=backbone[0],
        backbone_digest=backbone[1],
        layers=layers,
        hidden=hidden,
        prompt_length=length,
        modules=1,
        intrinsic_dim=1,
        readout=readout,
        pooling=pooling if readout == "prototype" else None,
        injection="prepend" if NO_TOKEN in placeholders else "add",
        placeholders=tuple(placeholders),
    )
    ones = np.ones((layers, 1), dtype=np.float32)
    weight, bias = (np.asarray(array, dtype=np.float32) for array in head)
    rows = np.asarray(prompt, dtype=np.float32).reshape(layers, 1, -1)
    return ModularPrompt(config, rows, ones[:, None], np.zeros((0, layers, 1), dtype=np.float32), weight, bias), ones


def frozen_tensors(prompt: ModularPrompt, point: NDArray[np.floating]) -> dict[str, NDArray[np.generic]]:
    """What a run keeps of a tuned prompt; `stds` are those that scaled a random subspace, which follows from them."""
    tensors: dict[str, NDArray[np.generic]] = {
        "prompt": prompt.prompts(point),
        "placeholders": np.array(prompt.config.placeholders, dtype=np.int64),
        "head.weight": prompt.head_weight,
        "head.bias": prompt.head_bias,
    }
    if "stds" in prompt.config.training:
        tensors["stds"] = np.array(prompt.config.training["stds"], dtype=np.float64)
    return tensors


def frozen_prompt(
    tensors: Mapping[str, NDArray[np.generic]],
    backbone: tuple[str, str],
    readout: ReadoutKind,
    pooling: Pooling | None,
) -> tuple[ModularPrompt, NDArray[np.float32]]:
    """The prompt of `frozen_tensors`; the other arguments and what is returned are those of `written_out`.

    Raises:
        ArtifactError: A tensor is missing or does not fit the others.
    """
    try:
        with np.errstate(over="ignore"):  # what float32 does not hold is refused as infinite
            prompt = np.asarray(tensors["prompt"], dtype=np.float32)
            weight, bias = (np.asarray(tensors[f"head.{name}"], dtype=np.float32) for name in ("weight", "bias"))
        _, length, hidden = prompt.shape
        placeholders: Sequence[int] = tensors["placeholders"].tolist()
        rows = 2 if readout == "span" else 0
        fits = weight.shape == (rows, hidden) and bias.shape == (rows,) and len(placeholders) == length
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"the tuned prompt is damaged ({error}); tune again") from None
    if not fits or not all(np.isfinite(array).all() for array in (prompt, weight, bias)):
        raise ArtifactError("the tuned prompt is damaged: its parts do not fit each other; tune again")
    try:
        return written_out(prompt, placeholders, (weight, bias), backbone, readout, pooling)
    except ValidationError as error:
        raise ArtifactError(f"the tuned prompt is damaged ({error.errors()[0]['msg'][:200]}); tune again") from None
