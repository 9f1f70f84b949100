"""The local oracle: a frozen torch encoder with modular prompts added before its layers.

Exact savings: texts are tokenized and embedded once per batch; the layers below the first one in which the
candidates differ are computed once for all of them and kept until their prompts change; the last layer is
computed only at the rows that are read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.embedding import embed_texts, marker_for
from bbprompt.backends.encoder import Encoder, Layout, pack
from bbprompt.backends.fit import check_fit, describe
from bbprompt.backends.head import Head, Plan
from bbprompt.backends.prototype_head import PrototypeHead
from bbprompt.backends.span_head import SpanHead
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.embedding import Embeddings
from bbprompt.errors import ArtifactError
from bbprompt.mrc import Encoded, Frame
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points
from bbprompt.prompts import ModularPrompt

__all__ = ["LocalOracle"]

_KEPT_BATCHES = 4


@dataclass(slots=True)
class _Trunk:
    """States entering layers 0, 1, … of one candidate, and the points they were computed with."""

    states: list[Tensor]
    points: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some sequences of a batch, ready to run.

    Attributes:
        layout: Where their tokens lie.
        slots: Packed rows of the placeholders, text by text.
        texts: N, how many sequences these are.
        plan: How the head reads them.
        trunk: States shared by candidates.
    """

    layout: Layout
    slots: Tensor
    texts: int
    plan: Plan
    trunk: _Trunk = field(compare=False)


