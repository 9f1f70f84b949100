"""A language model head that was trained for a frozen encoder which has none, as a directory.

From the last state h at a mask to the logit of a token t among the tokens that the head can name:

    f(h) = V LayerNorm(GELU(U h + u)) + v,    logit(t) = f(h) . e_t + b_t,

where e_t is the row of t in the encoder's own input embedding. The directory holds U, u, V, v, the LayerNorm's
weights, b and the ids of the tokens (`model.safetensors`, float16), what they belong to (`config.json`) and a model
card, but no row of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from bbprompt import tensorfile
from bbprompt.backends.lm_head import LanguageHead
from bbprompt.errors import ArtifactError
from bbprompt.jsontext import parse_json
from bbprompt.oneline import one_line

__all__ = ["HeadCard", "TrainedHead", "Transform", "bundled_head", "is_head"]

_TOKENS, _BIAS = "tokens", "bias"
_WIDEST = 2**20
_BUNDLED = Path(__file__).parent.parent / "bundled" / "heads"


class Transform(nn.Module):
    """From a state to what is compared with the embeddings: dense, GELU, LayerNorm, and back to the width of a state.

    Args:
        hidden: H, width of a state.
        width: Of the dense layer.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, hidden)

    def forward(self, states: Tensor) -> Tensor:
        """`(..., H)` to `(..., H)`."""
        features: Tensor = self.out(self.norm(nn.functional.gelu(self.dense(states))))
        return features


class HeadCard(BaseModel):
    """`config.json` of a trained head.

    Attributes:
        kind: Always "lm-head".
        backbone: Id of the encoder.
        backbone_digest: Of its weights.
        hidden: H.
        width: Of the transform layer.
        tokens: How many tokens it can name.
        training: Recipe and what was measured on held-out text.
        sources: The corpus with its terms.
        license: Terms of the head.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["lm-head"] = "lm-head"
    backbone: str
    backbone_digest: str
    hidden: int = Field(ge=1, le=_WIDEST)
    width: int = Field(ge=1, le=_WIDEST)
    tokens: int = Field(ge=1)
    training: dict[str, Any] = Field(default_factory=dict)
    sources: tuple[str, ...] = ()
    license: str = ""


class TrainedHead:
    """A head with its card.

    Args:
        card: What it is.
        tensors: Those of `Transform`, `bias` `(E,)`, and `tokens` `(E,)` ids in ascending order; E of the card.
        folder: Where it was read from, for messages.

    Raises:
        ArtifactError: They contradict the card.
    """

    def __init__(self, card: HeadCard, tensors: Mapping[str, NDArray[Any]], folder: Path | None = None) -> None:
        self.card, self._tensors, self.folder = card, dict(tensors), folder
        where = f"{folder}: " if folder else ""
        tokens = self._tensors.get(_TOKENS)
        whole = tokens is not None and tokens.shape == (card.tokens,) and np.issubdtype(tokens.dtype, np.integer)
        if tokens is None or not whole or tokens[0] < 0 or (tokens[1:] <= tokens[:-1]).any():
            raise ArtifactError(f"{where}damaged head: not the {card.tokens} token ids that config.json promises")
        with torch.device("meta"):  # sizes alone: nobody has looked yet whether there is so much of it
            transform = Transform(card.hidden, card.width).state_dict()
        shapes = {name: tuple(value.shape) for name, value in transform.items()} | {_BIAS: (card.tokens,)}
        for name, shape in shapes.items():
            held = self._tensors.get(name)
            if held is None or held.shape != shape or not np.isfinite(held).all():
                raise ArtifactError(f"{where}damaged head: no usable {name} of shape {shape}")

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.folder.name if self.folder is not None else "unnamed"

    @classmethod
    def load(cls, folder: Path) -> TrainedHead:
        """Read a head.

        Raises:
            ArtifactError: Files are missing or damaged.
        """
        try:
            card = HeadCard.model_validate_json((folder / "config.json").read_bytes())
            tensors = tensorfile.unpack((folder / "model.safetensors").read_bytes())
        except (OSError, ValidationError, SafetensorError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{folder}: damaged language model head ({reason}); get it again") from error
        return cls(card, tensors, folder)

    def files(self) -> dict[str, bytes]:
        """The directory's files but the model card: name -> content, all numbers in float16."""
        halves = {
            name: np.asarray(value, np.int32 if name == _TOKENS else np.float16)
            for name, value in self._tensors.items()
        }
        text = json.dumps(self.card.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"
        return {"config.json": text.encode(), "model.safetensors": tensorfile.pack(halves)}

    def open(self, embedding: Tensor, backbone: str, digest: str) -> LanguageHead:
        """The head on its encoder.

        Args:
            embedding: The encoder's input embedding `(V, H)`.
            backbone: Its name, for messages.
            digest: Of its weights.

        Raises:
            ArtifactError: It was trained for another encoder, or names tokens that this one lacks.
        """
        if digest != self.card.backbone_digest:
            trained = one_line(f"{self.card.backbone[:200]} (weights {self.card.backbone_digest[:12]})")
            raise ArtifactError(
                f"{self.folder or self.name}: this head was trained for {trained}, not for {backbone} (weights "
                f"{digest[:12]}); train one with `bbprompt pretrain lm-head`"
            )
        if (last := int(self._tensors[_TOKENS][-1])) >= len(embedding):
            raise ArtifactError(
                f"{self.folder or self.name}: damaged head: names token {last}, and {backbone} has {len(embedding)}; "
                "get it again"
            )
        transform = Transform(self.card.hidden, self.card.width)
        names = transform.state_dict()
        transform.load_state_dict({name: torch.from_numpy(self._tensors[name]).float() for name in names})
        transform.requires_grad_(False)
        tokens = torch.from_numpy(self._tensors[_TOKENS]).long()
        bias = torch.from_numpy(self._tensors[_BIAS]).float()
        return LanguageHead(transform.eval(), embedding.detach()[tokens], bias, "masked", tokens, len(embedding))

    @property
    def digest(self) -> str:
        """Of all numbers."""
        return tensorfile.checksum(self._tensors)


def is_head(folder: Path) -> bool:
    """Whether a directory holds a trained head rather than a checkpoint."""
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("kind") == "lm-head"


def bundled_head(digest: str) -> TrainedHead | None:
    """The head that comes with the package for an encoder with weights of this digest; None where there is none."""
    for folder in sorted(_BUNDLED.iterdir()) if _BUNDLED.is_dir() else ():
        if is_head(folder):
            trained = TrainedHead.load(folder)
            if trained.card.backbone_digest == digest:
                return trained
    return None
