"""Prompt artifacts: modular prompts with intrinsic reparameterization, as a directory of safe files.

A layer's prompt is p = u A with A (d, P * H) learned upstream and frozen, and u the intrinsic vector that
tuning moves. Upstream, u is a mixture of K modules z_k by a router (MP2, section 3). `ModularPrompt` is the
whole artifact and lives behind the oracle; `PromptSpace` is the small part that a search needs: modules and
routers, a few kB.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from bbprompt.errors import ArtifactError, OracleError
from bbprompt.oracle import ReadoutKind
from bbprompt.router import CODE, GateRule, compose, mass
from bbprompt.tensorfile import written
from bbprompt.texts.mrc import NO_TOKEN
from bbprompt.yamlfile import closest

__all__ = [
    "Injection",
    "ModularPrompt",
    "Pooling",
    "PromptConfig",
    "PromptSpace",
    "bundled_prompts",
    "no_rows",
    "read_config",
    "resolve_prompts",
]

#: How a prompt enters a model.
Injection = Literal["add", "prepend"]

FORMAT = 1
_BUNDLED = Path(__file__).parent / "bundled" / "prompts"
_TENSORS = ("projection", "modules", "routers", "head.weight", "head.bias")


def no_rows(injection: Injection) -> str:
    """Why rows before a text that other tools put there cannot be the prompt of an encoder."""
    if injection == "prepend":
        return (
            "has rows of its own behind the positions and the LayerNorm of the embeddings, which those that other "
            "tools put before a text go through"
        )
    return (
        "is added behind the LayerNorm of the embeddings, to tokens that stand after the first one, which nothing "
        "before the text can represent"
    )


class Pooling(BaseModel):
    """How a prototype readout turns states into embeddings and similarities into logits.

    Attributes:
        scale: Factor from cosine to logit (the inverse temperature).
        prefix: Stands before every text and option; what the backbone was trained with.
        pool_prompt: Whether the mean takes the prompt positions in.
        threshold: Cosine at which two texts are as likely to say the same as not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float = Field(default=50.0, gt=0, allow_inf_nan=False)
    prefix: str = "query: "
    pool_prompt: bool = False
    threshold: float = Field(default=0.0, ge=-1, le=1, allow_inf_nan=False)


