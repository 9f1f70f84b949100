"""Requests cut into units and put together again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_prompt
from hypothesis import given
from hypothesis import strategies as st
from test_local_oracle import batch_of

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.oracle import Scores
from bbprompt.units import Section, Unit, join, plan_units

sections = st.lists(st.builds(Section, texts=st.integers(1, 4), candidates=st.integers(1, 5)), min_size=1, max_size=4)


@given(sections, st.integers(1, 12), st.booleans())
def test_units_cover_a_request_once_and_are_put_back_in_order(parts: list[Section], count: int, best: bool) -> None:
    texts = sum(section.texts for section in parts)
    whole = Scores(
        np.arange(count * texts * 2, dtype=np.float32).reshape(count, texts, 2),
        -np.arange(count * texts * 2, dtype=np.float32).reshape(count, texts, 2),
        np.arange(count * texts * 2).reshape(count, texts, 2) if best else None,
        cut=len(parts),
    )
    starts = np.cumsum([0, *(section.texts for section in parts)])
    units = plan_units(parts, count)
    pieces = []
    for unit in units:
        rows, columns = slice(unit.first, unit.last), slice(starts[unit.section], starts[unit.section + 1])
        assert 0 < unit.last - unit.first <= parts[unit.section].candidates
        cut = whole.best[rows, columns] if whole.best is not None else None
        pieces.append(Scores(whole.logits[rows, columns], whole.normalizer[rows, columns], cut, 1))
    again = join(pieces, units)
    assert np.array_equal(again.logits, whole.logits)
    assert np.array_equal(again.normalizer, whole.normalizer)
    assert (again.best is None) == (whole.best is None)
    assert whole.best is None or np.array_equal(again.best, whole.best)
    assert again.cut == whole.cut


def test_a_missing_part_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        join([], [Unit(0, 0, 1)])


@pytest.mark.parametrize("kind", ["pair", "extract"])
def test_a_unit_computed_elsewhere_is_the_same_bits(tiny_bert_dir: Path, kind: str) -> None:
    backbone = load_backbone(str(tiny_bert_dir))
    prompt = tiny_prompt.artifact(tiny_bert_dir, backbone.digest)
    # Room for two candidates on a part of the texts: several sections of several units.
    whole, other = (LocalOracle(backbone, prompt, batch_tokens=150) for _ in range(2))
    batch, longest = batch_of(kind), 3 if kind == "extract" else None
    points = np.repeat(np.random.default_rng(0).normal(size=(1, 3, 4)), 7, axis=0)
    points[:, 1:] += np.random.default_rng(1).normal(size=(7, 2, 4))
    points[2:4] = points[2]  # candidates that share more among themselves than with the others
    units = plan_units(other.sections(batch), len(points))
    assert len({unit.section for unit in units}) > 1
    order = np.random.default_rng(2).permutation(len(units))
    parts = {i: other.score_unit(batch, points, "candidates", longest, units[i]) for i in order}
    joined, expected = (
        join([parts[i] for i in range(len(units))], units),
        whole.score(batch, points, "candidates", longest),
    )
    assert np.array_equal(joined.logits, expected.logits)
    assert np.array_equal(joined.normalizer, expected.normalizer)
    assert longest is None or np.array_equal(joined.best, expected.best)
