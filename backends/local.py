"""The local oracle: a frozen torch encoder with modular prompts added before its layers.

Texts are tokenized and embedded once per batch; `backends.population` has the savings that candidates allow.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.encoder import Encoder, pack
from bbprompt.backends.memory import is_exhausted
from bbprompt.backends.population import Place, Runner, Trunk
from bbprompt.backends.precision import ENOUGH, spread_over_error
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.errors import ArtifactError, DataError, OracleError
from bbprompt.mrc import Encoded, encode
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points
from bbprompt.prompts import ModularPrompt

__all__ = ["LocalOracle"]

log = logging.getLogger("bbprompt")

_KEPT_BATCHES = 4
#: Texts that attend together differ by less than so many tokens: less padding, more and smaller steps.
_SLACK = 4
#: Tokens at once below which nothing is halved further.
_LEAST_TOKENS = 64
#: Candidates from which on a request is worth a float32 reference and a check.
_POPULATION = 8


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some texts of a batch, ready to run.

    Attributes:
        place: Where their tokens and prompts lie and what is read.
        support: `(2, N, C)` where in the read rows each candidate start and end stands.
        present: `(N, C)` which candidates exist.
        spans: `(O, 3)` text, start and end (indices into C) of each scored span.
        encoded: The sequences.
        trunk: States shared by candidates.
    """

    place: Place
    support: Tensor
    present: Tensor
    spans: Tensor
    encoded: tuple[Encoded, ...]
    trunk: Trunk = field(compare=False)


class LocalOracle:
    """A frozen encoder on this machine's CPU or GPU.

    Args:
        backbone: The stock model with its tokenizer.
        prompt: The artifact behind the oracle.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16", or "mixed": populations as bfloat16 deviations from a float32 reference
            where that is exact enough, everything else in float32.
        batch_tokens: Tokens that run through the encoder at once (candidates times texts); halved for good
            where memory runs out.
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
        mixed = dtype == "mixed"
        kind = torch.float32 if mixed else getattr(torch, dtype)
        self._encoder = Encoder(backbone.model, kind, device, backbone.token_type)
        rough = Encoder(backbone.model, torch.bfloat16, device, backbone.token_type) if mixed else None
        limit = backbone.max_positions if max_tokens is None else min(max_tokens, backbone.max_positions)
        self._frame = frame_for(backbone.tokenizer, config.placeholders, limit)
        self._tokenize = tokenize_with(backbone.tokenizer)
        self._runner = Runner(self._encoder, torch.from_numpy(prompt.projection).to(device), rough)
        self._head = torch.from_numpy(prompt.head_weight).to(device)
        self._bias = torch.from_numpy(prompt.head_bias).to(device)
        self._batch_tokens = batch_tokens
        self._fallbacks = self._populations = 0
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

    @property
    def kept_bytes(self) -> int:
        """Memory taken by the states that are kept between calls, for at most four batches of texts."""
        return sum(chunk.trunk.bytes for chunks in self._kept.values() for chunk in chunks)

    @property
    def fallbacks(self) -> tuple[int, int]:
        """With "mixed" precision: populations that had to be scored in float32, and populations in all."""
        return self._fallbacks, self._populations

    def close(self) -> None:
        """Forget the kept batches."""
        if self._populations:
            log.info("%d of %d populations needed float32 throughout", self._fallbacks, self._populations)
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
        score = self._checked if self._runner.rough is not None and len(checked) >= _POPULATION else self._scores
        while True:
            try:
                return score(batch, checked, support, longest_answer)
            except (RuntimeError, MemoryError) as error:
                if not is_exhausted(error):
                    raise
                self._shrink(error)

    def _shrink(self, error: BaseException) -> None:
        """Run half as many tokens at once from now on."""
        if self._batch_tokens <= _LEAST_TOKENS:
            raise OracleError(
                f"the model does not fit into memory with {self._batch_tokens} tokens at once; free memory, or set "
                "--max-tokens"
            ) from error
        self._batch_tokens //= 2
        self._kept.clear()
        if self._encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("memory ran out: %d tokens run at once from now on", self._batch_tokens)

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
        layout = pack([len(item.ids) for item in encoded], device, _SLACK)
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
            Place(layout, (layout.starts[:, None] + slots).flatten(), read.to(device)),
            where.to(device),
            present.to(device),
            torch.as_tensor(spans, dtype=torch.long).view(-1, 3),
            tuple(encoded),
            Trunk([self._encoder.embed([item.ids for item in encoded], layout)[None]]),
        )

    def _scores(
        self,
        batch: TextBatch,
        points: NDArray[np.float32],
        support: Support,
        longest_answer: int | None,
        deviations: bool = False,
    ) -> Scores:
        """Scores in one precision throughout."""
        parts = []
        for chunk in self._chunks(batch, support):
            logits = self._runner.run(chunk.place, chunk.trunk, points, self._apply, self._batch_tokens, deviations)
            parts.append(self._read(chunk, logits, longest_answer))
        best = [part.best for part in parts if part.best is not None]
        return Scores(
            np.concatenate([part.logits for part in parts], axis=1),
            np.concatenate([part.normalizer for part in parts], axis=1),
            np.concatenate(best, axis=1) if best else None,
            sum(part.cut for part in parts),
        )

    def _checked(
        self, batch: TextBatch, points: NDArray[np.float32], support: Support, longest_answer: int | None
    ) -> Scores:
        """Scores as deviations, if the farthest candidate's error is small beside what tells candidates apart."""
        rough = self._scores(batch, points, support, longest_answer, deviations=True)
        farthest = int(np.square(points - points[:1]).sum(axis=(1, 2)).argmax())
        exact = self._scores(batch, points[farthest : farthest + 1], support, None)
        self._populations += 1
        if spread_over_error(rough, exact, farthest, batch.sizes) >= ENOUGH:
            return rough
        self._fallbacks += 1
        return self._scores(batch, points, support, longest_answer)

    def _apply(self, states: Tensor) -> Tensor:
        """Head outputs `(n, N, R, 2)` of last states at the rows that are read."""
        return states.float() @ self._head.T + self._bias

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


def _describe(device: str) -> str:
    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(torch.device(device))
