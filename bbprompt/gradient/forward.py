"""The model with gradients towards prompt or weights: the very forward and readout that an oracle scores with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.body import body_of
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import Layout, pack
from bbprompt.backends.local import open_head
from bbprompt.backends.population import Place, Runner, Trunk
from bbprompt.backends.precision import warn_of_slow
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.oracle import Scores, Support, TextBatch
from bbprompt.pretrain.linear import DifferentiableLinear
from bbprompt.prompts import PromptConfig
from bbprompt.readout import right_spans
from bbprompt.scoring import Labelled
from bbprompt.texts.mrc import Encoded
from bbprompt.units import Unit

__all__ = ["Forward", "Piece"]

_Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some texts that run through the model at once.

    Attributes:
        data: The texts with what is right.
        plan: How the head reads them.
        states: Last states under a prompt `(L, P, H)`, of one candidate, as the head reads them.
    """

    data: Labelled
    plan: Any
    states: _Forward


class Forward:
    """A local model.

    Args:
        backbone: The stock model with its tokenizer.
        config: Of the prompts: placeholders and readout.
        weights: Weight `(2, H)` and bias `(2,)` of the span head, which may be parameters.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16"; prompts and head are float32 whatever it is.
        limit: Longest sequence in tokens.
        support: What probabilities are normalised over.
        batch_tokens: Tokens whose states are held at once for the way back.
        learns: The model is an encoder whose parameters may change between two calls and may get gradients; else its
            weights stay as they are.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: PromptConfig,
        weights: tuple[Tensor, Tensor],
        *,
        device: str,
        dtype: str,
        limit: int,
        support: Support,
        batch_tokens: int,
        learns: bool = False,
    ) -> None:
        causal = backbone.head is not None and backbone.head.causal
        self.device, self._support, self._batch_tokens = torch.device(device), support, batch_tokens
        self.channels = 2 if config.readout == "span" else 1
        self._frame = frame_for(backbone.tokenizer, config.placeholders, limit, open_end=causal)
        self._head = open_head(backbone, config, weights, tokenize_with(backbone.tokenizer), self._frame, self.device)
        self._backbone, self._dtype, self._learns = backbone, getattr(torch, dtype), learns

    @functools.cached_property
    def _bound(self) -> Callable[[Sequence[Encoded], Layout, Any], _Forward]:
        """The model around some texts; read out at the first ones, for checking texts needs none of it."""
        backbone = self._backbone
        if self._learns:
            warn_of_slow(self._dtype, self.device.type)
            return self._learning
        if backbone.packed:
            encoder = Encoder(
                backbone.model, self._dtype, self.device, backbone.token_type, linear=DifferentiableLinear
            )
            return functools.partial(self._packed, encoder)
        body = body_of(backbone, self.device, self._dtype)
        return lambda sequences, layout, plan: lambda prompt: body.states(sequences, self._frame, prompt[None])

    def check_texts(self, batch: TextBatch) -> None:
        """See that every text can be read; see `bbprompt.readable.Checker`."""
        self._head.sequences(batch)

    def tokens(self, batch: TextBatch) -> list[tuple[int, ...]]:
        """The token ids of each sequence that is made of some texts.

        Raises:
            TextError: A text does not fit the model.
        """
        return [item.ids for item in self._head.sequences(batch)]

    def pieces(self, data: Labelled) -> list[Piece]:
        """Cut labelled texts into pieces of at most `batch_tokens` tokens, in order; a text is never cut in two.

        Raises:
            TextError: A text does not fit the model.
        """
        sizes = [sum(len(item.ids) for item in self._head.sequences(_part(data, n, n + 1).batch)) for n in _all(data)]
        bounds, tokens = [0], 0
        for number, size in enumerate(sizes):
            if tokens and tokens + size > self._batch_tokens:
                bounds.append(number)
                tokens = 0
            tokens += size
        return [self._piece(_part(data, a, b)) for a, b in zip(bounds, [*bounds[1:], len(sizes)], strict=True)]

    def losses(self, piece: Piece, prompt: Tensor) -> Tensor:
        """Cross-entropy of each text of a piece `(N,)`, mean over start and end, as `bbprompt.readout` has it."""
        logits, normalizer = self._head.values(piece.data.batch, [piece.plan], [self._output(piece, prompt)])
        right = torch.as_tensor(right_spans(piece.data.batch, piece.data.gold), device=logits.device)
        return (normalizer[0] - logits[0, right]).mean(-1)

    @torch.no_grad()
    def scores(self, pieces: Sequence[Piece], prompt: Tensor, longest_answer: int | None) -> Scores:
        """What an oracle would answer for all texts of some pieces under one candidate."""
        parts = [
            self._head.scores(piece.data.batch, [piece.plan], [self._output(piece, prompt)], longest_answer)
            for piece in pieces
        ]
        best = [part.best for part in parts if part.best is not None]
        return Scores(
            np.concatenate([part.logits for part in parts], axis=1),
            np.concatenate([part.normalizer for part in parts], axis=1),
            np.concatenate(best, axis=1) if best else None,
            sum(part.cut for part in parts),
        )

    def _output(self, piece: Piece, prompt: Tensor) -> Tensor:
        return self._head.apply(piece.plan, piece.states(prompt))

    def _piece(self, data: Labelled) -> Piece:
        sequences = self._head.sequences(data.batch)
        layout = pack([len(item.ids) for item in sequences], self.device)
        plan = self._head.plan(sequences, layout, self._support)
        return Piece(data, plan, self._bound(sequences, layout, plan))

    def _packed(self, encoder: Encoder, sequences: Sequence[Encoded], layout: Layout, plan: Any) -> _Forward:
        slots = torch.arange(len(self._frame.placeholders)) + self._frame.prompt_start
        place = Place(layout, layout.rows(slots).flatten(), plan.read)
        entering = encoder.embed([item.ids for item in sequences], layout)[None]

        def states(prompt: Tensor) -> Tensor:
            # A prompt is its own projection at the point 1, see `bbprompt.frozen`.
            one = np.ones((1, len(prompt), 1), dtype=np.float32)
            runner = Runner(encoder, prompt.flatten(1)[:, None])
            return runner.run(place, Trunk([entering]), runner.population(one), Unit(0, 1), lambda last: last)

        return states

    def _learning(self, sequences: Sequence[Encoded], layout: Layout, plan: Any) -> _Forward:
        backbone = self._backbone

        def states(prompt: Tensor) -> Tensor:
            encoder = Encoder(backbone.model, self._dtype, self.device, backbone.token_type, prepack=False, learns=True)
            return self._packed(encoder, sequences, layout, plan)(prompt)

        return states


def _all(data: Labelled) -> range:
    return range(len(data.batch.forms))


def _part(data: Labelled, first: int, last: int) -> Labelled:
    at = slice(first, last)
    return Labelled(TextBatch(data.batch.forms[at], data.batch.answers[at]), data.gold[at], data.answers[at])
