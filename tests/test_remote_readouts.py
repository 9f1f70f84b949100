"""Prototypes and verbalizers where the model is elsewhere: over HTTP, and in a worker of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import test_prototype_head
import test_verbalizer
from servers import serving

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.http import HttpOracle
from bbprompt.backends.local import LocalOracle
from bbprompt.oracle import Oracle, TextBatch
from bbprompt.units import join, plan_units

Opened = tuple[Oracle, TextBatch]


def prototypes(bert: Path, folder: Path) -> Opened:
    backbone = load_backbone(str(bert))
    prompt = test_prototype_head.prompt_for(backbone)
    return LocalOracle(backbone, prompt, batch_tokens=64), test_prototype_head.data_for("same").batch


def masked(bert: Path, folder: Path) -> Opened:
    return test_verbalizer.open_tiny(bert, batch_tokens=64)[0], test_verbalizer.batch_for("single")


def causal(bert: Path, folder: Path) -> Opened:
    model = test_verbalizer.causal_dir(folder / "gpt2", "gpt2")
    return test_verbalizer.open_tiny(model, batch_tokens=64)[0], test_verbalizer.batch_for("single")


@pytest.fixture(scope="module", params=[prototypes, masked, causal], ids=lambda make: make.__name__)
def opened(
    request: pytest.FixtureRequest, tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    make: Callable[[Path, Path], Opened] = request.param
    oracle, batch = make(tiny_bert_dir, tmp_path_factory.mktemp("models"))
    yield oracle, batch
    oracle.close()


def points_for(oracle: Oracle) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, oracle.info.layers, oracle.info.dim)).astype(np.float32)


def test_a_server_gives_the_scores_of_the_model_behind_it(opened: Opened) -> None:
    oracle, batch = opened
    points = points_for(oracle)
    here = oracle.score(batch, points)
    with serving(oracle) as url:
        remote = HttpOracle(url)
        try:
            assert remote.info == replace(oracle.info, piece=remote.most_points)
            there = remote.score(batch, points)
        finally:
            remote.close()
        np.testing.assert_array_equal(there.logits, here.logits)
        np.testing.assert_array_equal(there.normalizer, here.normalizer)
        assert httpx2.get(f"{url}/healthz").status_code == 200


def test_a_server_is_healthy_before_it_was_asked_anything(opened: Opened) -> None:
    with serving(opened[0]) as url:
        assert httpx2.get(f"{url}/healthz").status_code == 200


def test_the_units_of_a_request_are_its_scores(opened: Opened) -> None:
    oracle: Any = opened[0]
    batch, points = opened[1], points_for(opened[0])
    units = plan_units(len(points), oracle.at_once(batch, "candidates"))
    assert len(units) > 1
    parts = [oracle.score_unit(batch, points, "candidates", None, unit) for unit in reversed(units)]
    whole, shared = oracle.score(batch, points), join(parts[::-1])
    np.testing.assert_array_equal(shared.logits, whole.logits)
    np.testing.assert_array_equal(shared.normalizer, whole.normalizer)
    assert shared.cut == whole.cut
