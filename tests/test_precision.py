"""Error against spread."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bbprompt.backends.precision import best_precision, spread_over_error
from bbprompt.oracle import Scores

SIZES = (2, 3)


def scores(logits: np.ndarray) -> Scores:
    return Scores(logits.astype(np.float32), np.zeros((len(logits), 2, 2), np.float32), None, 0)


def test_ratio() -> None:
    logits = np.zeros((4, 5, 2))
    logits[:, :, :] = np.array([-1.0, 1.0, -1.0, 1.0])[:, None, None]
    exact = logits[2:3] + 0.25
    assert spread_over_error(scores(logits), scores(exact), 2, SIZES) == pytest.approx(4.0)
    assert spread_over_error(scores(logits), scores(logits[2:3]), 2, SIZES) == np.inf
    assert spread_over_error(scores(logits[:1].repeat(4, 0)), scores(exact), 2, SIZES) == 0


def test_what_is_common_to_a_text_drops_out() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 5, 2))
    first, exact = scores(logits), scores(logits[1:2] + 0.1)
    moved = Scores(first.logits + 3, first.normalizer + 3, None, 0)
    one, other = (spread_over_error(some, exact, 1, SIZES) for some in (first, moved))
    assert one == pytest.approx(other, rel=1e-5)


def test_nothing_scored_is_no_evidence() -> None:
    empty = Scores(np.zeros((4, 0, 2), np.float32), np.zeros((4, 2, 2), np.float32), None, 0)
    assert spread_over_error(empty, empty, 0, (0, 0)) == 0


@pytest.mark.parametrize(("tiles", "precision"), [(True, "mixed"), (False, "float32")])
def test_auto(tiles: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert best_precision("cpu") == precision
    assert best_precision("cuda") == "float32"
