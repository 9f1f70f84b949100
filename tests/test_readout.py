"""The readout against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bbprompt.errors import OracleError, UsageError
from bbprompt.oracle import Scores, TextBatch, check_scores
from bbprompt.readout import TEMPERATURES, Readout
from bbprompt.tasks.example import Answer, Form, Part

SIZES = (2, 4, 3)
BATCH = TextBatch(tuple(Form((Part(f"t{n}", True),), tuple("abcd"[:n]), -1) for n in SIZES))
GOLD = (1, 3, 0)


def random_scores(candidates: int = 5, seed: int = 0) -> Scores:
    """Logits of ragged options, normalised over the options."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (candidates, sum(SIZES), 2)).astype(np.float32)
    pieces = np.split(logits, np.cumsum(SIZES)[:-1], axis=1)
    normalizer = np.stack([np.logaddexp.reduce(piece, axis=1) for piece in pieces], axis=1)
    return Scores(logits, normalizer, None, 0)


def test_losses_are_the_cross_entropies() -> None:
    scores = random_scores()
    losses = Readout().losses(scores, BATCH, GOLD)
    assert losses.shape == (5, 3)
    first = np.concatenate(([0], np.cumsum(SIZES)))
    for n in range(5):
        for text, gold in enumerate(GOLD):
            logits = torch.from_numpy(scores.logits[n, first[text] : first[text + 1]]).double()
            target = torch.tensor(gold)
            expected = (F.cross_entropy(logits[:, 0], target) + F.cross_entropy(logits[:, 1], target)) / 2
            assert losses[n, text] == pytest.approx(float(expected), abs=1e-5)


def test_losses_under_a_wider_support() -> None:
    scores = random_scores()
    wider = Scores(scores.logits, scores.normalizer + np.float32(0.5), None, 0)
    readout = Readout(support="sequence")
    np.testing.assert_allclose(
        readout.losses(wider, BATCH, GOLD), Readout().losses(scores, BATCH, GOLD) + 0.5, atol=1e-6
    )


def test_choices_by_the_sum_of_log_probabilities() -> None:
    scores = random_scores()
    choices = Readout().choices(scores, BATCH)
    assert choices.shape == (5, 3)
    first = np.concatenate(([0], np.cumsum(SIZES)))
    for n in range(5):
        for text, size in enumerate(SIZES):
            log_probability = scores.logits[n, first[text] : first[text] + size] - scores.normalizer[n, text]
            assert choices[n, text] == log_probability.sum(1).argmax()


def test_two_negative_logits_win_only_under_the_legacy_rule() -> None:
    batch = TextBatch((Form((Part("t", True),), ("a", "b"), -1),))
    scores = Scores(np.array([[[-3.0, -3.0], [2.0, 2.0]]], np.float32), np.array([[[2.1, 2.1]]], np.float32), None, 0)
    assert Readout().choices(scores, batch).tolist() == [[1]]
    assert Readout(legacy=True).choices(scores, batch).tolist() == [[0]]
    np.testing.assert_array_equal(Readout(legacy=True).option_scores(scores), [[9.0, 4.0]])


def test_the_first_of_equal_options_wins() -> None:
    scores = Scores(np.zeros((1, 9, 2), np.float32), np.ones((1, 3, 2), np.float32), None, 0)
    assert Readout().choices(scores, BATCH).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("legacy", [False, True])
def test_probabilities(legacy: bool) -> None:
    scores = random_scores(seed=3)
    readout = Readout(legacy=legacy)
    result = readout.probabilities(scores, BATCH)
    choices = readout.choices(scores, BATCH)
    assert [len(row) for row in result] == [3] * 5
    for row, chosen in zip(result, choices, strict=True):
        assert tuple(map(len, row)) == SIZES
        for piece, best in zip(row, chosen, strict=True):
            assert piece.sum() == pytest.approx(1.0)
            assert (piece > 0).all()
            assert piece.argmax() == best


def test_probabilities_are_the_softmax_of_the_summed_logits() -> None:
    scores = random_scores()
    piece = Readout().probabilities(scores, BATCH)[2][1]
    expected = torch.from_numpy(scores.logits[2, 2:6]).double().sum(1).softmax(0).numpy()
    np.testing.assert_allclose(piece, expected, rtol=1e-6)


def test_probabilities_of_huge_scores() -> None:
    batch = TextBatch((Form((Part("t", True),), ("a", "b"), -1),))
    scores = Scores(np.array([[[1e4, 1e4], [-1e4, 0]]], np.float32), np.full((1, 1, 2), 1e4, np.float32), None, 0)
    np.testing.assert_array_equal(Readout(legacy=True).probabilities(scores, batch)[0][0], [1.0, 0.0])


