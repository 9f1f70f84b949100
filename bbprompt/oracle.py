"""The frozen model as the search sees it: points in, scores out, forward only.

A candidate is an intrinsic point u (L, d). The prompts (projection, head) live behind the oracle, so a
candidate costs a few kB wherever the model is. Texts travel as a `TextBatch` that an oracle may keep by its
digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import OracleError
from bbprompt.tasks.example import Answer, Form

__all__ = [
    "Oracle",
    "OracleInfo",
    "ReadoutKind",
    "Scores",
    "Support",
    "TextBatch",
    "TokenCounter",
    "can_count",
    "check_points",
    "check_scores",
    "precisions_of",
]

#: Positions that start and end probabilities are normalised over: the candidates (option borders; the context
#: for extraction), or the whole sequence as in the released code.
Support = Literal["candidates", "sequence"]

#: How options are scored behind the oracle: by start and end logits of their spans in the text; by similarity to
#: their own words, text and words pooled under the prompt; by the language model head at a mask or next token.
ReadoutKind = Literal["span", "prototype", "verbalizer"]


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts that are scored together, written out for machine reading.

    Attributes:
        forms: The N texts.
        answers: For extraction the known answer of each text, None where there is none; empty otherwise.
    """

    forms: tuple[Form, ...]
    answers: tuple[Answer | None, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of scored spans of each text: its options, or one for a known answer."""
        if self.answers:
            return tuple(0 if answer is None else 1 for answer in self.answers)
        return tuple(len(form.options) for form in self.forms)

    @property
    def extractive(self) -> bool:
        """Whether answers are to be found in the texts rather than among options."""
        return bool(self.forms) and self.forms[0].context >= 0 and not self.forms[0].options

    def digest(self) -> str:
        """SHA-256 of everything in it."""
        return hashlib.sha256(repr((self.forms, self.answers)).encode("utf-8")).hexdigest()


@dataclass(frozen=True, slots=True)
class OracleInfo:
    """What an oracle says of itself; reading it costs nothing.

    Attributes:
        backbone: Id of the frozen model.
        backbone_digest: SHA-256 of its weights.
        prompts_digest: SHA-256 of the prompt artifact behind it.
        layers: L, layers that carry a prompt.
        dim: d, intrinsic dimension.
        precision: "float32", "bfloat16", "mixed" (bfloat16 where its error is small beside what is compared), or
            "unknown" of a server that does not tell.
        device: Where it runs, in words.
        max_tokens: Longest sequence in tokens.
        readout: How it scores options.
        versions: Of the libraries that decide its last bits; empty where they are not known.
        batch_tokens: Tokens that run through it at once, as it was opened, which decides last bits, too; 0 where that
            is not known. Where memory runs out it computes with fewer from then on, and says so in its log.
        piece: Candidates of a request to a server, into which populations are cut; 0 where none are.
    """

    backbone: str
    backbone_digest: str
    prompts_digest: str
    layers: int
    dim: int
    precision: str
    device: str
    max_tokens: int
    readout: ReadoutKind = "span"
    versions: str = ""
    batch_tokens: int = 0
    piece: int = 0

    def digest(self) -> str:
        """SHA-256 of all of it: where anything differs, answers may."""
        return hashlib.sha256(repr(self).encode("utf-8")).hexdigest()

    @property
    def channels(self) -> int:
        """C, scores that an option has: a start and an end logit from the span head, else one logit."""
        return 2 if self.readout == "span" else 1


@dataclass(frozen=True, slots=True)
class Scores:
    """What n candidates give on N texts with O scored options in all (texts in order, options in order).

    C channels: the span head gives two, start and end; every other readout gives one.

    Attributes:
        logits: `(n, O, C)` raw logits. Span head: start logit at the first, end logit at the last token of each
            span (for extraction the spans are the known answers).
        normalizer: `(n, N, C)` log-sum-exp of each channel over the support; with one channel always over the
            options of the text.
        best: `(n, N, 2)` character span in the context of the best answer; None when not asked for.
        cut: Number of tokens that did not fit and were cut from the N texts.
    """

    logits: NDArray[np.float32]
    normalizer: NDArray[np.float32]
    best: NDArray[np.int64] | None
    cut: int

    def of(self, candidate: int) -> Scores:
        """What one of the candidates gives."""
        at = slice(candidate, candidate + 1)
        best = None if self.best is None else self.best[at]
        return Scores(self.logits[at], self.normalizer[at], best, self.cut)


class Oracle(Protocol):
    """A frozen model that can only be called forward.

    The same request gives the same reply. Nothing about a candidate is kept that could change a later reply.
    """

    @property
    def info(self) -> OracleInfo:
        """What this oracle is."""

    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score every candidate on every text.

        Args:
            batch: N texts.
            points: `(n, L, d)` candidates.
            support: What probabilities are normalised over.
            longest_answer: Extraction: also find the best answer of at most so many tokens; None: do not.

        Raises:
            OracleError: The model cannot be reached or breaks its contract.
            TextError: A text does not fit the model.
        """

    def close(self) -> None:
        """Let go of the model; safe to call twice."""


class TokenCounter(Protocol):
    """A model that knows how many tokens it reads."""

    def count_tokens(self, batch: TextBatch, support: Support = "candidates") -> int:
        """Tokens of all texts under one candidate, special tokens and prompt positions included.

        Raises:
            TextError: A text does not fit the model.
        """


def can_count(model: object) -> TypeGuard[TokenCounter]:
    """Whether a model counts tokens: one that is here does, one behind a wire does not."""
    return callable(getattr(model, "count_tokens", None))


def precisions_of(model: object) -> dict[str, int]:
    """How many populations a model that mixes precisions scored in each of them; empty for any other."""
    return dict(getattr(model, "precisions", {}))


def check_points(points: NDArray[np.floating], info: OracleInfo) -> NDArray[np.float32]:
    """Candidates as `(n, L, d)` float32, copied where they may not be written to: torch takes no such array.

    Raises:
        OracleError: The shape is not the oracle's, or a value is not finite.
    """
    array = np.require(points, np.float32, ("C", "W"))
    if array.ndim != 3 or array.shape[1:] != (info.layers, info.dim) or not len(array):
        raise OracleError(
            f"points have shape {array.shape}, the model takes (n, {info.layers}, {info.dim}) with n >= 1"
        )
    if not np.isfinite(array).all():
        raise OracleError("points hold NaN or infinity")
    return array


def check_scores(scores: Scores, batch: TextBatch, candidates: int, *, channels: int, answers: bool = False) -> Scores:
    """Return `scores` if they answer the request.

    Args:
        scores: The reply.
        batch: The texts that were sent.
        candidates: How many points were sent.
        channels: C, as the oracle says of itself.
        answers: Whether best answers were asked for of texts that have them.

    Raises:
        OracleError: A shape is wrong, a value is not finite, or an answer lies outside its context.
    """
    texts = len(batch.forms)
    _expect("logits", scores.logits, (candidates, sum(batch.sizes), channels))
    _expect("normalizer", scores.normalizer, (candidates, texts, channels))
    if scores.best is not None:
        _expect("best", scores.best, (candidates, texts, 2))
        if not batch.extractive:
            raise OracleError("the oracle answered best spans for texts that have options")
        ends = [len(form.parts[form.context].text) for form in batch.forms]
        first, last = scores.best[..., 0], scores.best[..., 1]
        if (first < 0).any() or (last < first).any() or (last > np.asarray(ends)).any():
            raise OracleError("the oracle answered best with a span outside its context")
    elif answers and batch.extractive:
        raise OracleError("the oracle answered no best spans although they were asked for")
    return scores


def _expect(name: str, array: NDArray[np.generic], shape: Sequence[int]) -> None:
    if array.shape != tuple(shape):
        raise OracleError(f"the oracle answered {name} of shape {array.shape}, expected {tuple(shape)}")
    if not np.isfinite(array).all():
        raise OracleError(f"the oracle answered {name} with NaN or infinity")
