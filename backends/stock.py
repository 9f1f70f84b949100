"""The local oracle for models that run by their stock forward: causal ones and encoder-decoders, with a verbalizer.

As in BBT and BBTv2 for GPT-2, placeholder tokens stand at the front and the prompt of layer l is added to their states
before block l; a shallow prompt is the one before the first. A prepended one has rows of its own in front. How a family
runs is its body's business. Only the state that tells the word in the gap is read, and only the output rows of the
option words.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.body import Body, body_of, check_embeds
from bbprompt.backends.chunks import Chunk, chunks_of, in_order
from bbprompt.backends.fit import check_fit, info_of
from bbprompt.backends.language import LocalLanguageModel, same_model
from bbprompt.backends.layout import pack
from bbprompt.backends.memory import Portion
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead, VerbalizerPlan
from bbprompt.errors import ArtifactError
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points
from bbprompt.prompts import ModularPrompt
from bbprompt.units import Unit, join, plan_units

__all__ = ["StockOracle"]

_KEPT_BATCHES = 8
#: Tokens of all kept batches; an id takes some 40 bytes.
_KEPT_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class _Texts:
    """A batch, ready to run.

    Attributes:
        chunks: As many texts together as run through the model at once under one candidate.
        plans: How the head reads each chunk.
        tokens: How many there are in all texts.
    """

    chunks: tuple[Chunk, ...]
    plans: tuple[VerbalizerPlan, ...]
    tokens: int


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
        self._body: Body = body_of(backbone, self._device, getattr(torch, dtype))
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
        self._portion = Portion(batch_tokens, self._device, self._kept.clear)
        self._info = info_of(backbone, device, dtype, limit, batch_tokens, prompt)

    @property
    def info(self) -> OracleInfo:
        """What this oracle is."""
        return self._info

    def close(self) -> None:
        """Forget the kept batches."""
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
        candidates = torch.from_numpy(points[unit.first : unit.last]).to(self._device)
        prompts = torch.einsum("nld,ldx->nlx", candidates, self._projection)
        prompts = prompts.view(*prompts.shape[:2], len(self._frame.placeholders), -1)
        outputs = [
            self._head.apply(plan, self._body.states(chunk.sequences, self._frame, prompts))
            for plan, chunk in zip(texts.plans, texts.chunks, strict=True)
        ]
        return self._head.scores(batch, texts.plans, in_order(texts.chunks, outputs), longest_answer)
