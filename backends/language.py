"""A local language model as it is asked without prompt vectors; see `bbprompt.language.LanguageModel`.

Masked models run on packed texts as under the oracle, the others by their stock forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.body import Body, CausalBody, body_of
from bbprompt.backends.chunks import Chunk, chunks_of, in_order
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.fit import info_of
from bbprompt.backends.layout import pack
from bbprompt.backends.lm_head import LanguageHead
from bbprompt.backends.memory import Portion
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.language import VocabularyScores
from bbprompt.oracle import OracleInfo, Scores, TextBatch
from bbprompt.tasks.example import Form
from bbprompt.texts.demonstrations import Demonstrations, write_demonstrations
from bbprompt.texts.mrc import Encoded, Frame

__all__ = ["LocalLanguageModel", "same_model"]


class _MaskedBody:
    """A masked model: states `(1, N, R, H)` at the masks of each text."""

    def __init__(self, backbone: Backbone, device: torch.device, dtype: torch.dtype) -> None:
        self._encoder = Encoder(backbone.model, dtype, device, backbone.token_type)

    def states(self, sequences: Sequence[Encoded], frame: Frame, prompts: Tensor | None = None) -> Tensor:
        if prompts is not None:
            raise ValueError("candidates of an encoder are the local oracle's business")
        layout = pack([len(item.ids) for item in sequences], self._encoder.device)
        states = self._encoder.last_states([item.ids for item in sequences], layout)
        width = max(item.spans[0][1] - item.spans[0][0] for item in sequences) + 1
        places = [[min(first + i, last) for i in range(width)] for first, last in (item.spans[0] for item in sequences)]
        return states[:, layout.rows(torch.as_tensor(places))]


class LocalLanguageModel:
    """A frozen masked or causal language model, or one of the T5 family, on this machine's CPU or GPU.

    Args:
        backbone: The stock model with tokenizer and head.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
        batch_tokens: Tokens that run through the model at once, those in front of each text included; halved for
            good where memory runs out.
        max_tokens: Longest sequence; None for the backbone's limit.

    Raises:
        ArtifactError: The backbone was opened without its head.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_tokens: int = 4096,
        max_tokens: int | None = None,
    ) -> None:
        if backbone.head is None:
            raise ArtifactError(f"backbone {backbone.id}: it was opened without its language model head")
        self._device, kind = torch.device(device), getattr(torch, dtype)
        self._lm: LanguageHead = backbone.head.to(self._device)
        limit = backbone.limit(max_tokens)
        self._tokenize, self._unknown = tokenize_with(backbone.tokenizer), backbone.tokenizer.unk_token_id
        self._frame = frame_for(backbone.tokenizer, (), limit, open_end=backbone.head.causal)
        self._gap = backbone.gap_token
        self._packed = backbone.head.kind == "masked"
        self._body: Body = (_MaskedBody if self._packed else body_of)(backbone, self._device, kind)
        self._portion = Portion(batch_tokens, self._device)
        self._head = self._head_in(self._frame)
        self._info = info_of(backbone, device, dtype, limit, batch_tokens)

    @property
    def info(self) -> OracleInfo:
        """What this model is."""
        return self._info

    @property
    def causal(self) -> bool:
        """Whether it continues texts."""
        return self._lm.causal

    @torch.inference_mode()
    def words(self, forms: Sequence[Form], before: Sequence[int] = ()) -> Scores:
        """Score the options of each text in its gap; see `bbprompt.language.LanguageModel`."""
        batch = TextBatch(tuple(forms))
        head, frame = self._head, self._frame
        if before:
            frame = replace(frame, first=(*frame.first, *before))
            head = self._head_in(frame)
        sequences = head.sequences(batch)

        def compute() -> Scores:
            chunks, plans, outputs = self._chunks(sequences, frame), [], []
            for chunk in chunks:
                some = chunk.sequences
                plan = head.plan(some, pack([len(item.ids) for item in some]), "candidates")
                plans.append(plan)
                outputs.append(head.apply(plan, self._body.states(some, frame)))
            return head.scores(batch, plans, in_order(chunks, outputs), None)

        return self._portion.fit(compute)

    def check_texts(self, batch: TextBatch) -> None:
        """See that every text can be read with nothing in front; see `bbprompt.readable.Checker`."""
        self._head.sequences(batch)

    @torch.inference_mode()
    def vocabulary(self, forms: Sequence[Form], tokens: Sequence[int] | None = None) -> VocabularyScores:
        """Score tokens in the gap of each text; see `bbprompt.language.LanguageModel`."""
        bare = TextBatch(tuple(replace(form, options=()) for form in forms))
        sequences = self._head.sequences(bare)

        def compute() -> NDArray[np.float32]:
            chunks, pieces = self._chunks(sequences, self._frame), []
            for chunk in chunks:
                states = self._body.states(chunk.sequences, self._frame)
                logs = self._lm.vocabulary(self._lm.transform(states[0, :, 0].float()))
                pieces.append((logs if tokens is None else logs[:, list(tokens)]).cpu()[None])
            return np.concatenate([piece[0].numpy() for piece in in_order(chunks, pieces)])

        return VocabularyScores(self._portion.fit(compute), sum(item.cut for item in sequences))

    def demonstrate(self, shown: Sequence[tuple[Form, int]]) -> Demonstrations:
        """Write solved examples into half of the room for a text; see `bbprompt.language.LanguageModel`."""
        if not self.causal:
            raise UsageError(f"backbone {self._info.backbone}: it is no causal language model and continues no text")
        return write_demonstrations(shown, self._tokenize, self._frame.room // 2)

    @torch.inference_mode()
    def recall(self, shown: Sequence[tuple[Form, int]], demonstrations: Demonstrations) -> Scores:
        """Score every demonstration behind the earlier ones; see `bbprompt.language.LanguageModel`."""
        if not isinstance(body := self._body, CausalBody):
            raise UsageError(f"backbone {self._info.backbone}: it is no causal language model and continues no text")
        ids = (*self._frame.first, *demonstrations.ids)
        states = self._portion.fit(lambda: body.run(ids)).last_hidden_state
        shift = len(self._frame.first) - 1
        rows = torch.as_tensor([shift + gap for gap in demonstrations.gaps], device=self._device)
        batch = TextBatch(tuple(form for form, _ in shown[: len(rows)]))
        features = self._lm.transform(states[:, rows, None].float())
        return self._head.scores(batch, [], [features], None)

    def close(self) -> None:
        """Nothing is held beside the model."""

    def _head_in(self, frame: Frame) -> VerbalizerHead:
        return VerbalizerHead(self._lm, self._gap, self._tokenize, frame, self._device, self._unknown)

    def _chunks(self, sequences: Sequence[Encoded], frame: Frame) -> list[Chunk]:
        shared = frame.text_start if self.causal else 0
        return chunks_of(sequences, self._portion.tokens, shared=shared, padded=not self._packed)


def same_model(backbone: Backbone, device: torch.device, info: OracleInfo) -> LocalLanguageModel:
    """The language model behind an oracle, as it is asked without prompts.

    Args:
        backbone: Of the oracle.
        device: Where it runs.
        info: Of the oracle; what it mixes precisions for are populations, so a model without them is float32.
    """
    return LocalLanguageModel(
        backbone,
        device=str(device),
        dtype="float32" if info.precision == "mixed" else info.precision,
        batch_tokens=info.batch_tokens,
        max_tokens=info.max_tokens,
    )
