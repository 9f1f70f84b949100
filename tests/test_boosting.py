"""Boosting of words under prompts: the words against all choices, the weights against the formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bbprompt.baselines.boosting import Learner, boost, choose_words, votes


def distributions(texts: int, tokens: int, seed: int, gold: np.ndarray, lean: float = 0.0) -> np.ndarray:
    """Random distributions in which token c leans to the texts of label c."""
    logits = np.random.default_rng(seed).normal(size=(texts, tokens))
    logits[np.arange(texts), gold] += lean
    shares = np.exp(logits)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("labels", [2, 3])
def test_the_best_of_all_choices_is_found(labels: int) -> None:
    gold = np.arange(30) % labels
    shares = distributions(30, 6, 3, gold, 0.5)
    weights = np.random.default_rng(1).dirichlet(np.ones(30))
    chosen = choose_words(shares, gold, weights, labels, 6, 10**6, np.random.default_rng(0))

    def error(words: tuple[int, ...]) -> float:
        return float(weights @ (shares[:, list(words)].argmax(axis=1) != gold))

    assert error(chosen) == pytest.approx(min(map(error, itertools.product(range(6), repeat=labels))))


def test_words_are_sought_where_they_score_and_of_equals_the_first_wins() -> None:
    gold = np.array([0, 0, 1, 1])
    shares = np.array([[0.3, 0.0, 0.2, 0.5], [0.3, 0.0, 0.2, 0.5], [0.0, 0.2, 0.3, 0.5], [0.0, 0.2, 0.3, 0.5]])
    even = np.full(4, 0.25)
    rng = np.random.default_rng(0)
    assert choose_words(shares, gold, even, 2, 2, 100, rng) == (0, 1), "token 0 gains most for label 0"
    # The label owns one word alone, the second is the best of the others.
    assert choose_words(shares[:, :2], gold, even, 2, 2, 100, rng) == (0, 1)
    # For two labels the words are also tried the other way round: here the owners are wrong under the weights.
    flipped = np.array([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    assert choose_words(flipped, gold, np.array([0.1, 0.1, 0.4, 0.4]), 2, 1, 100, rng) == (1, 0)


def test_too_many_choices_are_drawn_and_the_first_is_among_them() -> None:
    gold = np.arange(40) % 8
    shares = distributions(40, 60, 5, gold, 6.0)
    found = choose_words(shares, gold, np.full(40, 1 / 40), 8, 5, 50, np.random.default_rng(4))
    assert found == tuple(range(8))


def test_weights_follow_samme() -> None:
    gold = np.arange(24) % 3
    prompts = [distributions(24, 12, seed, gold) for seed in (1, 2)]
    learners = boost(prompts, gold.tolist(), 3, rounds=6, words=2, combinations=100, seed=0)
    assert len(learners) > 2
    weights = np.full(24, 1 / 24)
    for number, learner in enumerate(learners):
        assert learner.prompt == number % 2
        wrong = learner.choices(prompts[learner.prompt]) != gold
        error = weights[wrong].sum()
        assert 0 < error < 2 / 3
        assert learner.alpha == pytest.approx(math.log((1 - error) / error) + math.log(2))
        weights[wrong] *= (1 - error) / error * 2
        weights /= weights.sum()
        assert weights[wrong].sum() == pytest.approx(2 / 3), "the learner is no better than chance on what follows"
    choices = [learner.choices(prompts[learner.prompt]) for learner in learners]
    share = votes(learners, choices, 3)
    assert share.shape == (len(learners), 24, 3)
    np.testing.assert_allclose(share.sum(axis=2), 1.0)
    total = sum(learner.alpha * (chosen[5] == np.arange(3)) for learner, chosen in zip(learners, choices, strict=True))
    np.testing.assert_allclose(share[-1, 5], total / sum(learner.alpha for learner in learners))
    errors = [(each.argmax(axis=1) != gold).mean() for each in share]
    assert errors[-1] < errors[0], "together they are better than the first"


def test_an_error_of_zero_counts_half_a_text_and_ends_the_boosting() -> None:
    gold = np.arange(10) % 2
    prompts = [distributions(10, 8, seed, gold, 9.0) for seed in (1, 2, 3)]
    learners = boost(prompts, gold.tolist(), 2, rounds=50, words=3, combinations=100, seed=0)
    assert [learner.prompt for learner in learners] == [0, 1, 2]
    assert learners[0].alpha == pytest.approx(math.log(0.95 / 0.05))


def test_learners_no_better_than_chance_are_left_out() -> None:
    same = np.full((6, 4), 0.25)
    assert boost([same], [0, 1, 2, 0, 1, 2], 3, rounds=5, words=2, combinations=100, seed=0) == ()


def test_choices_are_those_of_the_words() -> None:
    assert Learner(0, (2, 0), 1.0).choices(np.array([[0.5, 0.1, 0.4], [0.1, 0.1, 0.8]])).tolist() == [1, 0]
