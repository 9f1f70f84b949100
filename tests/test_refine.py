"""The refining stage: one layer after the other, never worse, within its calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toyruns

from bbprompt.config import load_method, method_with
from bbprompt.search.refine import RefineStage, refine_stage
from bbprompt.search.stages import Incumbent
from bbprompt.stage_settings import RefineStageConfig

TARGET = np.random.default_rng(7).normal(size=(3, 4))


def loss(points: np.ndarray) -> np.ndarray:
    return np.asarray(((points - TARGET) ** 2).sum((1, 2)))


def drive(stage: RefineStage) -> list[np.ndarray]:
    asked = []
    while stage.stop is None:
        points = stage.ask()
        asked.append(points)
        stage.tell(loss(points))
    return asked


def begin() -> Incumbent:
    return Incumbent(np.zeros((3, 4)), float(loss(np.zeros((1, 3, 4)))[0]))


def test_each_layer_has_its_turn_and_keeps_what_it_found() -> None:
    start = begin()
    stage = RefineStage(start, 0.5, 25)
    asked = drive(stage)
    assert len(asked) == 75
    for turn, points in enumerate(asked):
        layer = turn // 25
        np.testing.assert_array_equal(points[0, layer + 1 :], start.point[layer + 1 :])
        if turn >= 25:
            np.testing.assert_array_equal(points[0, :layer], stage.incumbent.point[:layer])
    assert stage.incumbent.loss < start.loss / 10
    assert loss(stage.incumbent.point[None])[0] == pytest.approx(stage.incumbent.loss, rel=1e-12)
    with pytest.raises(RuntimeError, match="without ask"):
        stage.tell(np.zeros(1))


def test_calls_are_shared_between_the_layers() -> None:
    assert len(drive(refine_stage(RefineStageConfig(step=0.5), begin(), 32))) == 30
    assert len(drive(refine_stage(RefineStageConfig(step=0.5, calls_per_layer=7), begin(), 32))) == 21


def test_two_stages_share_the_budget(tmp_path: Path) -> None:
    method = method_with(
        load_method("mp2-deep"),
        {
            "router": None,
            "prompt.popsize": 6,
            "prompt.keep": "all-time",
            "tempered": False,
            "refine": {"step": 0.2, "share": 0.5},
            "calibrate": False,
            "select": "dev-loss",
        },
    )
    found, ledger, recorder = toyruns.run(tmp_path / "run", method, 101)
    assert [(stage.name, stage.optimizer) for stage in found.stages] == [("prompt", "cmaes"), ("refine", "cobyla")]
    assert ledger.reserved == recorder.calls <= 101
    assert found.stages[0].calls >= 40
    assert found.stages[1].calls >= 40
    assert found.stages[1].train_loss <= found.stages[0].train_loss, "it goes on from there, whatever dev says"
    again, _, silent = toyruns.run(tmp_path / "run", method, 101)
    assert silent.calls == 0
    np.testing.assert_array_equal(again.points, found.points)


def test_a_listing_looks_at_the_upstream_mixtures_alone(tmp_path: Path) -> None:
    found, ledger, _ = toyruns.run(tmp_path / "run", load_method("upstream-best"), 40)
    assert [stage.name for stage in found.stages] == ["upstream"]
    assert ledger.reserved == 2 + 2 * 2
