"""Stages: rows become points, the incumbent never gets worse and gives back its loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import toyruns

from bbprompt.prompts import PromptSpace
from bbprompt.router import CODE, PAPER, GateRule, compose
from bbprompt.search.refine import refine_stage
from bbprompt.search.stages import Incumbent, Stage, prompt_stage, router_stage
from bbprompt.stage_settings import PromptStageConfig, RefineStageConfig, RouterStageConfig

SPACE = toyruns.space()
TARGET = np.random.default_rng(7).normal(size=SPACE.shape)


def loss(points: np.ndarray) -> np.ndarray:
    """Not separable by layer, so that layers must be tuned together."""
    away = points - TARGET
    return np.asarray((away**2).sum((1, 2)) + 0.5 * away.sum((1, 2)) ** 2)


def begin(space: PromptSpace = SPACE) -> Incumbent:
    point = space.even()
    return Incumbent(point, float(loss(point[None])[0]))


def drive(stage: Stage, rounds: int) -> list[tuple[np.ndarray, Incumbent]]:
    trail = []
    for _ in range(rounds):
        if stage.stop is not None:
            break
        points = stage.ask()
        stage.tell(loss(points))
        trail.append((points, stage.incumbent))
    return trail


LAYERWISE = PromptStageConfig(layout="layerwise", popsize=6, sigma_first=0.3, sigma=0.2)
JOINT = PromptStageConfig(layout="joint", popsize=6, sigma_first=0.3, sigma=9.0)
ROUTER = RouterStageConfig(calls=24, random=8)

STAGES: dict[str, Callable[[Incumbent], Stage]] = {
    "layerwise": lambda start: prompt_stage(LAYERWISE, start, 3),
    "joint": lambda start: prompt_stage(JOINT, start, 3),
    "binary": lambda start: router_stage(ROUTER, SPACE, PAPER, start, 3),
    "continuous": lambda start: router_stage(
        RouterStageConfig(calls=24, random=8, space="continuous", batch=2, warm_start=False), SPACE, CODE, start, 3
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_the_incumbent_never_gets_worse_and_gives_back_its_loss(name: str) -> None:
    start = begin()
    trail = drive(STAGES[name](start), 30 if name in ("layerwise", "joint") else 5)
    losses = [start.loss, *(incumbent.loss for _, incumbent in trail)]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    for points, incumbent in trail:
        assert points.shape[1:] == SPACE.shape
        assert loss(incumbent.point[None])[0] == pytest.approx(incumbent.loss, rel=1e-12)


def test_layers_are_visited_in_turn_and_the_others_stay() -> None:
    start = begin()
    stage = prompt_stage(LAYERWISE, start, 3)
    for turn in range(9):
        held = stage.incumbent.point
        points = stage.ask()
        assert points.shape == (6, *SPACE.shape)
        layer = turn % 3
        others = [i for i in range(3) if i != layer]
        np.testing.assert_array_equal(points[:, others], np.broadcast_to(held[others], (6, 2, 4)))
        assert len(np.unique(points[:, layer], axis=0)) == 6
        stage.tell(loss(points))


def test_layers_have_their_own_step_sizes_and_seeds() -> None:
    start = begin()
    config = PromptStageConfig(layout="layerwise", popsize=200, sigma_first=1.0, sigma=1e-3)
    stage = prompt_stage(config, start, 3)
    spreads, offsets = [], []
    for layer in range(3):
        points = stage.ask()
        offset = points[:, layer] - start.point[layer]
        spreads.append(offset.std())
        offsets.append(offset / spreads[-1])
        stage.tell(np.full(200, start.loss + 1.0))  # nothing improves, so nothing moves
    np.testing.assert_allclose(spreads, [1.0, 1e-3, 1e-3], rtol=0.15)
    assert np.abs(offsets[1] - offsets[2]).max() > 0.5
    assert stage.incumbent is start


def test_a_joint_search_uses_the_first_step_size() -> None:
    points = prompt_stage(JOINT.model_copy(update={"popsize": 100}), begin(), 3).ask()
    assert (points - begin().point).std() == pytest.approx(0.3, rel=0.15)


def test_bounds_hold_the_offset() -> None:
    start = begin()
    for config in (LAYERWISE, JOINT):
        wide = config.model_copy(update={"bound": 0.5, "sigma_first": 1.0, "sigma": 1.0, "popsize": 30})
        stage = prompt_stage(wide, start, 3)
        for points, _ in drive(stage, 6):
            assert np.abs(points - start.point).max() <= 0.5 + 1e-12


def test_all_time_keeps_what_its_search_saw_best() -> None:
    start = begin()
    stage = prompt_stage(LAYERWISE.model_copy(update={"keep": "all-time"}), start, 3)
    seen: dict[int, tuple[float, np.ndarray]] = {}
    for turn in range(12):
        points = stage.ask()
        losses = loss(points)
        stage.tell(losses)
        layer, lowest = turn % 3, int(losses.argmin())
        if layer not in seen or losses[lowest] < seen[layer][0]:
            seen[layer] = (float(losses[lowest]), points[lowest, layer])
        np.testing.assert_allclose(stage.incumbent.point[layer], seen[layer][1], rtol=1e-12)


def test_the_router_of_the_incumbent_is_known() -> None:
    start = begin()
    for name, rule in (("binary", PAPER), ("continuous", CODE)):
        stage = STAGES[name](start)
        drive(stage, 5)
        routing = stage.incumbent.routing
        assert routing is not None
        assert routing.router.shape == SPACE.router_shape
        np.testing.assert_allclose(SPACE.mix(routing.router, rule), stage.incumbent.point, rtol=1e-12)
        np.testing.assert_allclose(compose(routing.weights, SPACE.modules), stage.incumbent.point, rtol=1e-12)
        after = prompt_stage(LAYERWISE, stage.incumbent, 3)
        drive(after, 6)
        assert after.incumbent.routing is routing, "stage II keeps what it started from"


def test_the_upstream_routers_are_tried_first() -> None:
    stage = router_stage(ROUTER, SPACE, PAPER, begin(), 3)
    np.testing.assert_allclose(stage.ask()[:2], SPACE.mix(SPACE.routers, PAPER), rtol=1e-12)
    continuous = RouterStageConfig(calls=24, space="continuous", batch=4)
    stage = router_stage(continuous, SPACE, CODE, begin(), 3)
    np.testing.assert_allclose(stage.ask()[:2], SPACE.mix(SPACE.routers, CODE), rtol=1e-12)


def test_upstream_rows_that_repeat_or_open_no_gate_are_left_out() -> None:
    routers = np.stack([SPACE.routers[0], -np.abs(SPACE.routers[1]), 2 * SPACE.routers[0]])
    space = PromptSpace(SPACE.modules, routers, ("a", "b", "c"))
    points = router_stage(ROUTER, space, PAPER, begin(space), 3).ask()
    np.testing.assert_allclose(points[0], space.mix(routers[0], PAPER), rtol=1e-12)
    assert not np.allclose(points[1], points[0])
    assert (np.abs(points).sum((1, 2)) > 0).all()


def test_without_upstream_routers() -> None:
    space = toyruns.space(tasks=0)
    for space_kind in ("binary", "continuous"):
        config = RouterStageConfig(calls=24, random=4, space=space_kind)  # type: ignore[arg-type]
        assert router_stage(config, space, PAPER, begin(space), 3).ask().shape == (4, *space.shape)


def test_enumeration_tries_every_router_of_a_shallow_prompt() -> None:
    space = toyruns.space(layers=1)
    target = space.mix(np.array([[1.0, -1.0, 1.0]]), PAPER)

    def near(points: np.ndarray) -> np.ndarray:
        return np.asarray(((points - target) ** 2).sum((1, 2)))

    config = RouterStageConfig(optimizer="enumerate", calls=100, batch=3)
    stage = router_stage(config, space, PAPER, Incumbent(space.even(), 1e9), 3)
    tried = []
    while stage.stop is None:
        points = stage.ask()
        stage.tell(near(points))
        tried.extend(points)
    assert len(np.unique(np.round(tried, 9), axis=0)) == len(tried) == 7
    np.testing.assert_allclose(stage.incumbent.point, target, rtol=1e-12)
    assert stage.optimizer == "enumerate"


@pytest.mark.parametrize("rule", [PAPER, CODE, GateRule("binary", "normalized"), GateRule("sigmoid", "mean")])
def test_any_rule_can_be_searched(rule: GateRule) -> None:
    points = router_stage(ROUTER, SPACE, rule, begin(), 3).ask()
    assert np.isfinite(points).all()
    assert points.shape == (4, *SPACE.shape)


@pytest.mark.parametrize("name", STAGES)
def test_telling_without_asking_is_a_bug(name: str) -> None:
    with pytest.raises(RuntimeError, match="tell without ask"):
        STAGES[name](begin()).tell(np.zeros(4))


@pytest.mark.parametrize("name", ["layerwise", "joint"])
def test_the_same_seed_asks_the_same(name: str) -> None:
    one, other = drive(STAGES[name](begin()), 9), drive(STAGES[name](begin()), 9)
    for (points, incumbent), (again, same) in zip(one, other, strict=True):
        np.testing.assert_array_equal(points, again)
        assert incumbent.loss == same.loss


@pytest.mark.parametrize("name", ["layerwise", "joint", "refine"])
def test_fixed_entries_stay(name: str) -> None:
    start = begin()
    stage: Stage
    if name == "refine":
        stage = refine_stage(RefineStageConfig(step=0.5), start, 60, fixed=1)
    else:
        stage = prompt_stage(LAYERWISE if name == "layerwise" else JOINT, start, 3, fixed=1)
    trail = drive(stage, 60)
    for points, incumbent in trail:
        for point in (*points, incumbent.point):
            assert np.array_equal(point[:, -1], start.point[:, -1])
    assert trail[-1][1].loss < start.loss
    assert loss(trail[-1][1].point[None])[0] == pytest.approx(trail[-1][1].loss)