class PromptConfig(BaseModel):
    """`config.json` of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    kind: Literal["mp2-deep", "mp2-shallow", "spot", "ppt", "random"]
    backbone: str
    backbone_digest: str
    layers: int = Field(ge=1, description="layers that carry a prompt; 1 is the input layer alone")
    hidden: int = Field(ge=1)
    prompt_length: int = Field(ge=0, description="P, placeholder positions; 0 for a tuned model without a prompt")
    modules: int = Field(ge=1, description="K")
    intrinsic_dim: int = Field(ge=1, description="d")
    gates: Literal["binary", "sigmoid"] = "sigmoid"
    mixing: Literal["mean", "normalized"] = "normalized"
    fixed: int = Field(
        default=0, ge=0, description="last entries of a point that no search moves, see `random_projection`"
    )
    injection: Injection = Field(
        default="add", description='"add" to placeholder tokens, or "prepend" rows of its own to the input, see BBT'
    )
    readout: ReadoutKind = "span"
    pooling: Pooling | None = Field(default=None, description="of a prototype readout, and only there")
    support: Literal["candidates", "sequence"] = "candidates"
    placeholders: tuple[int, ...] = Field(
        description='token ids at the prompt positions; with "prepend" each is -1: no token but a row that is zero '
        "before the prompt is added, and stands before the first special token"
    )
    tasks: tuple[str, ...] = Field(default=(), description="upstream tasks, one router each")
    training: dict[str, Any] = Field(default_factory=dict)
    sources: tuple[str, ...] = Field(default=(), description="upstream data sources with their terms")
    license: str = ""
    weights_digest: str = Field(default="", description="SHA-256 of model.safetensors; without it none is checked")

    @property
    def rule(self) -> GateRule:
        """The gate rule the modules were trained with (its deterministic form)."""
        return GateRule(self.gates, self.mixing)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.placeholders) != self.prompt_length:
            raise ValueError(f"{len(self.placeholders)} placeholders for prompt_length {self.prompt_length}")
        if not self.prompt_length and self.kind != "random":
            raise ValueError(f"prompt_length: 0 for kind {self.kind}, which is a prompt")
        if self.injection == "prepend":
            if not self.placeholders or set(self.placeholders) != {NO_TOKEN}:
                raise ValueError(f"placeholders: injection 'prepend' has no tokens, so that each is {NO_TOKEN}")
            if self.layers != 1:
                raise ValueError(f"layers: {self.layers} for injection 'prepend', which is of the input layer alone")
        elif min(self.placeholders, default=0) < 0:
            raise ValueError("placeholders: a token id is negative")
        if self.kind == "mp2-shallow" and self.layers != 1:
            raise ValueError(f"layers: {self.layers} for kind mp2-shallow, which has 1")
        if self.fixed >= self.intrinsic_dim:
            raise ValueError(f"fixed: {self.fixed} of {self.intrinsic_dim} dimensions leave nothing to search")
        if (self.pooling is not None) != (self.readout == "prototype"):
            raise ValueError("pooling: belongs to the readout 'prototype', and only there")
        return self


@dataclass(frozen=True, slots=True)
class PromptSpace:
    """What a search needs to know of an artifact.

    Attributes:
        modules: z, `(L, K, d)` float64.
        routers: Upstream routers, `(T, L, K)`; T may be 0.
        tasks: Names of the T upstream tasks.
        rule: Gate rule of the upstream training.
        fixed: Last entries of each layer's vector that a search leaves as they are.
    """

    modules: NDArray[np.float64]
    routers: NDArray[np.float64]
    tasks: tuple[str, ...]
    rule: GateRule = CODE
    fixed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(L, d) of an intrinsic point."""
        return self.modules.shape[0], self.modules.shape[2]

    @property
    def router_shape(self) -> tuple[int, int]:
        """(L, K) of a router."""
        return self.modules.shape[0], self.modules.shape[1]

    def gain(self, rule: GateRule) -> NDArray[np.float64]:
        """Factor `(L, 1)` that gives mixtures under another rule the size the modules were trained at.

        The two rules weigh modules by different totals (1 for normalised gates, the share of open gates for
        the mean), so prompts trained under one would come out too large or small under the other. The factor
        makes the mean total over the upstream routers equal; under the training rule it is 1.
        """
        layers = self.modules.shape[0]
        if rule == self.rule or not len(self.routers):
            return np.ones((layers, 1))
        trained = mass(self.rule.weights(self.routers)).mean(axis=0)
        other = mass(rule.weights(self.routers)).mean(axis=0)
        factor = np.ones(layers)
        np.divide(trained, other, out=factor, where=other > 0)
        return factor[:, None]

    def mix(self, routers: NDArray[np.floating], rule: GateRule) -> NDArray[np.float64]:
        """Routers `(..., L, K)` to intrinsic points `(..., L, d)` under `rule`."""
        return compose(rule.weights(routers), self.modules) * self.gain(rule)

    def weights(self, routers: NDArray[np.floating], rule: GateRule) -> NDArray[np.float64]:
        """What `mix` weighs the modules by, `(..., L, K)`."""
        return rule.weights(routers) * self.gain(rule)

    def even(self) -> NDArray[np.float64]:
        """The untuned start `(L, d)`: all modules mixed evenly, at the size the upstream mixtures have."""
        mean: NDArray[np.float64] = self.modules.mean(axis=1)
        return mean * self.even_mass[:, None]

    @property
    def even_mass(self) -> NDArray[np.float64]:
        """Sum of the mixing weights of each layer `(L,)` in `even`: the mean over the upstream routers."""
        if not len(self.routers):
            return np.ones(len(self.modules))
        mean: NDArray[np.float64] = mass(self.rule.weights(self.routers)).mean(axis=0)
        return mean


