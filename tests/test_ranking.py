"""The savings on the default backbone: scores and their order are those of the plain stock forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from reference import PlainOracle

from bbprompt.backends.backbone import DEFAULT_BACKBONE, Backbone, load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.oracle import TextBatch
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.readout import Readout
from bbprompt.scoring import labelled
from bbprompt.tasks.data import open_data
from bbprompt.tasks.task import load_task


@pytest.fixture(scope="module")
def real() -> tuple[Backbone, ModularPrompt]:
    return load_backbone(DEFAULT_BACKBONE), ModularPrompt.load(resolve_prompts("e5-small-mp2-deep"))


@pytest.mark.parametrize("layers", [slice(None), slice(7, 8)], ids=["every layer", "one layer"])
def test_twenty_candidates_rank_as_by_the_plain_forward(layers: slice, real: tuple[Backbone, ModularPrompt]) -> None:
    backbone, prompt = real
    task = load_task("lcqmc")
    texts = labelled(task, open_data(task, "sample").split("train")[:4], for_loss=True)
    batch = texts.batch
    points = np.repeat(prompt.modules.mean(axis=1)[None], 20, axis=0)
    points[:, layers] += 0.3 * points.std() * np.random.default_rng(8).normal(size=points[:, layers].shape)
    ours, stock = LocalOracle(backbone, prompt).score(batch, points), PlainOracle(backbone, prompt)
    expected = np.array([_losses(stock, batch, texts.gold, point) for point in points])
    found = Readout().losses(ours, batch, texts.gold)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    order = expected.mean(axis=1)
    assert np.diff(np.sort(order)).min() > 1e-6, "candidates that tie could rank either way"
    np.testing.assert_array_equal(found.mean(axis=1).argsort(), order.argsort())


def _losses(stock: PlainOracle, batch: TextBatch, gold: Sequence[int], point: np.ndarray) -> np.ndarray:
    """Of each text, the mean over start and end of the cross-entropy of its right option."""
    log_probabilities, _, _ = stock.score(batch, point, "candidates")
    right = np.cumsum([0, *batch.sizes[:-1]]) + np.array(gold)
    return -log_probabilities[right].mean(axis=1)
