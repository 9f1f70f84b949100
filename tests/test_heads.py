"""Heads of the cheap methods: against closed forms, gradients and plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from bbprompt.baselines.heads import (
    LinearHead,
    accuracy_of,
    cross_entropy,
    frequencies,
    logistic,
    nearest_mean,
    prototypes,
    scaled,
    softmax,
    threshold,
)


def clusters(seed: int = 0, count: int = 60, labels: int = 3, dim: int = 5) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    gold = [i % labels for i in range(count)]
    return rng.normal(size=(labels, dim))[gold] * 2 + rng.normal(size=(count, dim)), gold


def test_softmax_and_cross_entropy() -> None:
    scores = np.array([[1.0, 2.0, 3.0], [1000.0, 0.0, -1000.0]])
    shares = softmax(scores)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    np.testing.assert_allclose(shares[0], np.exp([1, 2, 3]) / np.exp([1, 2, 3]).sum())
    assert cross_entropy(scores, [2, 0]) == pytest.approx(-np.log(shares[0, 2]) / 2)
    assert accuracy_of(scores, [2, 1]) == 0.5


def test_options_that_are_not_there_cost_nothing() -> None:
    assert cross_entropy(np.array([[1.0, 1.0, -np.inf]]), [0]) == pytest.approx(np.log(2))
    np.testing.assert_array_equal(softmax(np.array([[1.0, 1.0, -np.inf]])), [[0.5, 0.5, 0.0]])


def test_frequencies_read_nothing() -> None:
    head = frequencies([0, 1, 1, 1], 3)
    shares = softmax(head.scores(np.zeros((2, 0))))
    np.testing.assert_allclose(shares, [[2 / 7, 4 / 7, 1 / 7]] * 2)


def test_nearest_mean_is_the_nearest_mean() -> None:
    x, gold = clusters()
    head = nearest_mean(x, gold, 3)
    means = [x[np.equal(gold, label)].mean(axis=0) for label in range(3)]
    expected = [int(np.argmin([((row - mean) ** 2).sum() for mean in means])) for row in x]
    assert head.scores(x).argmax(axis=1).tolist() == expected


def test_a_label_without_an_example_is_never_the_answer() -> None:
    x, gold = clusters()
    kept = [index for index, label in enumerate(gold) if label != 1]
    head = nearest_mean(x[kept], [gold[index] for index in kept], 3)
    assert set(head.scores(x).argmax(axis=1).tolist()) == {0, 2}
    assert np.isfinite(cross_entropy(head.scores(x), gold))


def test_prototypes_leave_the_common_part_out() -> None:
    vectors, centre = np.eye(2), np.array([0.9, 0.1])
    head = prototypes(vectors, centre)
    np.testing.assert_allclose(head.scores(np.array([[0.8, 0.3]])), [[-0.1, 0.2]])


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_logistic_is_a_minimum(penalty: float) -> None:
    x, gold = clusters(1)
    head = logistic(x, gold, 3, penalty)

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        return cross_entropy(x @ weight.T + bias, gold) + penalty / 2 * float((weight**2).sum())

    lowest = objective(head.weight, head.bias)
    rng = np.random.default_rng(2)
    for _ in range(50):
        away = rng.normal(0, 0.05, head.weight.shape), rng.normal(0, 0.05, head.bias.shape)
        assert objective(head.weight + away[0], head.bias + away[1]) > lowest
    assert accuracy_of(head.scores(x), gold) > 0.8


def test_more_penalty_means_smaller_weights() -> None:
    x, gold = clusters(3)
    sizes = [float((logistic(x, gold, 3, penalty).weight ** 2).sum()) for penalty in (1e-4, 1e-2, 1.0)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("side", [1, -1])
def test_threshold_finds_the_cut_and_the_side(side: int) -> None:
    rng = np.random.default_rng(4)
    values = rng.uniform(0.7, 1.0, (64, 1))
    gold = ((values[:, 0] > 0.86) == (side > 0)).astype(int).tolist()
    head = threshold(values, gold)
    assert accuracy_of(head.scores(values), gold) >= 0.95
    cut = (head.bias[0] - head.bias[1]) / (head.weight[1, 0] - head.weight[0, 0])
    assert cut == pytest.approx(0.86, abs=0.02)


def test_scaling_changes_how_sure_but_not_what() -> None:
    x, gold = clusters(5)
    plain = LinearHead(nearest_mean(x, gold, 3).weight / 100, nearest_mean(x, gold, 3).bias / 100)
    sharp = scaled(plain, x, gold)
    np.testing.assert_array_equal(plain.scores(x).argmax(1), sharp.scores(x).argmax(1))
    assert cross_entropy(sharp.scores(x), gold) < cross_entropy(plain.scores(x), gold)
