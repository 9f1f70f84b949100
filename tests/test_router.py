"""Gate rules and mixing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bbprompt.router import CODE, PAPER, GateRule, compose, mass

ROUTER = np.array([[1.0, -1.0, 2.0, 0.0], [-1.0, -2.0, -3.0, -0.1]])


def test_paper_rule() -> None:
    np.testing.assert_array_equal(PAPER.weights(ROUTER), [[0.25, 0, 0.25, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(mass(PAPER.weights(ROUTER)), [0.5, 0.0])


def test_code_rule() -> None:
    gates = 1 / (1 + np.exp(-ROUTER))
    np.testing.assert_allclose(CODE.weights(ROUTER), gates / gates.sum(1, keepdims=True), rtol=1e-14)


@pytest.mark.parametrize("gates", ["binary", "sigmoid"])
def test_the_other_combinations(gates: str) -> None:
    open_gates = (ROUTER > 0).astype(float) if gates == "binary" else 1 / (1 + np.exp(-ROUTER))
    mean = GateRule(gates, "mean").weights(ROUTER)  # type: ignore[arg-type]
    np.testing.assert_allclose(mean, open_gates / 4, rtol=1e-14)
    normalized = GateRule(gates, "normalized").weights(ROUTER)  # type: ignore[arg-type]
    np.testing.assert_allclose(mass(normalized), open_gates.any(1), rtol=1e-14)


def test_a_layer_without_an_open_gate_has_no_prompt() -> None:
    weights = GateRule("binary", "normalized").weights(ROUTER)
    np.testing.assert_array_equal(weights, [[0.5, 0, 0.5, 0], [0, 0, 0, 0]])


@given(arrays(np.float64, (3, 2, 4), elements=st.floats(-1e6, 1e6)))
def test_weights_are_shares(router: np.ndarray) -> None:
    for rule in (PAPER, CODE, GateRule("binary", "normalized"), GateRule("sigmoid", "mean")):
        weights = rule.weights(router)
        assert weights.shape == router.shape
        assert np.isfinite(weights).all()
        assert (weights >= 0).all()
        assert (mass(weights) <= 1 + 1e-12).all()


def test_a_router_is_not_changed() -> None:
    before = ROUTER.copy()
    for rule in (PAPER, CODE):
        rule.weights(ROUTER)
    np.testing.assert_array_equal(ROUTER, before)


def test_compose_mixes_layer_by_layer() -> None:
    rng = np.random.default_rng(0)
    modules, weights = rng.normal(size=(2, 4, 3)), rng.uniform(size=(5, 2, 4))
    mixed = compose(weights, modules)
    assert mixed.shape == (5, 2, 3)
    for n in range(5):
        for layer in range(2):
            expected = sum(weights[n, layer, k] * modules[layer, k] for k in range(4))
            np.testing.assert_allclose(mixed[n, layer], expected, rtol=1e-12)


def test_mixing_modules_is_mixing_prompts() -> None:
    rng = np.random.default_rng(1)
    modules, projection = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 3, 10))
    weights = CODE.weights(rng.normal(size=(2, 4)))
    prompts = np.einsum("lkd,ldx->lkx", modules, projection)
    np.testing.assert_allclose(
        np.einsum("ld,ldx->lx", compose(weights, modules), projection),
        np.einsum("lk,lkx->lx", weights, prompts),
        rtol=1e-10,
    )
