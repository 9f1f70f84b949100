"""Requests cut into units and put together again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_prompt
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_verbalizer import batch_for, causal_dir, open_tiny, points_for
from tiny_prompt import batch_of

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.rayworker import Greeting, Model, Request, Worker
from bbprompt.backends.stock import StockOracle
from bbprompt.connect import open_oracle
from bbprompt.oracle import Scores
from bbprompt.units import join, plan_units


@given(st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_units_cover_a_request_once_and_are_put_back_in_order(count: int, at_once: int, best: bool) -> None:
    whole = Scores(
        np.arange(count * 6, dtype=np.float32).reshape(count, 3, 2),
        -np.arange(count * 6, dtype=np.float32).reshape(count, 3, 2),
        np.arange(count * 6).reshape(count, 3, 2) if best else None,
        cut=4,
    )
    pieces = []
    for unit in plan_units(count, at_once):
        rows = slice(unit.first, unit.last)
        assert 0 < unit.last - unit.first <= at_once
        cut = whole.best[rows] if whole.best is not None else None
        pieces.append(Scores(whole.logits[rows], whole.normalizer[rows], cut, whole.cut))
    again = join(pieces)
    assert np.array_equal(again.logits, whole.logits)
    assert np.array_equal(again.normalizer, whole.normalizer)
    assert (again.best is None) == (whole.best is None)
    assert whole.best is None or np.array_equal(again.best, whole.best)
    assert again.cut == whole.cut


@pytest.mark.parametrize("kind", ["pair", "extract"])
def test_a_unit_computed_elsewhere_is_the_same_bits(tiny_bert_dir: Path, kind: str) -> None:
    backbone = load_backbone(str(tiny_bert_dir))
    prompt = tiny_prompt.artifact(tiny_bert_dir, backbone.digest)
    # Room for two candidates on a part of the texts: several units, each on several parts.
    whole, other = (LocalOracle(backbone, prompt, batch_tokens=150) for _ in range(2))
    batch, longest = batch_of(kind), 3 if kind == "extract" else None
    points = np.repeat(np.random.default_rng(0).normal(size=(1, 3, 4)), 7, axis=0)
    points[:, 1:] += np.random.default_rng(1).normal(size=(7, 2, 4))
    points[2:4] = points[2]  # candidates that share more among themselves than with the others
    units = plan_units(len(points), other.at_once(batch))
    assert len(units) > 1
    order = np.random.default_rng(2).permutation(len(units))
    parts = {i: other.score_unit(batch, points, "candidates", longest, units[i]) for i in order}
    joined, expected = (
        join([parts[i] for i in range(len(units))]),
        whole.score(batch, points, "candidates", longest),
    )
    assert np.array_equal(joined.logits, expected.logits)
    assert np.array_equal(joined.normalizer, expected.normalizer)
    assert longest is None or np.array_equal(joined.best, expected.best)


@pytest.mark.parametrize("kind", ["pair", "choice"])
def test_a_unit_of_a_causal_model_computed_elsewhere_is_the_same_bits(tmp_path: Path, kind: str) -> None:
    folder = causal_dir(tmp_path / "llama", "llama")
    whole, other = (open_tiny(folder, batch_tokens=150)[0] for _ in range(2))
    assert isinstance(other, StockOracle)
    batch, points = batch_for(kind), np.repeat(points_for(open_tiny(folder)[1]), 3, axis=0)
    units = plan_units(len(points), other.at_once(batch))
    assert len(units) > 1
    parts = {i: other.score_unit(batch, points, "candidates", None, units[i]) for i in reversed(range(len(units)))}
    joined, expected = join([parts[i] for i in range(len(units))]), whole.score(batch, points)
    assert np.array_equal(joined.logits, expected.logits)
    assert np.array_equal(joined.normalizer, expected.normalizer)
    # Cut otherwise, the same but for rounding.
    single = open_tiny(folder, batch_tokens=1)[0].score(batch, points)
    np.testing.assert_allclose(single.logits, expected.logits, atol=1e-4)


def test_a_worker_serves_a_causal_model(tmp_path: Path) -> None:
    folder = causal_dir(tmp_path / "llama", "llama")
    opened, prompt = open_tiny(folder, batch_tokens=150)
    worker = Worker(lambda value: value)  # references are the values themselves
    greeting = worker.open(Model(str(folder), "cpu", "float32", 150, None, torch.get_num_threads()), prompt, "here")
    assert isinstance(greeting, Greeting)
    assert greeting.info == opened.info
    batch, points = batch_for("single"), points_for(prompt)
    request = Request(1, batch.digest(), "candidates", None)
    answer = worker.answer(request, batch, points, [None])
    assert isinstance(answer, list)
    scores = worker.answer(request, batch, points, list(plan_units(len(points), answer[0])))
    assert isinstance(scores, list)
    expected = open_oracle("local", prompt, threads=torch.get_num_threads(), batch_tokens=150).score(batch, points)
    assert np.array_equal(join(scores).logits, expected.logits)
