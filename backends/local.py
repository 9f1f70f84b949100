"""The local oracle: a frozen torch encoder with modular prompts added before its layers.

Exact savings: texts are tokenized and embedded once per batch; the layers below the first one in which the
candidates differ are computed once for all of them and kept until their prompts change; the last layer is
computed only at the rows that are read.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.encoder import Encoder, Layout, pack
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.errors import ArtifactError, DataError
from bbprompt.mrc import Encoded, encode
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points
from bbprompt.prompts import ModularPrompt
from bbprompt.units import Section, Unit, join, plan_units

__all__ = ["LocalOracle"]

_KEPT_BATCHES = 4


@dataclass(slots=True)
class _Trunk:
    """States entering layers 0, 1, … of one candidate, and the points they were computed with."""

    states: list[Tensor]
    points: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some texts of a batch, ready to run.

    Attributes:
        layout: Where their tokens lie.
        slots: Packed rows of the placeholders, text by text.
        read: `(N, R)` packed rows that are read; None for all.
        support: `(2, N, C)` where in the read rows each candidate start and end stands.
        present: `(N, C)` which candidates exist.
        spans: `(O, 3)` text, start and end (indices into C) of each scored span.
        encoded: The sequences.
        trunk: States shared by candidates.
    """

    layout: Layout
    slots: Tensor
    read: Tensor | None
    support: Tensor
    present: Tensor
    spans: Tensor
    encoded: tuple[Encoded, ...]
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
        if config.backbone_digest != backbone.digest:
            raise ArtifactError(
                f"the prompts were trained for {config.backbone} (weights {config.backbone_digest[:12]}), "
                f"not for {backbone.id} (weights {backbone.digest[:12]}); choose other --prompts or another "
                "--backbone"
            )
        _check_fit(prompt, backbone)
        self._encoder = Encoder(backbone.model, getattr(torch, dtype), device, backbone.token_type)
        limit = backbone.max_positions if max_tokens is None else min(max_tokens, backbone.max_positions)
        self._frame = frame_for(backbone.tokenizer, config.placeholders, limit)
        self._tokenize = tokenize_with(backbone.tokenizer)
        self._projection = torch.from_numpy(prompt.projection).to(device)
        self._head = torch.from_numpy(prompt.head_weight).to(device)
        self._bias = torch.from_numpy(prompt.head_bias).to(device)
        self._batch_tokens = batch_tokens
        self._kept: OrderedDict[tuple[str, Support], list[_Chunk]] = OrderedDict()
        self._info = OracleInfo(
            backbone=backbone.id,
            backbone_digest=backbone.digest,
            prompts_digest=prompt.digest,
            layers=config.layers,
            dim=config.intrinsic_dim,
            precision=dtype,
            device=_describe(device),
            max_tokens=limit,
        )

    @property
    def info(self) -> OracleInfo:
        """What this oracle is."""
        return self._info

    def close(self) -> None:
        """Forget the kept batches."""
        self._kept.clear()

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
        units = plan_units(self.sections(batch, support), len(checked))
        return join([self.score_unit(batch, checked, support, longest_answer, unit) for unit in units], units)

    def sections(self, batch: TextBatch, support: Support = "candidates") -> tuple[Section, ...]:
        """How the texts of a batch are divided, in their order; it depends on the batch alone.

        Raises:
            DataError: A text does not fit the model.
        """
        return tuple(
            Section(len(chunk.encoded), max(self._batch_tokens // chunk.trunk.states[0].shape[1], 1))
            for chunk in self._chunks(batch, support)
        )

    @torch.inference_mode()
    def score_unit(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support,
        longest_answer: int | None,
        unit: Unit,
    ) -> Scores:
        """Score the candidates and texts of one unit of a request.

        Takes the whole request: which layers are shared is decided by all its points, so that a unit's scores are
        the same bits wherever it is computed.
        """
        checked = check_points(points, self._info)
        chunk = self._chunks(batch, support)[unit.section]
        fork = min(_first_difference(checked), len(self._encoder.layers) - 1)
        trunk = self._grow(chunk, checked[0], fork)
        some = torch.from_numpy(checked[unit.first : unit.last])
        return self._read(chunk, self._branch(chunk, trunk, some, fork), longest_answer)

    def _chunks(self, batch: TextBatch, support: Support) -> list[_Chunk]:
        key = (batch.digest(), support)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        answers = batch.answers or (None,) * len(batch.forms)
        encoded = []
        for number, (form, answer) in enumerate(zip(batch.forms, answers, strict=True)):
            try:
                encoded.append(encode(form, self._tokenize, self._frame, () if answer is None else (answer,)))
            except DataError as error:
                raise DataError(f"text {number + 1}: {error}") from error
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
        starts, ends, spans = [], [], []
        for number, item in enumerate(encoded):
            extractive = bool(item.offsets)
            if support == "sequence" or extractive:
                first, last = (0, len(item.ids)) if support == "sequence" else item.context
                positions = list(range(first, last))
                starts.append(positions)
                ends.append(positions)
                spans += [(number, a - first, b - first) for a, b in item.spans]
            else:
                starts.append([a for a, _ in item.spans])
                ends.append([b for _, b in item.spans])
                spans += [(number, option, option) for option in range(len(item.spans))]
        width = max(len(positions) for positions in starts)
        padded = torch.zeros(2, len(encoded), width, dtype=torch.long)
        present = torch.zeros(len(encoded), width, dtype=torch.bool)
        for number, (first_rows, last_rows) in enumerate(zip(starts, ends, strict=True)):
            padded[0, number, : len(first_rows)] = torch.as_tensor(first_rows)
            padded[1, number, : len(last_rows)] = torch.as_tensor(last_rows)
            present[number, : len(first_rows)] = True
        shared = bool((padded[0] == padded[1]).all())
        base = layout.starts.cpu()[:, None]
        read = base + (padded[0] if shared else torch.cat((padded[0], padded[1]), dim=1))
        where = torch.arange(width).expand(2, len(encoded), width).clone()
        if not shared:
            where[1] += width
        return _Chunk(
            layout,
            (layout.starts[:, None] + slots).flatten(),
            read.to(device),
            where.to(device),
            present.to(device),
            torch.as_tensor(spans, dtype=torch.long).view(-1, 3),
            tuple(encoded),
            _Trunk([self._encoder.embed([item.ids for item in encoded], layout)[None]]),
        )

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
        """Head outputs `(n, N, R, 2)` of candidates that share everything below layer `fork`."""
        states = trunk.expand(len(points), -1, -1)
        last = len(self._encoder.layers) - 1
        for layer in range(fork, last + 1):
            states = self._add(chunk, states, points, layer)
            states = self._encoder.layer(layer, states, chunk.layout, chunk.read if layer == last else None)
        return states.float() @ self._head.T + self._bias

    def _add(self, chunk: _Chunk, states: Tensor, points: Tensor, layer: int) -> Tensor:
        """Add the layer's prompts u A to the placeholder rows of every text, where the layer has any."""
        if layer >= len(self._projection):
            return states
        prompts = points[:, layer].to(self._projection.device) @ self._projection[layer]
        prompts = prompts.view(len(points), 1, -1, self._encoder.hidden).to(states.dtype)
        added = prompts.expand(-1, len(chunk.encoded), -1, -1).flatten(1, 2)
        return states.index_add(1, chunk.slots, added)

    def _read(self, chunk: _Chunk, logits: Tensor, longest_answer: int | None) -> Scores:
        start = logits[..., 0].gather(2, chunk.support[0].expand(len(logits), -1, -1))
        end = logits[..., 1].gather(2, chunk.support[1].expand(len(logits), -1, -1))
        both = torch.stack((start, end)).masked_fill(~chunk.present, -torch.inf)
        text, first, last = chunk.spans.to(logits.device).unbind(1)
        values = torch.stack((both[0][:, text, first], both[1][:, text, last]), dim=-1)
        best = None
        if longest_answer is not None and chunk.encoded[0].offsets:
            best = self._answers(chunk, both, longest_answer)
        return Scores(
            values.cpu().numpy(),
            both.logsumexp(-1).permute(1, 2, 0).cpu().numpy(),
            best,
            sum(item.cut for item in chunk.encoded),
        )

    def _answers(self, chunk: _Chunk, both: Tensor, longest: int) -> NDArray[np.int64]:
        """Character spans `(n, N, 2)` of the best start <= end within `longest` tokens of the context."""
        result = np.zeros((both.shape[1], both.shape[2], 2), dtype=np.int64)
        for number, item in enumerate(chunk.encoded):
            size = len(item.offsets)
            # With the whole sequence as support the context starts inside it, else it is the support.
            first = item.context[0] if int(chunk.present[number].sum()) > size else 0
            start = both[0, :, number, first : first + size]
            end = both[1, :, number, first : first + size]
            reach = min(longest, size)
            padded = torch.nn.functional.pad(end, (0, reach - 1), value=-torch.inf)
            window = padded.unfold(1, reach, 1)  # (n, size, reach): ends that each start may take
            score, length = window.max(-1)
            at = (start + score).argmax(-1)
            for candidate in range(both.shape[1]):
                a = int(at[candidate])
                result[candidate, number] = (
                    item.offsets[a][0],
                    item.offsets[a + int(length[candidate, a])][1],
                )
        return result


def _check_fit(prompt: ModularPrompt, backbone: Backbone) -> None:
    """Refuse an artifact whose config.json contradicts the backbone that it names."""
    config = prompt.config
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


def _first_difference(points: NDArray[np.float32]) -> int:
    """First layer in which the candidates differ; the number of layers if they do not."""
    differs = (points != points[:1]).any(axis=(0, 2))
    return int(differs.argmax()) if differs.any() else points.shape[1]


def _describe(device: str) -> str:
    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(torch.device(device))
