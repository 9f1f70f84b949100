"""Toy oracles with one fault each, to show that the oracle contract sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bbprompt.errors import OracleError
from bbprompt.oracle import OracleInfo, Scores, TextBatch
from bbprompt.testing import ToyOracle


class Sound(ToyOracle):
    """Nothing is wrong with it."""


class Nameless(Sound):
    @property
    def info(self) -> OracleInfo:
        return replace(super().info, backbone_digest="")


class NewNameEachTime(Sound):
    count = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).count += 1
        self._info = replace(self._info, prompts_digest=str(self.count))


class ForgetsOne(Sound):
    def score(self, *request: Any) -> Scores:
        scores = super().score(*request)
        return replace(scores, logits=scores.logits[:, :-1])


class AnswersUnasked(Sound):
    def score(self, batch: TextBatch, points: Any, support: Any = "candidates", longest: Any = None) -> Scores:
        return super().score(batch, points, support, longest or 3)


class Drifts(Sound):
    """Each reply is a little off the one before."""

    served = 0

    def score(self, *request: Any) -> Scores:
        scores = super().score(*request)
        self.served += 1
        return replace(scores, logits=scores.logits * np.float32(1 + 1e-6 * self.served))


class IgnoresALayer(Sound):
    def score(self, batch: TextBatch, points: Any, *more: Any) -> Scores:
        flat = np.array(points, copy=True)
        flat[:, 1:2] *= 0
        return super().score(batch, flat, *more)


class SharesTheFirst(Sound):
    """The first layer of the first candidate serves for all."""

    def score(self, batch: TextBatch, points: Any, *more: Any) -> Scores:
        shared = np.array(points, copy=True)
        if shared.ndim == 3 and len(shared) > 2:
            shared[:, 0] = shared[:1, 0]
        return super().score(batch, shared, *more)


class PadsTexts(Sound):
    """The normalizer grows with the batch, as if padding were attended to."""

    def score(self, batch: TextBatch, points: Any, support: Any = "candidates", longest: Any = None) -> Scores:
        scores = super().score(batch, points, support, longest)
        grown = scores.normalizer + np.float32(0.01 * (len(batch.forms) - 1))
        return replace(scores, normalizer=grown) if support == "sequence" else scores


class Unnormalized(Sound):
    def score(self, *request: Any) -> Scores:
        scores = super().score(*request)
        return replace(scores, normalizer=scores.normalizer + np.float32(0.1))


class AnswersNothing(Sound):
    def score(self, *request: Any) -> Scores:
        scores = super().score(*request)
        return scores if scores.best is None else replace(scores, best=np.zeros_like(scores.best))


class TakesNan(Sound):
    def score(self, batch: TextBatch, points: Any, *more: Any) -> Scores:
        return super().score(batch, np.nan_to_num(points, posinf=0.0), *more)


class CutsUnsaid(Sound):
    def score(self, *request: Any) -> Scores:
        return replace(super().score(*request), cut=0)


class ReusesItsArrays(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.served: dict[Any, Scores] = {}

    def score(self, batch: TextBatch, points: Any, *more: Any) -> Scores:
        if not np.isfinite(points).all():
            raise OracleError("not finite")
        key = batch.digest(), np.asarray(points, np.float32).tobytes(), more
        if key not in self.served:
            self.served[key] = super().score(batch, points, *more)
        return self.served[key]


class ClosesOnce(Sound):
    open = True

    def close(self) -> None:
        if not self.open:
            raise ValueError("closed")
        self.open = False