@dataclass(frozen=True, slots=True)
class ModularPrompt:
    """A prompt artifact in memory.

    Attributes:
        config: What it is and where it comes from.
        projection: A, `(L, d, P * H)` float32, token-major.
        modules: z, `(L, K, d)` float32.
        routers: `(T, L, K)` float32.
        head_weight: `(2, H)` float32: row 0 start, row 1 end; `(0, H)` where the readout has no span head.
        head_bias: `(2,)` float32, or `(0,)`.
    """

    config: PromptConfig
    projection: NDArray[np.float32]
    modules: NDArray[np.float32]
    routers: NDArray[np.float32]
    head_weight: NDArray[np.float32]
    head_bias: NDArray[np.float32]

    @property
    def space(self) -> PromptSpace:
        """The part a search needs."""
        return PromptSpace(
            self.modules.astype(np.float64),
            self.routers.astype(np.float64),
            self.config.tasks,
            self.config.rule,
            self.config.fixed,
        )

    @property
    def digest(self) -> str:
        """SHA-256 over configuration and tensors, independent of file layout."""
        sha = hashlib.sha256(self.config.model_dump_json(exclude=self._absent()).encode())
        for name, array in sorted(self._tensors().items()):
            sha.update(f"{name}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return sha.hexdigest()

    def prompts(self, points: NDArray[np.floating]) -> NDArray[np.float32]:
        """Materialise p_l = u_l A_l: `(..., L, d)` to `(..., L, P, H)`."""
        flat: NDArray[np.float32]
        flat = np.einsum("...ld,ldx->...lx", np.asarray(points, np.float32), self.projection)
        return flat.reshape(*flat.shape[:-1], self.config.prompt_length, self.config.hidden)

    def save(self, directory: Path, half: bool = True) -> None:
        """Write `config.json` and `model.safetensors` (float16 with `half`) into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        kind = np.float16 if half else np.float32
        tensors = {name: np.ascontiguousarray(array.astype(kind)) for name, array in self._tensors().items()}
        with written(directory / "model.safetensors"):
            save_file(tensors, directory / "model.safetensors")
        told = self.config.model_dump(mode="json", exclude=self._absent())
        told["weights_digest"] = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
        text = json.dumps(told, ensure_ascii=False, indent=2)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> ModularPrompt:
        """Read an artifact directory.

        Raises:
            ArtifactError: A file is missing, unreadable, or does not say what the other says.
        """
        config, weights_file = read_config(directory), directory / "model.safetensors"
        try:
            data = weights_file.read_bytes()
            tensors = load(data)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(
                f"{weights_file}: not a readable safetensors file ({reason}); fetch it again"
            ) from error
        shapes = _shapes(config)
        if set(tensors) != set(_TENSORS):
            raise ArtifactError(f"{weights_file}: holds {sorted(tensors)}, expected {sorted(_TENSORS)}")
        arrays = {}
        for name, shape in shapes.items():
            array = tensors[name]
            if array.shape != shape:
                raise ArtifactError(f"{weights_file}: {name} has shape {array.shape}, config.json says {shape}")
            if array.dtype not in (np.float16, np.float32):
                raise ArtifactError(f"{weights_file}: {name} is {array.dtype}, not float16 or float32")
            arrays[name] = array.astype(np.float32)
            if not np.isfinite(arrays[name]).all():
                raise ArtifactError(f"{weights_file}: {name} holds NaN or infinity")
        if config.weights_digest not in ("", hashlib.sha256(data).hexdigest()):
            raise ArtifactError(f"{weights_file}: damaged, its digest is not that in config.json; fetch it again")
        return cls(
            config.model_copy(update={"weights_digest": ""}),  # the file's, not the artifact's
            arrays["projection"],
            arrays["modules"],
            arrays["routers"],
            arrays["head.weight"],
            arrays["head.bias"],
        )

    def _absent(self) -> set[str]:
        """Keys of the configuration that this artifact has no use for."""
        config = self.config
        values = {"pooling": config.pooling, "fixed": config.fixed, "weights_digest": config.weights_digest}
        return {name for name, value in values.items() if not value}

    def _tensors(self) -> dict[str, NDArray[np.float32]]:
        values = (self.projection, self.modules, self.routers, self.head_weight, self.head_bias)
        return dict(zip(_TENSORS, values, strict=True))


def read_config(directory: Path) -> PromptConfig:
    """Read the configuration alone of an artifact directory; raises as `ModularPrompt.load`."""
    config_file = directory / "config.json"
    for file in (config_file, directory / "model.safetensors"):
        if not file.is_file():
            raise ArtifactError(f"{file}: missing; a prompt artifact holds config.json and model.safetensors")
    try:
        config = PromptConfig.model_validate_json(config_file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        parts = (*map(str, first["loc"]), first["msg"].removeprefix("Value error, "))
        reason = " ".join(": ".join(parts).split())
        raise ArtifactError(f"{config_file}: {reason}; fetch the artifact again") from error
    except OSError as error:
        raise ArtifactError(f"{config_file}: cannot be read ({error.strerror})") from error
    if config.format != FORMAT:
        raise ArtifactError(f"{config_file}: format {config.format} is not {FORMAT}; use a matching bbprompt version")
    return config


def _shapes(config: PromptConfig) -> dict[str, tuple[int, ...]]:
    layers, k, d = config.layers, config.modules, config.intrinsic_dim
    channels = 2 if config.readout == "span" else 0
    return {
        "projection": (layers, d, config.prompt_length * config.hidden),
        "modules": (layers, k, d),
        "routers": (len(config.tasks), layers, k),
        "head.weight": (channels, config.hidden),
        "head.bias": (channels,),
    }


def bundled_prompts() -> dict[str, Path]:
    """Names and directories of the artifacts that come with the package."""
    if not _BUNDLED.is_dir():
        return {}
    return {path.name: path for path in sorted(_BUNDLED.iterdir()) if (path / "config.json").is_file()}


def resolve_prompts(name_or_dir: str) -> Path:
    """Find an artifact: a directory, a bundled name, or a Hugging Face hub id (`owner/name`).

    Raises:
        ArtifactError: Nothing of that name is there.
        OracleError: It may be at the hub, which is out of reach.
    """
    if Path(name_or_dir).is_dir():
        return Path(name_or_dir)
    bundled = bundled_prompts()
    if name_or_dir in bundled:
        return bundled[name_or_dir]
    if name_or_dir.count("/") != 1 or name_or_dir.startswith((".", "/", "~")):
        hint = closest(name_or_dir, list(bundled)) or "; none is bundled"
        raise ArtifactError(f"--prompts '{name_or_dir}': no such directory or bundled artifact{hint}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    where = f"--prompts '{name_or_dir}': no such directory or bundled artifact"
    files = ["config.json", "model.safetensors", "README.md"]
    try:
        return Path(snapshot_download(name_or_dir, allow_patterns=files))
    except HFValidationError as error:
        raise ArtifactError(f"{where}, and no hub id either; check the name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise ArtifactError(f"{where}, and unknown or closed on the hub ({status}); check the name") from error
        raise OracleError(f"{where}, and the hub answers {status}; try later or give a directory") from error
    except OSError as error:
        # Also what the hub's client raises where it has no network and nothing in its cache.
        reason = type(error.__cause__ or error).__name__
        raise OracleError(
            f"{where}, not in the hub cache, and the hub is out of reach ({reason}); check the network or give a "
            "directory"
        ) from error
