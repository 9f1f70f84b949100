"""The local oracle for models that run by their stock forward: causal ones and encoder-decoders, with a verbalizer.

As in BBT and BBTv2 for GPT-2, placeholder tokens stand at the front and the prompt of layer l is added to their states
before block l; a shallow prompt is the one before the first. A prepended one has rows of its own in front. How a family
runs is its body's business. Only the state that tells the word in the gap is read, and only the output rows of the
option words.

Where all candidates of a request have the same prompts in the first layers, as in each step of a sweep over the layers
(BBTv2, deep MP2), these layers run once for all of them. What they give is kept for the next request, as far as there
is room, until the prompts in these layers change.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.body import body_of, check_embeds
from bbprompt.backends.chunks import Chunk, chunks_of, in_order
from bbprompt.backends.families import can_fork
from bbprompt.backends.fit import check_fit, info_of
from bbprompt.backends.language import LocalLanguageModel, same_model
from bbprompt.backends.layout import pack
from bbprompt.backends.memory import Portion, room_to_keep
from bbprompt.backends.stocktrunk import StockTrunk
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead, VerbalizerPlan
from bbprompt.errors import ArtifactError
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points
from bbprompt.prompts import ModularPrompt
from bbprompt.units import Unit, join, plan_units

__all__ = ["StockOracle"]

_log = logging.getLogger("bbprompt")

_KEPT_BATCHES = 8
#: Tokens of all kept batches; an id takes some 40 bytes.
_KEPT_TOKENS = 1 << 20


@dataclass(slots=True)
class _Texts:
    """A batch, ready to run.

    Attributes:
        chunks: As many texts together as run through the model at once under one candidate.
        plans: How the head reads each chunk.
        tokens: How many there are in all texts.
        shared: What the candidates of the last request shared, as far as it is kept: their points `(l, d)` in the
            first layers, and what these give.
    """

    chunks: tuple[Chunk, ...]
    plans: tuple[VerbalizerPlan, ...]
    tokens: int
    shared: tuple[NDArray[np.float32], StockTrunk] | None = None

    @property
    def bytes(self) -> int:
        """Memory that is taken by what candidates shared."""
        return 0 if self.shared is None else self.shared[1].bytes


class StockOracle:
    """A frozen causal language model or encoder-decoder on this machine's CPU or GPU, with a verbalizer readout.

    Args:
        backbone: The stock model with tokenizer and head.
        prompt: The artifact behind the oracle; its readout is a verbalizer.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
        batch_tokens: Tokens that run through the model at once (candidates times texts, padding included);
            halved for good where memory runs out.
        max_tokens: Longest sequence; None for the backbone's limit.

    Raises:
        ArtifactError: The prompts are for another backbone or readout, or the backbone takes no rows before a text.
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
        check_fit(prompt, backbone)
        config = prompt.config
        if config.readout != "verbalizer" or backbone.head is None:
            raise ArtifactError(
                f"backbone {backbone.id}: such a language model is read by a verbalizer, not by '{config.readout}'; "
                "choose other --prompts"
            )
        if config.injection == "prepend":
            check_embeds(backbone)
        self._device = torch.device(device)
        self._body = body_of(backbone, self._device, getattr(torch, dtype))
        limit = backbone.limit(max_tokens)
        self._frame = frame_for(backbone.tokenizer, config.placeholders, limit, open_end=backbone.head.causal)
        tokenize = tokenize_with(backbone.tokenizer)
        # A causal model runs what stands before the texts once for each candidate.
        self._shared = self._frame.text_start if backbone.head.causal else 0
        unknown = backbone.tokenizer.unk_token_id
        self._head = VerbalizerHead(backbone.head, backbone.gap_token, tokenize, self._frame, self._device, unknown)
        self._projection = torch.from_numpy(prompt.projection).to(self._device)
        self._backbone = backbone
        self._kept: OrderedDict[tuple[str, Support], _Texts] = OrderedDict()
        self._forks: dict[int, bool] = {}
        self._portion = Portion(batch_tokens, self._device, self._kept.clear)
        self._kept_room, self._kept_most = room_to_keep(self._device), 0
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
        return sum(texts.bytes for texts in self._kept.values())

    def close(self) -> None:
        """Forget the kept batches."""
        if self._kept_most:
            _log.info("states kept between calls took at most %.0f MB", self._kept_most / 1e6)
        self._kept.clear()

    def language_model(self) -> LocalLanguageModel:
        """The same model without prompts; see `bbprompt.language.language_model_of`."""
        return same_model(self._backbone, self._device, self._info)

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

        def compute() -> Scores:
            texts = self._texts(batch, support)
            units = plan_units(len(checked), self._fits(texts))
            return join([self._unit(batch, texts, checked, support, longest_answer, unit) for unit in units])

        return self._portion.fit(compute)

    def check_texts(self, batch: TextBatch) -> None:
        """See that every text can be read; see `bbprompt.readable.Checker`."""
        self._head.sequences(batch)

    def at_once(self, batch: TextBatch, support: Support = "candidates") -> int:
        """Candidates that run through the model together on these texts: the size of a unit.

        Raises:
            TextError: A text does not fit the model.
        """
        return self._fits(self._texts(batch, support))

    def count_tokens(self, batch: TextBatch, support: Support = "candidates") -> int:
        """Tokens of all texts under one candidate; see `bbprompt.oracle.TokenCounter`."""
        return self._texts(batch, support).tokens

    @torch.inference_mode()
    def score_unit(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support,
        longest_answer: int | None,
        unit: Unit,
    ) -> Scores:
        """Score the candidates of one unit of a request; they are the same bits wherever that is done."""
        checked = check_points(points, self._info)
        return self._portion.fit(
            lambda: self._unit(batch, self._texts(batch, support), checked, support, longest_answer, unit)
        )

    def _texts(self, batch: TextBatch, support: Support) -> _Texts:
        key = (batch.digest(), support)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        sequences = self._head.sequences(batch)
        chunks = tuple(chunks_of(sequences, self._portion.tokens, shared=self._shared))
        plans = tuple(
            self._head.plan(chunk.sequences, pack([len(item.ids) for item in chunk.sequences]), support)
            for chunk in chunks
        )
        texts = self._kept[key] = _Texts(chunks, plans, sum(len(item.ids) for item in sequences))
        while len(self._kept) > _KEPT_BATCHES or sum(kept.tokens for kept in self._kept.values()) > _KEPT_TOKENS:
            self._kept.popitem(last=False)
        return texts

    def _fits(self, texts: _Texts) -> int:
        return max(self._portion.tokens // max(chunk.cells for chunk in texts.chunks), 1)

    def _unit(
        self,
        batch: TextBatch,
        texts: _Texts,
        points: NDArray[np.float32],
        support: Support,
        longest_answer: int | None,
        unit: Unit,
    ) -> Scores:
        fork = self._fork(points)
        candidates = torch.from_numpy(points[unit.first : unit.last, fork:]).to(self._device)
        prompts = torch.einsum("nld,ldx->nlx", candidates, self._projection[fork:])
        prompts = prompts.view(*prompts.shape[:2], len(self._frame.placeholders), -1)
        trunk = self._trunk(texts, points[0, :fork]) if fork else None
        run, outputs = self._body.under(self._frame, prompts, trunk), []
        for number, (plan, chunk) in enumerate(zip(texts.plans, texts.chunks, strict=True)):
            outputs.append(self._head.apply(plan, run(number, chunk.sequences)))
            if trunk is not None:
                self._make_room(texts, trunk, number)
        self._kept_most = max(self._kept_most, self.kept_bytes)
        return self._head.scores(batch, texts.plans, in_order(texts.chunks, outputs), longest_answer)

    def _fork(self, points: NDArray[np.float32]) -> int:
        """The first layer in which the candidates of a request differ: those before run once for all of them.

        The first of all where they differ in none, as a candidate alone, and where the model cannot go on from the
        states that enter a layer. It follows from the whole request, so that the scores of a unit do not depend on who
        computes the others.
        """
        differs = (points != points[:1]).any(axis=(0, 2))
        fork = int(differs.argmax())
        if fork and fork not in self._forks:
            self._forks[fork] = can_fork(self._backbone, self._body, fork)
        return fork if fork and self._forks[fork] else 0

    def _trunk(self, texts: _Texts, below: NDArray[np.float32]) -> StockTrunk:
        """What candidates with these points `(l, d)` in the first layers share.

        Taken further from what is kept, or else computed anew; always for one candidate and a prompt alone, so that a
        reply does not depend on what was scored before.
        """
        points, trunk = texts.shared or (below[:0], StockTrunk())
        if len(points) > len(below) or not np.array_equal(points, below[: len(points)]):
            points, trunk = below[:0], StockTrunk()
        if len(points) < len(below):
            moved = torch.from_numpy(below).to(self._device)
            made = [moved[layer] @ self._projection[layer] for layer in range(len(points), len(below))]
            prompts = torch.stack(made).view(len(made), len(self._frame.placeholders), -1)
            trunk = self._body.grown(trunk, self._frame, prompts)
        texts.shared = below.copy(), trunk
        return trunk

    def _make_room(self, running: _Texts, trunk: StockTrunk, done: int) -> None:
        """Where more is kept than there is room for, drop what is kept of the batches that were used longest ago.

        But first of the chunk that is done, where this batch alone is too large, and not of those before it: a request
        begins with the first ones, so that the next finds as many of them as fit. And all of it, where not even what
        stands before the texts fits.
        """
        if trunk.bytes > self._kept_room:
            trunk.texts.pop(done, None)
            if trunk.bytes > self._kept_room:
                running.shared = None
        others = [texts for texts in self._kept.values() if texts is not running]
        while others and running.bytes + sum(texts.bytes for texts in others) > self._kept_room:
            others.pop(0).shared = None
