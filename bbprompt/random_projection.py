"""Random subspaces in place of pre-trained ones: BBT and BBTv2 as a prompt that is built, not loaded.

BBT (Sun et al. 2022, arXiv:2201.03514) tunes z in R^d and adds p = z A at the placeholders, where A is random and
frozen; with the injection "prepend", p itself stands in rows before the first token (`cat` in the released code).
BBTv2 (Sun et al. 2022, arXiv:2205.11200) adds before every layer and draws the entries of A_l from N(0, s_l^2) with

    s_l = alpha * std_l / (sqrt(d) * sigma),

std_l being the standard deviation of the states that the prompt is added to. So a step of size sigma in z moves the
prompt by alpha standard deviations. As a `ModularPrompt` it has one module, which is zero: nothing is tuned yet.

Around a pre-trained prompt, p = z A + p0 (BBT), p0 is one more row of A, and one more entry of every point, which is 1
and which no search moves, is its factor. So oracles need not know of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import ArtifactError
from bbprompt.prompts import ModularPrompt, PromptConfig
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.texts.mrc import NO_TOKEN

__all__ = [
    "BackboneFacts",
    "clipped_std",
    "entry_std",
    "placeholders_for",
    "random_prompt",
]

_FIRST_PLACEHOLDER = 1000

#: Of `clipped_std`: how often, and at how many deviations.
_ROUNDS, _WIDTH = 5, 3.0
#: Values that are in float64 at once.
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class BackboneFacts:
    """What a random subspace has to know of a frozen model.

    Attributes:
        id: Name or directory.
        digest: SHA-256 of its weights.
        hidden: H.
        vocabulary: Rows of its embedding matrix.
        layers: How many it has.
        stds: Of the states that enter each layer, first that of the word embeddings; empty where not measured.
    """

    id: str
    digest: str
    hidden: int
    vocabulary: int
    layers: int
    stds: tuple[float, ...] = ()


def clipped_std(values: NDArray[np.floating]) -> float:
    """Standard deviation after clipping to mean +- 3 deviations and measuring anew, five times (BBTv2).

    In float64, of a block of values at a time: there are many, and a copy of them all would be large. To clip again and
    again is to clip once to the narrowest bounds, so that no clipped values need be kept.
    """
    flat, low, high = values.ravel(), -np.inf, np.inf
    for _ in range(_ROUNDS):
        mean, std = _moments(flat, low, high)
        low, high = max(low, mean - _WIDTH * std), min(high, mean + _WIDTH * std)
    return _moments(flat, low, high)[1]


def _moments(values: NDArray[np.floating], low: float, high: float) -> tuple[float, float]:
    """Mean and standard deviation of values clipped to bounds, in float64."""

    def clipped(some: NDArray[np.floating]) -> NDArray[np.float64]:
        return some.astype(np.float64).clip(low, high)

    mean = _sum(values, clipped) / len(values)
    return mean, math.sqrt(_sum(values, lambda some: np.square(clipped(some) - mean)) / len(values))


def _sum(values: NDArray[np.floating], of: Callable[[NDArray[np.floating]], NDArray[np.float64]]) -> float:
    """Sum of a function of values, of so many at once, in the halves in which numpy sums them: the same bits."""
    if len(values) <= _BLOCK:
        return float(of(values).sum())
    half = len(values) // 2
    half -= half % 8
    return _sum(values[:half], of) + _sum(values[half:], of)


def entry_std(std: float, dim: int, alpha: float = 1.0, sigma: float = 1.0) -> float:
    """Standard deviation s of the entries of A, see above."""
    return alpha * std / (math.sqrt(dim) * sigma)


def placeholders_for(vocabulary: int, length: int, first: int | None = None, repeat: bool = False) -> tuple[int, ...]:
    """Ids of the placeholder tokens: 1000 and following as in BBT, the last ones of a smaller vocabulary.

    Args:
        vocabulary: How many tokens the backbone knows.
        length: P.
        first: Another first token than that.
        repeat: The first token at every position.

    Raises:
        ArtifactError: The vocabulary has fewer tokens.
    """
    span = 1 if repeat else length
    start = min(_FIRST_PLACEHOLDER, vocabulary - span) if first is None else first
    if not 0 <= start <= vocabulary - span:
        raise ArtifactError(
            f"projection.prompt_length: {length} placeholders from token {max(start, 0)} on, but the backbone knows "
            f"{vocabulary} tokens"
        )
    return (start,) * length if repeat else tuple(range(start, start + length))


def random_prompt(
    settings: ProjectionConfig,
    facts: BackboneFacts,
    seed: int,
    head: ModularPrompt | None = None,
    start: ModularPrompt | None = None,
) -> ModularPrompt:
    """Build a random subspace; the same arguments give the same numbers.

    Args:
        settings: Its sizes and scale.
        facts: The frozen model.
        seed: Of the projection.
        head: Artifact whose answer head is used; None for that of `start`, else for a head of zeros, where the readout
            does without.
        start: Artifact whose untuned prompt is p0; `settings.prompt_length` is its length.

    Raises:
        ArtifactError: Head or start belong to another backbone, or the start does not fit the settings.
    """
    for name, value, artifact in (("head", settings.head, head), ("start", settings.start, start)):
        if artifact is not None and artifact.config.backbone_digest != facts.digest:
            raise ArtifactError(
                f"projection.{name}: '{value}' was trained for {artifact.config.backbone}, not for {facts.id}"
            )
    layers = 1 if settings.layers == "input" else facts.layers
    fixed = 0 if start is None else 1
    projection = np.empty((layers, settings.dim + fixed, settings.prompt_length * facts.hidden), dtype=np.float32)
    modules = np.zeros((layers, 1, settings.dim + fixed), dtype=np.float32)
    if start is not None:
        projection[:, -1] = _start_rows(settings, start, layers)
        modules[:, :, -1] = 1.0
    head = head or start
    for layer in range(layers):
        # A generator a layer, so that a deep subspace begins with the shallow one of the same seed.
        rng = np.random.default_rng([seed, layer])
        if settings.distribution == "normal":
            rng.standard_normal(dtype=np.float32, out=projection[layer, : settings.dim])
            projection[layer, : settings.dim] *= _entry_size(settings, facts, layer)
        else:
            bound = 1.0 / math.sqrt(settings.dim)
            projection[layer, : settings.dim] = rng.uniform(-bound, bound, projection[layer, : settings.dim].shape)
    config = PromptConfig(
        kind="random",
        backbone=facts.id,
        backbone_digest=facts.digest,
        layers=layers,
        hidden=facts.hidden,
        prompt_length=settings.prompt_length,
        modules=1,
        intrinsic_dim=settings.dim + fixed,
        fixed=fixed,
        readout=settings.readout,
        pooling=settings.pooling if settings.readout == "prototype" else None,
        injection=settings.injection,
        placeholders=_positions(settings, facts) if start is None else start.config.placeholders,
        training={"projection": settings.model_dump(mode="json"), "seed": seed, "stds": list(facts.stds[:layers])},
    )
    rows = 2 if settings.readout == "span" else 0  # other readouts have no head of their own
    return ModularPrompt(
        config,
        projection,
        modules,
        np.zeros((0, layers, 1), dtype=np.float32),
        head.head_weight if head is not None else np.zeros((rows, facts.hidden), dtype=np.float32),
        head.head_bias if head is not None else np.zeros(rows, dtype=np.float32),
    )


def _positions(settings: ProjectionConfig, facts: BackboneFacts) -> tuple[int, ...]:
    """What stands at the prompt positions."""
    if settings.injection == "prepend":
        return (NO_TOKEN,) * settings.prompt_length
    return placeholders_for(facts.vocabulary, settings.prompt_length, settings.placeholder, settings.repeat)


def _start_rows(settings: ProjectionConfig, start: ModularPrompt, layers: int) -> NDArray[np.float32]:
    """The untuned prompt of an artifact as a row `(P * H)` for each of `layers` layers; zeros where it has none."""
    config = start.config
    problem = None
    if config.readout != settings.readout:
        problem = f"was trained for the readout '{config.readout}', not '{settings.readout}'"
    elif config.injection != settings.injection:
        problem = f"has the injection '{config.injection}', not '{settings.injection}'"
    elif config.layers > layers:
        problem = f"prompts {config.layers} layers; set projection.layers=all"
    elif config.prompt_length != settings.prompt_length:
        problem = f"has {config.prompt_length} positions; set projection.prompt_length to it"
    if problem is not None:
        raise ArtifactError(f"projection.start: '{settings.start}' {problem}")
    rows = np.zeros((layers, config.prompt_length * config.hidden), dtype=np.float32)
    rows[: config.layers] = start.prompts(start.space.even()).reshape(config.layers, -1)
    return rows


def _entry_size(settings: ProjectionConfig, facts: BackboneFacts, layer: int) -> float:
    if settings.scale is not None:
        return settings.scale / math.sqrt(settings.dim)
    return entry_std(facts.stds[layer], settings.dim, settings.alpha, settings.sigma)
