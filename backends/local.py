"""The local oracle: a frozen torch encoder with modular prompts added before its layers.

Texts are tokenized and embedded once per batch; `backends.population` has the savings that candidates allow, the
heads turn last states into scores.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.embedding import embed_texts, marker_for
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.fit import check_fit, info_of
from bbprompt.backends.head import Head
from bbprompt.backends.language import LocalLanguageModel, same_model
from bbprompt.backends.layout import pack
from bbprompt.backends.memory import Portion, room_to_keep
from bbprompt.backends.population import Lane, Place, Prepared, Runner, Trunk
from bbprompt.backends.precision import ENOUGH, ENOUGH_THROUGHOUT, Probe, error_of, log_probabilities, spread_of
from bbprompt.backends.prototype_head import PrototypeHead
from bbprompt.backends.span_head import SpanHead
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.embedding import Embeddings
from bbprompt.errors import ArtifactError
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points
from bbprompt.prompts import ModularPrompt, PromptConfig
from bbprompt.texts.mrc import Encoded, Frame, Offsets
from bbprompt.units import Unit, join, plan_units

__all__ = ["LocalOracle", "open_head"]

log = logging.getLogger("bbprompt")

_KEPT_BATCHES = 8
#: Deviations hold the states of so many times the tokens that run at once, on a CPU, where some rows run at a time, and
#: on a GPU: the more candidates, the less their reference costs each.
_HELD, _HELD_AT_ONCE = 16, 4
#: A head reads one candidate for so many tokens that run at once.
_READ = 64
#: Texts that attend together differ by less than so many tokens: less padding, more and smaller steps.
_SLACK = 4
#: Candidates from which on a request is worth a check.
_CHECKED = 4
#: Candidates from which on deviations are worth their float32 reference.
_POPULATION = 8


class LocalOracle:
    """A frozen encoder on this machine's CPU or GPU.

    Args:
        backbone: The stock model with its tokenizer.
        prompt: The artifact behind the oracle.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16", or "mixed": populations in bfloat16, or as bfloat16 deviations from a float32
            reference, where that is exact enough for what tells them apart; everything else in float32.
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
        check_fit(prompt, backbone)
        mixed = dtype == "mixed"
        kind = torch.float32 if mixed else getattr(torch, dtype)
        self._encoder = Encoder(backbone.model, kind, device, backbone.token_type)
        rough = Encoder(backbone.model, torch.bfloat16, device, backbone.token_type) if mixed else None
        limit = backbone.limit(max_tokens)
        self._frame = frame_for(backbone.tokenizer, config.placeholders, limit)
        self._tokenize = tokenize_with(backbone.tokenizer)
        projection = torch.from_numpy(prompt.projection).to(device)
        self._runner = Runner(self._encoder, projection, rough)
        self._rough = None if rough is None else Runner(rough, projection)
        self._held = _HELD if self._encoder.device.type == "cpu" else _HELD_AT_ONCE
        weights = torch.from_numpy(prompt.head_weight), torch.from_numpy(prompt.head_bias)
        self._reads_all = config.pooling is not None  # an embedding is the mean of all rows
        self._head = open_head(backbone, config, weights, self._tokenize, self._frame, self._encoder.device)
        self._used = Counter[str]()
        self._backbone = backbone
        self._kept: OrderedDict[tuple[str, Support], list[Prepared]] = OrderedDict()
        self._portion = Portion(batch_tokens, self._encoder.device, self._kept.clear)
        self._kept_room, self._kept_most = room_to_keep(self._encoder.device), 0
        self._info = info_of(backbone, device, dtype, limit, batch_tokens, prompt)

    @property
    def info(self) -> OracleInfo:
        """What this oracle is."""
        return self._info

    @property
    def kept_bytes(self) -> int:
        """Memory taken by the states that are kept between calls.

        Of at most eight batches of texts, and a quarter of the memory that was free when this was opened. While a
        request is answered, those of the texts that run through the model just then come on top.
        """
        return sum(trunk.bytes for chunks in self._kept.values() for chunk in chunks for trunk in chunk.trunks)

    @property
    def precisions(self) -> dict[str, int]:
        """With "mixed" precision: how many populations were scored in "bfloat16", as "deviations" and in "float32"."""
        return dict(self._used)

    def close(self) -> None:
        """Forget the kept batches."""
        if self._used:
            log.info("precision of populations: %s", ", ".join(f"{n} in {name}" for name, n in self._used.items()))
        if self._kept_most:
            log.info("states kept between calls took at most %.0f MB", self._kept_most / 1e6)
        self._kept.clear()

    def language_model(self) -> LocalLanguageModel | None:
        """The same model without prompts, where label words are read; see `bbprompt.language.language_model_of`."""
        if self._info.readout != "verbalizer":
            return None
        return same_model(self._backbone, self._encoder.device, self._info)

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """Read texts without prompts; see `bbprompt.embedding.Embedder`."""
        marker = marker_for(self._info.backbone)
        return self._portion.fit(
            lambda: embed_texts(self._encoder, self._tokenize, self._frame, texts, marker, self._portion.tokens)
        )

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
        mixed = self._rough is not None and len(checked) >= _CHECKED
        if mixed and not self._reads_all:
            # Of a last layer at a few rows so little is left to compute that no precision pays for its check.
            mixed = self._runner.fork(checked) < len(self._encoder.layers) - 1
        score = self._mixed if mixed else self._exact
        return self._answer(lambda: score(batch, checked, support, longest_answer))

    def check_texts(self, batch: TextBatch) -> None:
        """See that every text can be read; see `bbprompt.readable.Checker`."""
        self._head.sequences(batch)

    def at_once(self, batch: TextBatch, support: Support = "candidates") -> int:
        """Candidates that run through the model together on these texts: the size of a unit.

        Raises:
            TextError: A text does not fit the model.
        """
        return min(max(self._portion.tokens // chunk.tokens, 1) for chunk in self._chunks(batch, support))

    def count_tokens(self, batch: TextBatch, support: Support = "candidates") -> int:
        """Tokens of all texts under one candidate; see `bbprompt.oracle.TokenCounter`."""
        return sum(chunk.tokens for chunk in self._chunks(batch, support))

    @torch.inference_mode()
    def score_unit(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support,
        longest_answer: int | None,
        unit: Unit,
    ) -> Scores:
        """Score the candidates of one unit of a request, in one precision throughout.

        Takes the whole request: which layers are shared is decided by all its points, so that a unit's scores are
        the same bits wherever it is computed.
        """
        checked = check_points(points, self._info)
        return self._answer(lambda: self._units(batch, checked, support, longest_answer, (unit,)))

    def _exact(
        self,
        batch: TextBatch,
        points: NDArray[np.float32],
        support: Support,
        longest_answer: int | None,
        *,
        rough: bool = False,
    ) -> Scores:
        """Scores in one precision throughout: the oracle's, or bfloat16 if `rough`."""
        units = plan_units(len(points), self.at_once(batch, support))
        return self._units(batch, points, support, longest_answer, units, rough=rough)

    def _units(
        self,
        batch: TextBatch,
        points: NDArray[np.float32],
        support: Support,
        longest_answer: int | None,
        units: Sequence[Unit],
        *,
        rough: bool = False,
    ) -> Scores:
        """Scores of some units: chunk by chunk, so that a chunk's states are needed only once, and read all at once."""
        runner = self._rough if rough else self._runner
        if runner is None:
            raise ValueError("this oracle has no bfloat16 encoder")
        chunks, population, outputs = self._chunks(batch, support), runner.population(points), []
        for chunk in chunks:
            lane = self._lane(chunk, runner)
            finish = functools.partial(self._head.apply, chunk.plan)
            done = [runner.run(lane.place, lane.trunk, population, unit, finish) for unit in units]
            outputs.append(done[0] if len(done) == 1 else torch.cat(done))
            self._make_room(chunks, chunk)
        return self._read(batch, chunks, outputs, longest_answer)

    def _read(
        self, batch: TextBatch, chunks: Sequence[Prepared], outputs: Sequence[Tensor], longest_answer: int | None
    ) -> Scores:
        """What the head makes of what it read of each chunk; of a large request, of some candidates at a time."""
        plans, count = [chunk.plan for chunk in chunks], len(outputs[0])
        size = max(self._portion.tokens // _READ, 1)
        parts = [[each[i : i + size] for each in outputs] for i in range(0, count, size)]
        return join([self._head.scores(batch, plans, part, longest_answer) for part in parts])

    def _lane(self, chunk: Prepared, runner: Runner) -> Lane:
        """What a runner needs of a chunk; its texts are embedded where that is not kept."""
        lane = chunk.main if chunk.rough is None or runner is self._runner else chunk.rough
        if not lane.trunk.states:
            states = self._encoder.embed(chunk.ids, chunk.main.place.layout)[None]
            lane.trunk.states.append(states.to(runner.encoder.dtype))
        return lane

    def _mixed(
        self, batch: TextBatch, points: NDArray[np.float32], support: Support, longest_answer: int | None
    ) -> Scores:
        """Scores in the fastest precision whose error is small beside what tells the candidates apart.

        The error on a few texts stands for that on all. Which precision is tried follows from the request alone, so
        the same request gets the same bits at any time.
        """
        probe = Probe.of(batch, points)
        worth = len(points) >= _POPULATION
        chosen = list(probe.pair) if worth else [probe.pair[1]]
        exact = self._exact(probe.batch, points[chosen], support, None)
        right = log_probabilities(exact, probe.batch.sizes)
        if not worth or self._lie_apart(probe, points[chosen], exact, support):
            scores = self._exact(batch, points, support, longest_answer, rough=True)
            found = log_probabilities(scores, batch.sizes)[chosen][:, probe.spans]
            if spread_of(scores, batch.sizes) >= ENOUGH_THROUGHOUT * error_of(found, right):
                self._used["bfloat16"] += 1
                return scores
        if worth:
            scores = self._deviations(batch, points, support, longest_answer)
            found = log_probabilities(scores, batch.sizes)[chosen][:, probe.spans]
            if spread_of(scores, batch.sizes) >= ENOUGH * error_of(found[-1], right[-1]):
                self._used["deviations"] += 1
                return scores
        self._used["float32"] += 1
        return self._exact(batch, points, support, longest_answer)

    def _lie_apart(self, probe: Probe, pair: NDArray[np.float32], exact: Scores, support: Support) -> bool:
        """Whether a large population is likely to lie far enough apart for bfloat16, so that trying it pays.

        Two candidates lie 1 / sqrt(2) as far apart as the population that they are from.
        """
        few, sizes = probe.batch, probe.batch.sizes
        rough = self._exact(few, pair, support, None, rough=True)
        error = error_of(log_probabilities(rough, sizes), log_probabilities(exact, sizes))
        return spread_of(exact, sizes) * 2**0.5 >= ENOUGH_THROUGHOUT * error

    def _deviations(
        self, batch: TextBatch, points: NDArray[np.float32], support: Support, longest_answer: int | None
    ) -> Scores:
        chunks, held, outputs = self._chunks(batch, support), self._held * self._portion.tokens, []
        population = self._runner.population(points)
        for chunk in chunks:
            lane = self._lane(chunk, self._runner)
            finish = functools.partial(self._head.apply, chunk.plan)
            outputs.append(self._runner.run_deviations(lane.place, lane.trunk, population, held, finish))
            self._make_room(chunks, chunk)
        return self._read(batch, chunks, outputs, longest_answer)

    def _answer(self, score: Callable[[], Scores]) -> Scores:
        scores = self._portion.fit(score)
        self._kept_most = max(self._kept_most, self.kept_bytes)
        return scores

    def _make_room(self, running: list[Prepared], done: Prepared) -> None:
        """Where more is kept than there is room for, drop states of the batches that were used longest ago.

        Then those of the chunk that is done, and not of those before it: a request begins with the first ones, so
        that the next finds as many of them as fit.
        """
        others = [chunk for chunks in self._kept.values() if chunks is not running for chunk in reversed(chunks)]
        for chunk in (*others, done):
            if self.kept_bytes <= self._kept_room:
                return
            for trunk in chunk.trunks:
                trunk.forget()

    def _chunks(self, batch: TextBatch, support: Support) -> list[Prepared]:
        key = (batch.digest(), support)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        encoded = self._head.sequences(batch)
        chunks, begin, tokens = [], 0, 0
        for end, item in enumerate(encoded):
            if end > begin and tokens + len(item.ids) > self._portion.tokens:
                chunks.append(self._prepare(encoded[begin:end], support))
                begin, tokens = end, 0
            tokens += len(item.ids)
        chunks.append(self._prepare(encoded[begin:], support))
        self._kept[key] = chunks
        if len(self._kept) > _KEPT_BATCHES:
            self._kept.popitem(last=False)
        return chunks

    def _prepare(self, encoded: list[Encoded], support: Support) -> Prepared:
        device = self._encoder.device
        lengths = [len(item.ids) for item in encoded]
        layout = pack(lengths, device, _SLACK, self._encoder.dtype)
        slots = torch.arange(len(self._frame.placeholders)) + self._frame.prompt_start
        plan = self._head.plan(encoded, layout, support)
        ids = tuple(item.ids for item in encoded)
        main = Lane(Place(layout, layout.rows(slots).flatten(), plan.read), Trunk([]))
        if self._rough is None:
            return Prepared(ids, plan, main, None)
        rough = replace(main.place, layout=pack(lengths, device, _SLACK, torch.bfloat16))
        return Prepared(ids, plan, main, Lane(rough, Trunk([])))


def open_head(
    backbone: Backbone,
    config: PromptConfig,
    weights: tuple[Tensor, Tensor],
    tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
    frame: Frame,
    device: torch.device,
) -> Head:
    """The head that an artifact's config.json names.

    Args:
        backbone: The frozen model.
        config: Of the artifact.
        weights: Weight `(2, H)` and bias `(2,)` of a span head; other heads have none of their own.
        tokenize: Text to token ids and character offsets.
        frame: What surrounds every text.
        device: Where the states are.

    Raises:
        ArtifactError: A verbalizer, and the backbone has no language model head.
    """
    pooling = config.pooling
    if pooling is not None:
        return PrototypeHead(
            pooling.scale, pooling.prefix, pooling.pool_prompt, pooling.threshold, tokenize, frame, device
        )
    if config.readout == "verbalizer":
        if backbone.head is None:
            raise ArtifactError(f"backbone {backbone.id}: a verbalizer readout needs its language model head")
        return VerbalizerHead(
            backbone.head, backbone.gap_token, tokenize, frame, device, backbone.tokenizer.unk_token_id
        )
    return SpanHead(*weights, tokenize, frame, device)