class LocalOracle:
    """A frozen encoder on this machine's CPU or GPU.

    Args:
        backbone: The stock model with its tokenizer.
        prompt: The artifact behind the oracle.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
        batch_tokens: Tokens that run through the encoder at once (candidates times texts).
        max_tokens: Longest sequence; None for the backbone's limit.

    Raises:
        ArtifactError: The prompts were trained for another backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: ModularPrompt,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_tokens: int = 4096,
        max_tokens: int | None = None,
    ) -> None:
        config = prompt.config
        check_fit(prompt, backbone)
        self._encoder = Encoder(backbone.model, getattr(torch, dtype), device, backbone.token_type)
        limit = backbone.max_positions if max_tokens is None else min(max_tokens, backbone.max_positions)
        self._frame = frame_for(backbone.tokenizer, config.placeholders, limit)
        self._tokenize = tokenize_with(backbone.tokenizer)
        self._head = _open_head(backbone, prompt, self._frame, self._encoder.device)
        self._projection = torch.from_numpy(prompt.projection).to(device)
        self._batch_tokens = batch_tokens
        self._kept: OrderedDict[tuple[str, Support], list[_Chunk]] = OrderedDict()
        self._info = OracleInfo(
            backbone=backbone.id,
            backbone_digest=backbone.digest,
            prompts_digest=prompt.digest,
            layers=config.layers,
            dim=config.intrinsic_dim,
            precision=dtype,
            device=describe(device),
            max_tokens=limit,
            readout=config.readout,
        )

    @property
    def info(self) -> OracleInfo:
        """What this oracle is."""
        return self._info

    def close(self) -> None:
        """Forget the kept batches."""
        self._kept.clear()

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """Read texts without prompts; see `bbprompt.embedding.Embedder`."""
        marker = marker_for(self._info.backbone)
        return embed_texts(self._encoder, self._tokenize, self._frame, texts, marker, self._batch_tokens)

    @torch.inference_mode()
    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score every candidate on every text; see `bbprompt.oracle.Oracle`."""
        checked = check_points(points, self._info)
        chunks = self._chunks(batch, support)
        outputs = [self._apply(chunk, checked) for chunk in chunks]
        return self._head.scores(batch, [chunk.plan for chunk in chunks], outputs, longest_answer)

    def _chunks(self, batch: TextBatch, support: Support) -> list[_Chunk]:
        key = (batch.digest(), support)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        encoded = self._head.sequences(batch)
        chunks, begin, tokens = [], 0, 0
        for end, item in enumerate(encoded):
            if end > begin and tokens + len(item.ids) > self._batch_tokens:
                chunks.append(self._prepare(encoded[begin:end], support))
                begin, tokens = end, 0
            tokens += len(item.ids)
        chunks.append(self._prepare(encoded[begin:], support))
        self._kept[key] = chunks
        if len(self._kept) > _KEPT_BATCHES:
            self._kept.popitem(last=False)
        return chunks

    def _prepare(self, encoded: list[Encoded], support: Support) -> _Chunk:
        device = self._encoder.device
        layout = pack([len(item.ids) for item in encoded], device)
        slots = torch.arange(len(self._frame.placeholders), device=device) + self._frame.prompt_start
        return _Chunk(
            layout,
            (layout.starts[:, None] + slots).flatten(),
            len(encoded),
            self._head.plan(encoded, layout, support),
            _Trunk([self._encoder.embed([item.ids for item in encoded], layout)[None]]),
        )

    def _apply(self, chunk: _Chunk, points: NDArray[np.float32]) -> Tensor:
        """What the head reads of every candidate."""
        fork = min(_first_difference(points), len(self._encoder.layers) - 1)
        trunk = self._grow(chunk, points[0], fork)
        tokens = trunk.shape[1]
        size = max(self._batch_tokens // tokens, 1)
        outputs = [
            self._branch(chunk, trunk, torch.from_numpy(points[i : i + size]), fork)
            for i in range(0, len(points), size)
        ]
        return torch.cat(outputs)

    def _grow(self, chunk: _Chunk, point: NDArray[np.float32], fork: int) -> Tensor:
        """States `(1, T, H)` entering layer `fork` of a candidate.

        Computed from the deepest kept layer below which the prompts are the same; always for one candidate
        alone, so that a reply does not depend on what was scored before.
        """
        trunk = chunk.trunk
        reach = 0
        if trunk.points is not None:
            while reach < len(trunk.states) - 1 and reach < fork and self._same(trunk.points, point, reach):
                reach += 1
        del trunk.states[reach + 1 :]
        trunk.points = point.copy()
        row = torch.from_numpy(point[None])
        for layer in range(reach, fork):
            states = self._add(chunk, trunk.states[layer], row, layer)
            trunk.states.append(self._encoder.layer(layer, states, chunk.layout))
        return trunk.states[fork]

    def _same(self, one: NDArray[np.float32], other: NDArray[np.float32], layer: int) -> bool:
        return layer >= len(one) or bool(np.array_equal(one[layer], other[layer]))

    def _branch(self, chunk: _Chunk, trunk: Tensor, points: Tensor, fork: int) -> Tensor:
        """Head outputs `(n, ...)` of candidates that share everything below layer `fork`."""
        states = trunk.expand(len(points), -1, -1)
        last = len(self._encoder.layers) - 1
        for layer in range(fork, last + 1):
            states = self._add(chunk, states, points, layer)
            states = self._encoder.layer(layer, states, chunk.layout, chunk.plan.read if layer == last else None)
        return self._head.apply(chunk.plan, states)

    def _add(self, chunk: _Chunk, states: Tensor, points: Tensor, layer: int) -> Tensor:
        """Add the layer's prompts u A to the placeholder rows of every text, where the layer has any."""
        if layer >= len(self._projection):
            return states
        prompts = points[:, layer].to(self._projection.device) @ self._projection[layer]
        prompts = prompts.view(len(points), 1, -1, self._encoder.hidden).to(states.dtype)
        added = prompts.expand(-1, chunk.texts, -1, -1).flatten(1, 2)
        return states.index_add(1, chunk.slots, added)


def _open_head(backbone: Backbone, prompt: ModularPrompt, frame: Frame, device: torch.device) -> Head:
    """The head that the artifact's config.json names."""
    tokenize = tokenize_with(backbone.tokenizer)
    pooling = prompt.config.pooling
    if pooling is not None:
        return PrototypeHead(pooling.scale, pooling.prefix, pooling.pool_prompt, tokenize, frame, device)
    if prompt.config.readout == "verbalizer":
        if backbone.head is None:
            raise ArtifactError(f"backbone {backbone.id}: a verbalizer readout needs its language model head")
        return VerbalizerHead(backbone.head, backbone.tokenizer.mask_token_id, tokenize, frame, device)
    return SpanHead(prompt.head_weight, prompt.head_bias, tokenize, frame, device)


def _first_difference(points: NDArray[np.float32]) -> int:
    """First layer in which the candidates differ; the number of layers if they do not."""
    differs = (points != points[:1]).any(axis=(0, 2))
    return int(differs.argmax()) if differs.any() else points.shape[1]
