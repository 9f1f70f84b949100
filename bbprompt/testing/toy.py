"""A frozen "model" without a model, and one that breaks its contract when told to."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import DataError, OracleError
from bbprompt.oracle import Oracle, OracleInfo, Scores, Support, TextBatch, check_points
from bbprompt.texts.mrc import Encoded, Frame, encode

__all__ = ["FaultyOracle", "ToyOracle"]

_WIDTH = 8
_PLACEHOLDERS = 2


class ToyOracle:
    """A forward-only oracle in plain numpy: fast, deterministic, smooth in its points.

    A token is a character with a fixed random vector e. With f the token among its neighbours and g the mean of
    its text, start and end logits are f^T M(u) [g, 1], where M(u) = tanh(R u) and R is random: a small model whose
    few-shot loss can be tuned and generalizes a little. Layout, spans and cutting are those of `bbprompt.texts.mrc`.

    Args:
        layers: L, layers that carry a prompt.
        dim: d, intrinsic dimension.
        seed: Of the fixed random numbers.
        max_tokens: Longest sequence in characters.
    """

    def __init__(self, layers: int = 3, dim: int = 4, *, seed: int = 0, max_tokens: int = 256) -> None:
        size = layers * dim
        rng = np.random.default_rng(seed)
        self._mixing = rng.normal(0.0, size**-0.5, (size, 2 * _WIDTH * (_WIDTH + 1)))
        self._seed = seed
        self._vectors: dict[int, NDArray[np.float64]] = {}
        self._frame = Frame((0,), tuple(range(1, 1 + _PLACEHOLDERS)), (3,), max_tokens)
        name = f"toy {layers} {dim} {seed} {max_tokens}"
        digest = hashlib.sha256(name.encode()).hexdigest()
        self._info = OracleInfo("toy", digest, digest, layers, dim, "float32", "numpy", max_tokens)

    @property
    def info(self) -> OracleInfo:
        """What this oracle is."""
        return self._info

    def close(self) -> None:
        """Nothing is held."""

    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score every candidate on every text; see `bbprompt.oracle.Oracle`."""
        checked = check_points(points, self._info)
        encoded = self._encoded(batch)
        weights = np.tanh(checked.reshape(len(checked), -1).astype(np.float64) @ self._mixing)
        weights = weights.reshape(len(checked), 2, _WIDTH, _WIDTH + 1)
        logits, normalizer, best = [], [], []
        for item in encoded:
            both = self._logits(item, weights)
            starts, ends = _support(item, support)
            logits += [np.stack((both[:, a, 0], both[:, b, 1]), axis=1) for a, b in item.spans]
            normalizer.append(
                np.stack(
                    (np.logaddexp.reduce(both[:, starts, 0], 1), np.logaddexp.reduce(both[:, ends, 1], 1)),
                    axis=1,
                )
            )
            if longest_answer is not None and batch.extractive:
                best.append([_best(item, row, longest_answer) for row in both])
        empty = np.zeros((len(checked), 0, 2))
        return Scores(
            (np.stack(logits, axis=1) if logits else empty).astype(np.float32),
            np.stack(normalizer, axis=1).astype(np.float32),
            np.array(best, dtype=np.int64).transpose(1, 0, 2) if best else None,
            sum(item.cut for item in encoded),
        )

    def count_tokens(self, batch: TextBatch, support: Support = "candidates") -> int:
        """Tokens of all texts under one candidate; see `bbprompt.oracle.TokenCounter`."""
        return sum(len(item.ids) for item in self._encoded(batch))

    def _encoded(self, batch: TextBatch) -> list[Encoded]:
        known = batch.answers or (None,) * len(batch.forms)
        encoded = []
        for number, (form, answer) in enumerate(zip(batch.forms, known, strict=True), start=1):
            try:
                encoded.append(encode(form, _characters, self._frame, () if answer is None else (answer,)))
            except DataError as error:
                raise DataError(f"text {number}: {error}") from error
        return encoded

    def _logits(self, item: Encoded, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Start and end logits `(n, S, 2)` of every position."""
        vectors = np.stack([self._vector(token) for token in item.ids])
        around = np.pad(vectors, ((1, 1), (0, 0)))
        tokens = np.tanh(vectors + 0.5 * around[:-2] + 0.5 * around[2:])
        text = np.append(np.tanh(2.0 * vectors[self._frame.text_start :].mean(axis=0)), 1.0)
        logits: NDArray[np.float64] = np.einsum("sf,nefg,g->nse", tokens, weights, text)
        return logits

    def _vector(self, token: int) -> NDArray[np.float64]:
        if token not in self._vectors:
            self._vectors[token] = np.random.default_rng((self._seed, token)).normal(size=_WIDTH)
        return self._vectors[token]


class FaultyOracle:
    """Another oracle that breaks at one call and works at all others.

    Args:
        inner: The oracle behind it.
        at: Which `score` goes wrong, counted from 1.
        fault: "error" raises OracleError, "nan" answers with NaN, "shape" leaves out the last candidate.

    Attributes:
        calls: How often `score` was called.
    """

    def __init__(self, inner: Oracle, at: int, fault: Literal["error", "nan", "shape"] = "error") -> None:
        self._inner, self._at, self._fault = inner, at, fault
        self.calls = 0

    @property
    def info(self) -> OracleInfo:
        """That of the oracle behind it."""
        return self._inner.info

    def close(self) -> None:
        """Close the oracle behind it."""
        self._inner.close()

    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score, or go wrong."""
        self.calls += 1
        if self.calls == self._at and self._fault == "error":
            raise OracleError(f"call {self.calls} failed, as it was told to")
        scores = self._inner.score(batch, points, support, longest_answer)
        if self.calls != self._at:
            return scores
        if self._fault == "shape":
            return replace(scores, logits=scores.logits[:-1])
        normalizer = scores.normalizer.copy()
        normalizer[-1] = np.nan
        return replace(scores, normalizer=normalizer)


def _characters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """One token a character; white space has none."""
    kept = [i for i, char in enumerate(text) if not char.isspace()]
    return [ord(text[i]) for i in kept], [(i, i + 1) for i in kept]


def _support(item: Encoded, support: Support) -> tuple[list[int], list[int]]:
    """Positions that starts and ends are normalised over."""
    if support == "sequence":
        return list(range(len(item.ids))), list(range(len(item.ids)))
    if item.offsets:
        return list(range(*item.context)), list(range(*item.context))
    return [a for a, _ in item.spans], [b for _, b in item.spans]


def _best(item: Encoded, logits: NDArray[np.float64], longest: int) -> tuple[int, int]:
    """Character span of the best start <= end within `longest` tokens of the context."""
    low, high = item.context
    spans = [(a, b) for a in range(low, high) for b in range(a, min(a + longest, high))]
    a, b = max(spans, key=lambda span: float(logits[span[0], 0] + logits[span[1], 1]))
    return item.offsets[a - low][0], item.offsets[b - low][1]
