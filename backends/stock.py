"""The local oracle for models that run by their stock forward: causal ones and encoder-decoders, with a verbalizer.

As in BBT and BBTv2 for GPT-2, placeholder tokens stand at the front and the prompt of layer l is added to their states
before block l; a shallow prompt is the one before the first. A prepended one has rows of its own in front. How a family
runs is its body's business. Only the state that tells the word in the gap is read, and only the output rows of the
option words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.body import Body, body_of, check_embeds
from bbprompt.backends.fit import check_fit, info_of
from bbprompt.backends.layout import pack
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.errors import ArtifactError
from bbprompt.oracle import OracleInfo, Scores, Support, TextBatch, check_points
from bbprompt.prompts import ModularPrompt
from bbprompt.texts.mrc import Encoded
from bbprompt.units import Unit, join, plan_units

__all__ = ["StockOracle"]


class StockOracle:
    """A frozen causal language model or encoder-decoder on this machine's CPU or GPU, with a verbalizer readout.

    Args:
        backbone: The stock model with tokenizer and head.
        prompt: The artifact behind the oracle; its readout is a verbalizer.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
        batch_tokens: Tokens that run through the model at once (candidates times texts, padding included).
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
        unknown = backbone.tokenizer.unk_token_id
        self._head = VerbalizerHead(backbone.head, backbone.gap_token, tokenize, self._frame, self._device, unknown)
        self._projection = torch.from_numpy(prompt.projection).to(self._device)
        self._batch_tokens = batch_tokens
        self._info = info_of(backbone, device, dtype, limit, batch_tokens, prompt)

    @property
    def info(self) -> OracleInfo:
        """What this oracle is."""
        return self._info

    def close(self) -> None:
        """Nothing is kept between calls."""

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
        chunks = self._chunks(batch)
        units = plan_units(len(checked), self._fits(chunks))
        return join([self._unit(batch, chunks, checked, support, longest_answer, unit) for unit in units])

    def check_texts(self, batch: TextBatch) -> None:
        """See that every text can be read; see `bbprompt.readable.Checker`."""
        self._head.sequences(batch)

    def at_once(self, batch: TextBatch, support: Support = "candidates") -> int:
        """Candidates that run through the model together on these texts: the size of a unit.

        Raises:
            TextError: A text does not fit the model.
        """
        return self._fits(self._chunks(batch))

    def count_tokens(self, batch: TextBatch, support: Support = "candidates") -> int:
        """Tokens of all texts under one candidate; see `bbprompt.oracle.TokenCounter`."""
        return sum(len(item.ids) for item in self._head.sequences(batch))

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
        return self._unit(batch, self._chunks(batch), checked, support, longest_answer, unit)

    def _chunks(self, batch: TextBatch) -> list[list[Encoded]]:
        """The texts as sequences, as many together as run through the model at once under one candidate."""
        chunks: list[list[Encoded]] = []
        width = 0
        for item in self._head.sequences(batch):
            width = max(width, len(item.ids))
            if not chunks or (len(chunks[-1]) + 1) * width > self._batch_tokens:
                chunks.append([])
                width = len(item.ids)
            chunks[-1].append(item)
        return chunks

    def _fits(self, chunks: Sequence[Sequence[Encoded]]) -> int:
        most = max(len(some) * max(len(item.ids) for item in some) for some in chunks)
        return max(self._batch_tokens // most, 1)

    def _unit(
        self,
        batch: TextBatch,
        chunks: Sequence[Sequence[Encoded]],
        points: NDArray[np.float32],
        support: Support,
        longest_answer: int | None,
        unit: Unit,
    ) -> Scores:
        candidates = torch.from_numpy(points[unit.first : unit.last]).to(self._device)
        prompts = torch.einsum("nld,ldx->nlx", candidates, self._projection)
        prompts = prompts.view(*prompts.shape[:2], len(self._frame.placeholders), -1)
        plans = [self._head.plan(some, pack([len(item.ids) for item in some]), support) for some in chunks]
        outputs = [
            self._head.apply(plan, self._body.states(some, self._frame, prompts))
            for plan, some in zip(plans, chunks, strict=True)
        ]
        return self._head.scores(batch, plans, outputs, longest_answer)
