"""States that the local oracle keeps: while a request is answered, and for the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
from reference import points_of
from tiny_prompt import batch_of

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.population import Runner
from bbprompt.oracle import TextBatch
from bbprompt.prompts import ModularPrompt
from bbprompt.units import plan_units

TOKENS = 100
#: A chunk's states: those that enter each layer, and the widest projections that candidates share in one.
CHUNK = TOKENS * tiny.HIDDEN * 4 * (tiny.LAYERS + 3)


def population(prompt: ModularPrompt, layer: int, size: float, count: int = 9, seed: int = 6) -> np.ndarray:
    points = np.repeat(points_of(prompt, 1), count, axis=0)
    points[:, layer] += size * np.random.default_rng(seed).normal(size=(count, points.shape[2]))
    return points


def open_oracle(backbone: Backbone, prompt: ModularPrompt, room: int | None, dtype: str = "float32") -> LocalOracle:
    oracle = LocalOracle(backbone, prompt, dtype=dtype, batch_tokens=TOKENS)
    if room is not None:
        oracle._kept_room = room
    return oracle


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> Callable[[LocalOracle], list[int]]:
    """Begins to note how much an oracle keeps whenever texts have run; the list's only entry is the most."""

    def watch(oracle: LocalOracle) -> list[int]:
        most = [0]
        for name in ("run", "run_deviations"):
            plain = getattr(Runner, name)

            def run(self: Runner, *request: Any, plain: Any = plain) -> Any:
                found = plain(self, *request)
                most[0] = max(most[0], oracle.kept_bytes)
                return found

            monkeypatch.setattr(Runner, name, run)
        return most

    return watch


def held(oracle: LocalOracle, batch: TextBatch) -> list[bool]:
    """Which chunks of a batch have kept states."""
    chunks = oracle._kept[batch.digest(), "candidates"]
    return [any(trunk.bytes for trunk in chunk.trunks) for chunk in chunks]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("chunks", [0, 2])
def test_states_are_bounded_while_a_request_is_answered(
    chunks: int, dtype: str, largest: Any, deep: ModularPrompt, backbone: Backbone
) -> None:
    batch = batch_of("pair", 60)
    requests = [population(deep, 1, 1e-3), population(deep, 2, 1.0), points_of(deep, 12)]
    free = open_oracle(backbone, deep, None, dtype)
    expected = [free.score(batch, points) for points in requests]
    assert free.kept_bytes > 4 * CHUNK
    oracle = open_oracle(backbone, deep, chunks * CHUNK, dtype)
    most = largest(oracle)
    for points, scores in zip(requests, expected, strict=True):
        for _ in range(2):
            found = oracle.score(batch, points)
            np.testing.assert_array_equal(found.logits, scores.logits)
            np.testing.assert_array_equal(found.normalizer, scores.normalizer)
            assert oracle.kept_bytes <= chunks * CHUNK
    lanes = 2 if dtype == "mixed" else 1
    assert most[0] <= (chunks + lanes) * CHUNK
    assert free.precisions == {name: count // 2 for name, count in oracle.precisions.items()}


def test_as_many_texts_as_fit_are_ready_for_the_next_population(
    deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, last = batch_of("pair", 30), tiny.LAYERS - 1
    oracle = open_oracle(backbone, deep, 3 * CHUNK)
    oracle.score(batch, population(deep, last, 1.0))
    kept = held(oracle, batch)
    assert kept[:3] == [True] * 3, "the first ones, which the next request begins with"
    assert not all(kept)
    grown: list[int] = []
    plain = Encoder.layer

    def layer(self: Encoder, index: int, *rest: Any) -> Any:
        grown.append(index)
        return plain(self, index, *rest)

    monkeypatch.setattr(Encoder, "layer", layer)
    oracle.score(batch, population(deep, last, 1.0, seed=7))
    assert grown.count(0) == kept.count(False), "only what had no room is computed anew"
    assert held(oracle, batch) == kept


def test_a_units_scores_are_the_same_bits_without_room(deep: ModularPrompt, backbone: Backbone, largest: Any) -> None:
    batch, points = batch_of("extract", 20), population(deep, 1, 1.0)
    whole = open_oracle(backbone, deep, None).score(batch, points, "candidates", 3)
    worker = open_oracle(backbone, deep, CHUNK)
    most, units = largest(worker), plan_units(len(points), worker.at_once(batch))
    assert len(units) > 1
    for unit in reversed(units):
        part, rows = worker.score_unit(batch, points, "candidates", 3, unit), slice(unit.first, unit.last)
        np.testing.assert_array_equal(part.logits, whole.logits[rows])
        np.testing.assert_array_equal(part.normalizer, whole.normalizer[rows])
        np.testing.assert_array_equal(part.best, whole.best[rows])  # type: ignore[index]
    assert 0 < most[0] <= 2 * CHUNK


def test_a_small_batch_takes_the_place_of_a_part_of_a_large_one(deep: ModularPrompt, backbone: Backbone) -> None:
    large, small, points = batch_of("pair", 30), batch_of("single", 2), population(deep, 1, 1.0)
    oracle = open_oracle(backbone, deep, None)
    oracle.score(large, points)
    count = len(held(oracle, large))
    oracle._kept_room = oracle.kept_bytes
    oracle.score(small, points)
    assert all(held(oracle, small))
    assert held(oracle, large).count(True) >= count - 2, "as few as make room"
    assert held(oracle, large)[0]


def test_texts_whose_states_are_dropped_stay_cut_into_tokens(
    deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, points = batch_of("pair", 30), points_of(deep, 2)
    oracle = open_oracle(backbone, deep, 0)
    first = oracle.score(batch, points)
    assert oracle.kept_bytes == 0

    def fail(*_: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(oracle._head, "sequences", fail)
    np.testing.assert_array_equal(oracle.score(batch, points).logits, first.logits)


def test_memory_that_runs_out_amid_a_request_without_room(
    deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, points = batch_of("pair", 30), population(deep, 1, 1.0)
    oracle = LocalOracle(backbone, deep, batch_tokens=256)
    oracle._kept_room = CHUNK
    plain, failed = Encoder.layer, []

    def layer(self: Encoder, index: int, states: Any, *rest: Any) -> Any:
        if states.shape[0] * states.shape[1] > 128:
            failed.append(index)
            raise MemoryError
        return plain(self, index, states, *rest)

    monkeypatch.setattr(Encoder, "layer", layer)
    found = oracle.score(batch, points)
    assert failed
    monkeypatch.undo()
    halved = LocalOracle(backbone, deep, batch_tokens=oracle._portion.tokens)
    np.testing.assert_array_equal(found.logits, halved.score(batch, points).logits)
