"""What goes to an oracle and comes back from it is checked: shapes, finite numbers, answers inside their texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bbprompt.errors import OracleError
from bbprompt.oracle import Scores, TextBatch, can_count, check_points, check_scores
from bbprompt.tasks.example import Answer, Form, Part
from bbprompt.testing import FaultyOracle, ToyOracle

CHOICES = TextBatch((Form((Part("很好吃", cut=True),), ("好", "差"), -1),) * 3)
SPANS = TextBatch((Form((Part("谁", cut=False), Part("李白在长安", cut=True)), (), 1),) * 3, (Answer("李白", 0),) * 3)


def answered(batch: TextBatch, **changes: Any) -> Scores:
    spans = np.tile(np.array([0, 2]), (2, 3, 1)) if batch.extractive else None
    sound = Scores(np.zeros((2, sum(batch.sizes), 2), "f4"), np.zeros((2, 3, 2), "f4"), spans, 0)
    return replace(sound, **changes)


@pytest.mark.parametrize("batch", [CHOICES, SPANS])
def test_a_sound_answer_is_returned(batch: TextBatch) -> None:
    scores = answered(batch)
    assert check_scores(scores, batch, 2, channels=2, answers=True) is scores
    if batch.extractive:  # spans that nobody asked for must be right all the same
        assert check_scores(replace(scores, best=None), batch, 2, channels=2).best is None


def test_what_one_candidate_gives() -> None:
    for scores in (answered(SPANS), answered(CHOICES)):
        scores.logits[1] = 7.0
        one = scores.of(1)
        assert one.logits.shape == (1, scores.logits.shape[1], 2)
        assert (one.logits == 7.0).all()
        assert (one.best is None) == (scores.best is None)
        assert one.best is None or one.best.shape == (1, 3, 2)


BAD: dict[str, tuple[TextBatch, dict[str, Any], str]] = {
    "candidate fewer": (CHOICES, {"logits": np.zeros((1, 6, 2))}, r"logits of shape \(1, 6, 2\), expected \(2, 6, 2\)"),
    "span more": (CHOICES, {"logits": np.zeros((2, 7, 2))}, "logits of shape"),
    "channel fewer": (CHOICES, {"logits": np.zeros((2, 6, 1))}, "logits of shape"),
    "text fewer": (CHOICES, {"normalizer": np.zeros((2, 2, 2))}, "normalizer of shape"),
    "nan": (CHOICES, {"logits": np.full((2, 6, 2), np.nan)}, "logits with NaN or infinity"),
    "inf": (CHOICES, {"normalizer": np.full((2, 3, 2), -np.inf)}, "normalizer with NaN or infinity"),
    "spans of options": (CHOICES, {"best": np.zeros((2, 3, 2), int)}, "best spans for texts that have options"),
    "span shape": (SPANS, {"best": np.zeros((2, 3, 3), int)}, "best of shape"),
    "before": (SPANS, {"best": np.full((2, 3, 2), -1)}, "outside its context"),
    "backwards": (SPANS, {"best": np.tile([3, 2], (2, 3, 1))}, "outside its context"),
    "behind": (SPANS, {"best": np.tile([0, 6], (2, 3, 1))}, "outside its context"),
    "none": (SPANS, {"best": None}, "no best spans although they were asked for"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_answer_is_refused(case: str) -> None:
    batch, changes, said = BAD[case]
    with pytest.raises(OracleError, match=said):
        check_scores(answered(batch, **changes), batch, 2, channels=2, answers=True)


def test_points() -> None:
    info = ToyOracle().info
    sound = np.zeros((2, info.layers, info.dim))
    assert check_points(sound, info).dtype == np.float32
    for shape in ((0, 3, 4), (2, 3), (2, 4, 3), (1, 2, 3, 4)):
        with pytest.raises(OracleError, match="points have shape"):
            check_points(np.zeros(shape), info)
    for odd in (np.nan, np.inf, -np.inf):
        sound[1, 2, 3] = odd
        with pytest.raises(OracleError, match="NaN or infinity"):
            check_points(sound, info)
    with np.errstate(over="ignore"), pytest.raises(OracleError, match="NaN or infinity"):
        check_points(np.full((1, 3, 4), 1e39), info)  # more than float32 holds


def test_a_model_that_is_here_counts_tokens_and_one_elsewhere_does_not() -> None:
    assert can_count(ToyOracle())
    assert not can_count(FaultyOracle(ToyOracle(), at=1))
