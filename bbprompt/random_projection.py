"""Random subspaces in place of pre-trained ones: BBT and BBTv2 as a prompt that is built, not loaded.

BBT (Sun et al. 2022, arXiv:2201.03514) tunes z in R^d and adds p = z A at the placeholders, where A is random and
frozen. BBTv2 (Sun et al. 2022, arXiv:2205.11200) does so before every layer and draws the entries of A_l from
N(0, s_l^2) with

    s_l = alpha * std_l / (sqrt(d) * sigma),

std_l being the standard deviation of the states that the prompt is added to. So a step of size sigma in z moves the
prompt by alpha standard deviations. As a `ModularPrompt` it has one module, which is zero: nothing is tuned yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bbprompt.config import ProjectionConfig
from bbprompt.errors import ArtifactError
from bbprompt.prompts import ModularPrompt, PromptConfig

__all__ = [
    "BackboneFacts",
    "clipped_std",
    "entry_std",
    "frozen_prompt",
    "frozen_tensors",
    "placeholders_for",
    "random_prompt",
]

_FIRST_PLACEHOLDER = 1000


@dataclass(frozen=True, slots=True)
class BackboneFacts:
    """What a random subspace has to know of a frozen model.

    Attributes:
        id: Name or directory.
        digest: SHA-256 of its weights.
        hidden: H.
        vocabulary: Rows of its embedding matrix.
        stds: Of the states that enter each layer; first that of the word embeddings.
    """

    id: str
    digest: str
    hidden: int
    vocabulary: int
    stds: tuple[float, ...]


def clipped_std(values: NDArray[np.floating], rounds: int = 5, width: float = 3.0) -> float:
    """Standard deviation after clipping to mean +- `width` deviations and measuring anew, `rounds` times (BBTv2)."""
    kept = np.asarray(values, dtype=np.float64).ravel()
    for _ in range(rounds):
        mean, std = kept.mean(), kept.std()
        kept = kept.clip(mean - width * std, mean + width * std)
    return float(kept.std())


def entry_std(std: float, dim: int, alpha: float = 1.0, sigma: float = 1.0) -> float:
    """Standard deviation s of the entries of A, see above."""
    return alpha * std / (math.sqrt(dim) * sigma)


def placeholders_for(vocabulary: int, length: int) -> tuple[int, ...]:
    """Ids of the placeholder tokens: 1000 and following as in BBT, the last ones of a smaller vocabulary.

    Raises:
        ArtifactError: The vocabulary has fewer tokens.
    """
    if vocabulary < length:
        raise ArtifactError(f"projection.prompt_length: {length} placeholders, the backbone knows {vocabulary} tokens")
    first = min(_FIRST_PLACEHOLDER, vocabulary - length)
    return tuple(range(first, first + length))


def random_prompt(
    settings: ProjectionConfig, facts: BackboneFacts, seed: int, head: ModularPrompt | None = None
) -> ModularPrompt:
    """Build a random subspace; the same arguments give the same numbers.

    Args:
        settings: Its sizes and scale.
        facts: The frozen model.
        seed: Of the projection.
        head: Artifact whose answer head is used; None for a head of zeros, where the readout does without.

    Raises:
        ArtifactError: The head belongs to another backbone.
    """
    if head is not None and head.config.backbone_digest != facts.digest:
        raise ArtifactError(
            f"projection.head: '{settings.head}' was trained for {head.config.backbone}, not for {facts.id}"
        )
    layers = 1 if settings.layers == "input" else len(facts.stds)
    width = settings.prompt_length * facts.hidden
    projection = np.empty((layers, settings.dim, width), dtype=np.float32)
    for layer, std in enumerate(facts.stds[:layers]):
        rng = np.random.default_rng([seed, layer])
        if settings.distribution == "normal":
            rng.standard_normal(dtype=np.float32, out=projection[layer])
            projection[layer] *= entry_std(std, settings.dim, settings.alpha, settings.sigma)
        else:
            bound = 1.0 / math.sqrt(settings.dim)
            projection[layer] = rng.uniform(-bound, bound, projection[layer].shape)
    config = PromptConfig(
        kind="random",
        backbone=facts.id,
        backbone_digest=facts.digest,
        layers=layers,
        hidden=facts.hidden,
        prompt_length=settings.prompt_length,
        modules=1,
        intrinsic_dim=settings.dim,
        placeholders=placeholders_for(facts.vocabulary, settings.prompt_length),
        training={"projection": settings.model_dump(mode="json"), "seed": seed, "stds": list(facts.stds[:layers])},
    )
    return ModularPrompt(
        config,
        projection,
        np.zeros((layers, 1, settings.dim), dtype=np.float32),
        np.zeros((0, layers, 1), dtype=np.float32),
        head.head_weight if head is not None else np.zeros((2, facts.hidden), dtype=np.float32),
        head.head_bias if head is not None else np.zeros(2, dtype=np.float32),
    )


def frozen_tensors(prompt: ModularPrompt, point: NDArray[np.floating]) -> dict[str, NDArray[np.generic]]:
    """What a run keeps of a tuned random subspace: the prompts themselves, and all that is needed to apply them.

    The projection would be hundreds of megabytes; it can be built again from the seed and `stds`.
    """
    return {
        "prompt": prompt.prompts(point),
        "placeholders": np.array(prompt.config.placeholders, dtype=np.int64),
        "stds": np.array(prompt.config.training["stds"], dtype=np.float64),
        "head.weight": prompt.head_weight,
        "head.bias": prompt.head_bias,
    }


def frozen_prompt(
    tensors: Mapping[str, NDArray[np.generic]], backbone: str, digest: str
) -> tuple[ModularPrompt, NDArray[np.float32]]:
    """The prompt of `frozen_tensors`, as an artifact of one dimension and the point 1 in it.

    Raises:
        ArtifactError: A tensor is missing or does not fit the others.
    """
    try:
        prompt = np.asarray(tensors["prompt"], dtype=np.float32)
        weight, bias = (np.asarray(tensors[f"head.{name}"], dtype=np.float32) for name in ("weight", "bias"))
        layers, length, hidden = prompt.shape
        placeholders: Sequence[int] = tensors["placeholders"].tolist()
        fits = weight.shape == (2, hidden) and bias.shape == (2,) and len(placeholders) == length
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"the tuned prompt is damaged ({error}); tune again") from None
    if not fits or not all(np.isfinite(array).all() for array in (prompt, weight, bias)):
        raise ArtifactError("the tuned prompt is damaged: its parts do not fit each other; tune again")
    config = PromptConfig(
        kind="random",
        backbone=backbone,
        backbone_digest=digest,
        layers=layers,
        hidden=hidden,
        prompt_length=length,
        modules=1,
        intrinsic_dim=1,
        placeholders=tuple(placeholders),
    )
    ones = np.ones((layers, 1), dtype=np.float32)
    return (
        ModularPrompt(
            config,
            prompt.reshape(layers, 1, -1),
            ones[:, None],
            np.zeros((0, layers, 1), dtype=np.float32),
            weight,
            bias,
        ),
        ones,
    )