def test_extraction() -> None:
    forms = (
        Form((Part("文", False), Part("甲乙丙丁", True)), (), 1),
        Form((Part("文", False), Part("戊己", True)), (), 1),
    )
    batch = TextBatch(forms, (Answer("乙", 1), Answer("己", 1)))
    assert batch.extractive
    assert batch.sizes == (1, 1)
    scores = Scores(
        np.array([[[1.0, 2.0], [0.5, 0.5]], [[0.0, 0.0], [1.0, 1.0]]], np.float32),
        np.array([[[2.0, 3.0], [1.0, 2.0]], [[1.0, 1.0], [1.0, 3.0]]], np.float32),
        np.array([[[1, 3], [0, 2]], [[0, 1], [1, 2]]]),
        0,
    )
    readout = Readout()
    np.testing.assert_allclose(readout.losses(scores, batch, (-1, -1)), [[1.0, 1.0], [1.0, 1.0]])
    assert readout.extracts(scores, batch) == [["乙丙", "戊己"], ["甲", "己"]]
    with pytest.raises(ValueError, match="asked for without answers"):
        readout.extracts(Scores(scores.logits, scores.normalizer, None, 0), batch)


@pytest.mark.parametrize("offsets", [(), (0.5, -0.5)])
def test_prompts_are_compared_at_several_temperatures(offsets: tuple[float, ...]) -> None:
    texts = TextBatch(BATCH.forms[:1] * 3)
    logits = np.random.default_rng(3).normal(0, 3, (4, 6, 2)).astype(np.float32)
    scores = Scores(logits, np.logaddexp.reduce(logits.reshape(4, 3, 2, 2), axis=2), None, 0)
    readout, gold = Readout(offsets=offsets, tempered=True), (1, 0, 1)
    compared = readout.compared(scores, texts, gold)
    assert compared.shape == (4, len(TEMPERATURES), 3)
    probabilities = readout.probabilities(scores, texts)
    for n in range(4):
        for text, right in enumerate(gold):
            for at, temperature in enumerate(TEMPERATURES):
                powers = probabilities[n][text] ** (1 / temperature)
                assert compared[n, at, text] == pytest.approx(-np.log(powers[right] / powers.sum()), abs=1e-6)
    plain = Readout(offsets=offsets)
    np.testing.assert_array_equal(plain.compared(scores, texts, gold)[:, 0], plain.losses(scores, texts, gold))


def test_ragged_options_are_compared_each_with_their_own() -> None:
    scores = random_scores()
    compared = Readout(tempered=True).compared(scores, BATCH, GOLD)
    for n, row in enumerate(Readout().probabilities(scores, BATCH)):
        for text, gold in enumerate(GOLD):
            assert compared[n, TEMPERATURES.index(1.0), text] == pytest.approx(-np.log(row[text][gold]), abs=1e-6)


def test_answers_in_a_text_are_compared_by_their_losses_alone() -> None:
    form = Form((Part("an answer", True),), (), 0)
    batch = TextBatch((form,), (Answer("answer", 3),))
    scores = Scores(np.full((2, 1, 2), -1.0, np.float32), np.zeros((2, 1, 2), np.float32), None, 0)
    assert Readout(tempered=True).compared(scores, batch, (-1,)).tolist() == [[[1.0]], [[1.0]]]


def one_channel() -> Scores:
    """As a prototype or verbalizer oracle answers: one logit an option, normalised over the options."""
    scores = random_scores()
    logits = scores.logits[..., :1]
    pieces = np.split(logits, np.cumsum(SIZES)[:-1], axis=1)
    return Scores(logits, np.stack([np.logaddexp.reduce(piece, axis=1) for piece in pieces], axis=1), None, 0)


def test_one_channel_is_plain_cross_entropy() -> None:
    scores = check_scores(one_channel(), BATCH, 5, channels=1)
    losses = Readout().losses(scores, BATCH, GOLD)
    probabilities = Readout().probabilities(scores, BATCH)
    for n in range(5):
        for text, gold in enumerate(GOLD):
            assert losses[n, text] == pytest.approx(-np.log(probabilities[n][text][gold]), abs=1e-5)
            assert Readout().choices(scores, BATCH)[n, text] == probabilities[n][text].argmax()


def test_the_product_rule_needs_start_and_end() -> None:
    with pytest.raises(UsageError, match="legacy_decision: the product of start and end logits needs a span head"):
        Readout(legacy=True).choices(one_channel(), BATCH)


def test_the_number_of_channels_is_checked() -> None:
    with pytest.raises(OracleError, match=r"logits of shape \(5, 9, 1\), expected \(5, 9, 2\)"):
        check_scores(one_channel(), BATCH, 5, channels=2)
    with pytest.raises(OracleError, match=r"logits of shape \(5, 9, 2\), expected \(5, 9, 1\)"):
        check_scores(random_scores(), BATCH, 5, channels=1)
