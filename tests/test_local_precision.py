"""Precision and memory of the local oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
from reference import PlainOracle, compare, points_of
from test_prototype_head import data_for, prompt_for
from tiny_prompt import batch_of

from bbprompt.backends import deviation
from bbprompt.backends import population as population_module
from bbprompt.backends.backbone import Backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.local import LocalOracle
from bbprompt.errors import OracleError
from bbprompt.prompts import ModularPrompt
from bbprompt.readout import Readout

# ---------------------------------------------------------------------------------------- precision


def population(prompt: ModularPrompt, layer: int, size: float, count: int = 12) -> np.ndarray:
    points = np.repeat(points_of(prompt, 1), count, axis=0)
    points[:, layer] += size * np.random.default_rng(6).normal(size=(count, points.shape[2]))
    return points


@pytest.mark.parametrize("kind", ["pair", "extract"])
@pytest.mark.parametrize("layer", range(tiny.LAYERS))
def test_a_population_of_one_layer_equals_the_plain_forward(
    kind: str, layer: int, deep: ModularPrompt, backbone: Backbone
) -> None:
    batch, points = batch_of(kind, 5), population(deep, layer, 1.0, 3)
    scores = LocalOracle(backbone, deep).score(batch, points)
    compare(scores, PlainOracle(backbone, deep), batch, points, "candidates")


@pytest.mark.parametrize("tokens", [60, 10_000])
@pytest.mark.parametrize("layer", range(tiny.LAYERS))
def test_mixed_precision_ranks_as_float32(layer: int, tokens: int, deep: ModularPrompt, backbone: Backbone) -> None:
    batch, readout = batch_of("pair"), Readout()
    points = population(deep, layer, 1e-2)
    oracle = LocalOracle(backbone, deep, dtype="mixed", batch_tokens=tokens)
    mixed, exact = oracle.score(batch, points), LocalOracle(backbone, deep).score(batch, points)
    one, other = (readout.losses(scores, batch, [0] * 9).mean(axis=1) for scores in (mixed, exact))
    last = layer == tiny.LAYERS - 1
    assert oracle.precisions == ({} if last else {"deviations": 1})
    assert oracle.info.precision == "mixed"
    error, spread = (one - other).std(), other.std()
    assert error < 0.05 * spread
    assert scipy.stats.kendalltau(one, other).statistic > 0.9
    rough = LocalOracle(backbone, deep, dtype="bfloat16").score(batch, points)
    plain = readout.losses(rough, batch, [0] * 9).mean(axis=1)
    assert (plain - other).std() > 3 * error, "bfloat16 throughout must be worse"
    np.testing.assert_array_equal(oracle.score(batch, points).logits, mixed.logits)


@pytest.mark.parametrize("count", [4, 12])
@pytest.mark.parametrize("kind", ["pair", "choice", "extract"])
def test_candidates_that_lie_far_apart_run_in_bfloat16(
    kind: str, count: int, deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bbprompt.backends.local.ENOUGH_THROUGHOUT", 2.0
    )  # untrained, the model tells prompts hardly apart
    batch, points = batch_of(kind), points_of(deep, count)
    oracle = LocalOracle(backbone, deep, dtype="mixed")
    got = oracle.score(batch, points)
    assert oracle.precisions == {"bfloat16": 1}
    low = LocalOracle(backbone, deep, dtype="bfloat16").score(batch, points)
    np.testing.assert_array_equal(got.logits, low.logits)
    exact = LocalOracle(backbone, deep).score(batch, points)
    assert not np.array_equal(got.logits, exact.logits)


def test_few_candidates_that_lie_close_run_in_float32(deep: ModularPrompt, backbone: Backbone) -> None:
    batch, points = batch_of("pair"), population(deep, 1, 1e-3, 7)
    oracle = LocalOracle(backbone, deep, dtype="mixed")
    np.testing.assert_array_equal(
        oracle.score(batch, points).logits, LocalOracle(backbone, deep).score(batch, points).logits
    )
    assert oracle.precisions == {"float32": 1}


@pytest.mark.parametrize("layer", range(tiny.LAYERS - 1))
def test_deviations_as_a_gpu_runs_them_are_the_same(
    layer: int, deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, points = batch_of("pair"), population(deep, layer, 1e-2)
    exact = LocalOracle(backbone, deep).score(batch, points).logits
    blocks = LocalOracle(backbone, deep, dtype="mixed").score(batch, points).logits
    monkeypatch.setattr(deviation, "_in_blocks", deviation._at_once)
    oracle = LocalOracle(backbone, deep, dtype="mixed")
    found = oracle.score(batch, points).logits
    assert oracle.precisions == {"deviations": 1}
    np.testing.assert_array_equal(found[0], blocks[0])  # the reference is float32 in both
    np.testing.assert_allclose(found, blocks, atol=5e-4)  # products of bfloat16 round by their shape
    moved = np.abs(exact - exact[:1]).max()
    assert np.abs(found - exact).max() < 0.05 * moved
    rough = LocalOracle(backbone, deep, dtype="bfloat16").score(batch, points).logits
    assert np.abs(rough - exact).max() > 3 * np.abs(found - exact).max()


def test_mixed_precision_does_not_depend_on_what_was_scored_before(
    deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bbprompt.backends.local.ENOUGH_THROUGHOUT", 2.0)
    batch = batch_of("pair")
    requests = [points_of(deep, 4), population(deep, 1, 1e-2), population(deep, 2, 1e-3), points_of(deep, 12, 3)]
    oracle = LocalOracle(backbone, deep, dtype="mixed")
    together = [oracle.score(batch, points).logits for points in requests]
    assert oracle.precisions == {"bfloat16": 2, "deviations": 1}
    for points, logits in zip(requests, together, strict=True):
        alone = LocalOracle(backbone, deep, dtype="mixed").score(batch, points).logits
        np.testing.assert_array_equal(alone, logits)


def test_mixed_precision_falls_back(
    deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch, points = batch_of("pair"), population(deep, 1, 1e-3)
    exact = LocalOracle(backbone, deep).score(batch, points)
    oracle = LocalOracle(backbone, deep, dtype="mixed")
    assert not np.array_equal(oracle.score(batch, points).logits, exact.logits)
    monkeypatch.setattr("bbprompt.backends.local.ENOUGH", 1e9)
    np.testing.assert_array_equal(oracle.score(batch, points).logits, exact.logits)
    assert oracle.precisions == {"deviations": 1, "float32": 1}
    with caplog.at_level("INFO"):
        oracle.close()
    assert "1 in deviations, 1 in float32" in caplog.text


def test_mixed_precision_scores_few_candidates_in_float32(deep: ModularPrompt, backbone: Backbone) -> None:
    batch, points = batch_of("pair"), points_of(deep, 3)
    oracle = LocalOracle(backbone, deep, dtype="mixed")
    np.testing.assert_array_equal(
        oracle.score(batch, points).logits, LocalOracle(backbone, deep).score(batch, points).logits
    )
    assert oracle.precisions == {}


def test_a_population_that_is_held_in_pieces(
    deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, points = batch_of("pair"), population(deep, 1, 1e-3, 30)
    whole = LocalOracle(backbone, deep, dtype="mixed").score(batch, points)
    monkeypatch.setattr("bbprompt.backends.local._HELD", 0)
    pieces = LocalOracle(backbone, deep, dtype="mixed").score(batch, points)
    np.testing.assert_allclose(pieces.logits, whole.logits, atol=5e-4)  # products of bfloat16 round by their shape


@pytest.mark.parametrize("layer", range(tiny.LAYERS))
def test_embeddings_are_deviations_through_the_last_layer(layer: int, backbone: Backbone) -> None:
    prompt, data, readout = prompt_for(backbone), data_for("pair"), Readout()
    points = population(prompt, layer, 1e-2)
    oracle, exact = LocalOracle(backbone, prompt, dtype="mixed"), LocalOracle(backbone, prompt)
    one, other = (readout.losses(each.score(data.batch, points), data.batch, data.gold) for each in (oracle, exact))
    assert oracle.precisions == {"deviations": 1}
    assert scipy.stats.kendalltau(one.mean(axis=1), other.mean(axis=1)).statistic > 0.9
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(("room", "products"), [(1 << 26, 1), (0, 6 * 3)])
def test_prompts_are_made_once_a_request(
    room: int, products: int, deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, points = batch_of("pair"), population(deep, 1, 1.0, 6)
    exact = LocalOracle(backbone, deep).score(batch, points)
    made: list[int] = []
    plain = population_module.Runner._made_of

    def counted(self: population_module.Runner, some: torch.Tensor, layer: int) -> torch.Tensor:
        made.append(layer)
        return plain(self, some, layer)

    monkeypatch.setattr(population_module.Runner, "_made_of", counted)
    monkeypatch.setattr(population_module, "_MADE", room)
    oracle = LocalOracle(backbone, deep, batch_tokens=100)  # one candidate a unit, and the texts in several chunks
    np.testing.assert_allclose(oracle.score(batch, points).logits, exact.logits, atol=1e-5)
    assert oracle.at_once(batch) == 1
    assert len(oracle._chunks(batch, "candidates")) == 3
    assert made.count(1) == products
    assert [made.count(layer) for layer in range(tiny.LAYERS) if layer != 1] == [1] * (tiny.LAYERS - 1)


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate")],
)
def test_memory_that_runs_out_halves_the_batch_for_good(
    error: BaseException, deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, points = batch_of("pair"), points_of(deep, 4)
    whole = LocalOracle(backbone, deep).score(batch, points)
    oracle = LocalOracle(backbone, deep)
    plain, asked = Encoder.layer, []

    def layer(self: Encoder, index: int, states: torch.Tensor, *rest: object) -> torch.Tensor:
        asked.append(states.shape[0] * states.shape[1])
        if asked[-1] > 300:
            raise error
        return plain(self, index, states, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "layer", layer)
    np.testing.assert_allclose(oracle.score(batch, points).logits, whole.logits, atol=1e-5)
    assert max(asked) > 300
    asked.clear()
    oracle.score(batch, points)
    assert max(asked) <= 300, "it must remember"


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_a_head_that_memory_is_short_for_reads_fewer_candidates(
    dtype: str, deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, points = batch_of("pair"), population(deep, 1, 1e-3, 40)
    whole = LocalOracle(backbone, deep, dtype=dtype).score(batch, points)
    oracle: Any = LocalOracle(backbone, deep, dtype=dtype)
    plain, asked = oracle._head.scores, []

    def scores(batch: Any, plans: Any, outputs: Any, longest: int | None) -> Any:
        asked.append(len(outputs[0]))
        if asked[-1] > 16:
            raise MemoryError
        return plain(batch, plans, outputs, longest)

    monkeypatch.setattr(oracle._head, "scores", scores)
    np.testing.assert_allclose(oracle.score(batch, points).logits, whole.logits, atol=5e-4)
    assert max(asked) == 40
    assert oracle._portion.tokens == 1024
    assert 16 in asked


def test_deviations_that_memory_is_short_for_are_held_in_smaller_pieces(
    deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, points = batch_of("pair"), population(deep, 1, 1e-3, 200)
    whole = LocalOracle(backbone, deep, dtype="mixed").score(batch, points)
    oracle = LocalOracle(backbone, deep, dtype="mixed")
    plain, held = population_module.deviate, []

    def short(encoder: Encoder, rough: Encoder, layer: int, states: torch.Tensor, *rest: object) -> torch.Tensor:
        held.append(states.shape[0] * states.shape[1])
        if held[-1] > 2000:
            raise MemoryError
        return plain(encoder, rough, layer, states, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(population_module, "deviate", short)
    np.testing.assert_allclose(oracle.score(batch, points).logits, whole.logits, atol=5e-4)
    assert oracle.precisions == {"deviations": 1}
    assert max(held) > 2000 > held[-1]


def test_memory_that_never_suffices(deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Encoder, "layer", fail)
    with pytest.raises(OracleError, match="does not fit into memory with 64 tokens"):
        LocalOracle(backbone, deep).score(batch_of("pair"), points_of(deep, 1))


def test_other_errors_pass(deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Encoder, "layer", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        LocalOracle(backbone, deep).score(batch_of("pair"), points_of(deep, 1))


def test_of_prompts_only_those_that_candidates_share_are_kept(deep: ModularPrompt, backbone: Backbone) -> None:
    oracle = LocalOracle(backbone, deep)
    oracle.score(batch_of("pair"), points_of(deep, 9))  # differ in every layer
    assert oracle._runner._made == {}
    oracle.score(batch_of("pair"), population(deep, 1, 1.0))
    assert {layer: len(prompt) for layer, (_, prompt) in oracle._runner._made.items()} == {0: 1, 2: 1}


def test_the_cache_says_its_size(deep: ModularPrompt, backbone: Backbone) -> None:
    oracle = LocalOracle(backbone, deep)
    assert oracle.kept_bytes == 0
    oracle.score(batch_of("pair"), population(deep, 2, 1.0))
    [chunk] = oracle._kept[next(iter(oracle._kept))]
    trunk = chunk.main.trunk
    assert trunk.shared is not None
    # States that enter layers 0 to 2, and what candidates share inside layer 2.
    assert oracle.kept_bytes == 3 * chunk.tokens * tiny.HIDDEN * 4 + trunk.shared[1].nbytes
    oracle.close()
    assert oracle.kept_bytes == 0


def test_the_cache_is_bounded(
    deep: ModularPrompt, backbone: Backbone, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, points = batch_of("pair"), batch_of("extract"), points_of(deep, 1)
    oracle = LocalOracle(backbone, deep)
    expected = [oracle.score(batch, points).logits for batch in (first, second)]
    both = oracle.kept_bytes
    monkeypatch.setattr("bbprompt.backends.local.room_to_keep", lambda device: both - 1)
    bounded = LocalOracle(backbone, deep)
    for batch, logits in zip((first, second), expected, strict=True):
        np.testing.assert_array_equal(bounded.score(batch, points).logits, logits)
    assert [sum(trunk.bytes for trunk in kept.trunks) > 0 for [kept] in bounded._kept.values()] == [False, True]
    monkeypatch.setattr("bbprompt.backends.local.room_to_keep", lambda device: 0)
    without = LocalOracle(backbone, deep)
    for logits in (expected[0], expected[0]):
        np.testing.assert_array_equal(without.score(first, points).logits, logits)
    assert without.kept_bytes == 0
    with caplog.at_level("INFO"):
        oracle.close()
    assert f"at most {both / 1e6:.0f} MB" in caplog.text
