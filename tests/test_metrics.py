"""Metrics by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbprompt.metrics import accuracy, answer_f1, majority, standard_error
from bbprompt.tasks.example import Answer


def f1(given_text: str, *right: str) -> float:
    return answer_f1(given_text, [Answer(text, 0) for text in right])


def test_accuracy() -> None:
    values = accuracy([1, 0, 2], (1, 1, 2))
    assert values.tolist() == [1.0, 0.0, 1.0]
    assert values.dtype == np.float64


@pytest.mark.parametrize(
    ("answer", "right", "value"),
    [
        ("北京", "北京", 1.0),
        ("北京市", "北京", 0.8),
        ("北京", "上海", 0.0),
        ("天天", "天", 2 / 3),  # with multiplicity
        ("天", "天天", 2 / 3),
        ("北 京。", "“北京”", 1.0),  # white space and punctuation do not count
        ("ＡＢＣ１", "abc1", 1.0),  # neither do width and case
        ("", "北京", 0.0),
        ("。", "北京", 0.0),
        ("", "。", 1.0),
    ],
)
def test_character_f1(answer: str, right: str, value: float) -> None:
    assert f1(answer, right) == pytest.approx(value)


def test_the_best_of_the_accepted_answers_counts() -> None:
    assert f1("北京市", "上海", "北京", "北京市") == 1.0


@given(st.text("甲乙丙，a "), st.text("甲乙丙，a "))
def test_f1_is_symmetric_and_between_0_and_1(one: str, other: str) -> None:
    assert f1(one, other) == f1(other, one)
    assert 0.0 <= f1(one, other) <= 1.0
    assert f1(one, one) == 1.0


def test_majority() -> None:
    assert majority([0, 1, 1, 2, 1], 4) == 0.6
    assert majority([3], 4) == 1.0


def test_standard_error() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0])
    assert standard_error(values) == pytest.approx(np.sqrt(0.25 / 4))
    assert standard_error(values[:1]) == 0.0
