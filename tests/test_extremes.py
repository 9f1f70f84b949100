"""Numbers at the ends of what floats hold: they give a finite result, a reason to stop, or a plain refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import telling
import tiny_prompt
import torch
from tiny_prompt import batch_of

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.errors import OracleError
from bbprompt.optimizers.cmaes import CMAES
from bbprompt.optimizers.gp import GPUCB
from bbprompt.oracle import Scores, TextBatch, check_scores
from bbprompt.readout import Readout
from bbprompt.tasks.example import Form, Part

LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("popsize", [2, 3, 20, 500])
@pytest.mark.parametrize("dim", [1, 2, 500, 2_000])
def test_cmaes_at_every_size(dim: int, popsize: int) -> None:
    optimizer = CMAES(np.zeros(dim), 0.5, seed=1, popsize=popsize)
    for _ in range(1 if dim == 2_000 else 3):  # later ones decompose a matrix of its size
        rows = optimizer.ask()
        assert rows.shape == (popsize, dim)
        optimizer.tell(rows, np.sum(rows**2, axis=1))
    assert np.isfinite(optimizer.mean).all()
    assert 1e-20 < optimizer.sigma < 1e20


def test_a_covariance_that_drifts_stays_usable() -> None:
    optimizer = CMAES(np.ones(8), 0.5, seed=1, popsize=10)
    for _ in range(60):
        optimizer._es.sm.C[0, 1] += 1e-9  # rounding that leaves it not quite symmetric
        rows = optimizer.ask()
        optimizer.tell(rows, np.sum(rows**2, axis=1))
    matrix = optimizer._es.sm.C
    assert np.linalg.eigvalsh((matrix + matrix.T) / 2).min() > 0
    assert np.abs(matrix - matrix.T).max() < 1e-6
    assert optimizer.best[1] < 1e-3


def test_one_dimension_in_a_box() -> None:
    """Steps that outgrow the box, which cma by itself ends with an error in one dimension alone."""
    optimizer, widest = CMAES(np.zeros(1), 1.0, seed=0, popsize=5, bounds=[[-2.0], [3.0]]), 0.0
    for _ in range(40):
        rows = optimizer.ask()
        assert np.all((rows >= -2) & (rows <= 3))
        optimizer.tell(rows, -np.abs(rows[:, 0] - 0.5))
        widest = max(widest, optimizer.sigma)
    assert 5 / 3 < widest < 1e3, "the steps never came to cma's limit"


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_a_box_of_any_size_is_searched_alike(size: float) -> None:
    optimizer = GPUCB([[-size] * 2, [size] * 2], seed=4, n_random=4)
    for _ in range(9):
        rows = optimizer.ask()
        assert np.all(np.abs(rows) <= size)
        optimizer.tell(rows, np.sum((rows / size - 0.3) ** 2, axis=1))
    assert optimizer.best[1] < 0.05


def test_500_told_rows_of_one_value() -> None:
    optimizer = GPUCB([[0.0] * 3, [1.0] * 3], seed=1)
    optimizer.tell(np.random.default_rng(1).random((500, 3)).round(1), np.full(500, 7.0))
    assert np.isfinite(optimizer.ask()).all()


def test_optimizers_under_random_and_extreme_losses() -> None:
    found = telling.walks(12, 2, seed=1)
    assert found["rounds"] > 300
    assert found["refused"] > 20


def test_two_threads_compute_what_one_does_up_to_rounding(tiny_bert_dir: Path) -> None:
    """Bits depend on the number of threads; so a run notes its own, and is resumed with it."""
    backbone = load_backbone(str(tiny_bert_dir))
    prompt = tiny_prompt.artifact(Path(backbone.id), backbone.digest)
    points, found = np.random.default_rng(0).normal(size=(4, *prompt.space.shape)), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(LocalOracle(backbone, prompt).score(batch_of("pair"), points).logits)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.parametrize("value", [1e38, -1e38, LARGEST, -LARGEST])
def test_logits_at_the_end_of_float32(value: float) -> None:
    batch = TextBatch((Form((Part("t", cut=True),), ("a", "b"), -1),))
    logits = np.array([[[value, value], [-value, -value]]], np.float32)
    normalizer = np.logaddexp.reduce(logits.astype(float), axis=1, keepdims=True).astype(np.float32)
    scores = check_scores(Scores(logits, normalizer, None, 0), batch, 1, channels=2)
    for gold, wrong in ((0, value < 0), (1, value > 0)):
        loss = Readout().losses(scores, batch, (gold,))
        assert loss[0, 0] == pytest.approx(2 * abs(value) if wrong else 0.0)
    np.testing.assert_array_equal(Readout().probabilities(scores, batch)[0][0], [value > 0, value < 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("value", [1e4, 1e20, LARGEST])
def test_a_prompt_that_overflows_the_model_is_no_loss(tiny_bert_dir: Path, value: float, dtype: str) -> None:
    backbone = load_backbone(str(tiny_bert_dir))
    prompt = tiny_prompt.artifact(Path(backbone.id), backbone.digest)
    batch, points = batch_of("pair", 2), np.full((2, *prompt.space.shape), value)
    scores = LocalOracle(backbone, prompt, dtype=dtype).score(batch, points)
    if value == 1e4:
        check_scores(scores, batch, 2, channels=2)
        return
    with pytest.raises(OracleError, match="NaN or infinity"):
        check_scores(scores, batch, 2, channels=2)
