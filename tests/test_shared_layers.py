"""Layers that the candidates of a request share in causal models and T5: run once, kept in bounds, and exact."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_body
import test_causal_families
import test_stock
import test_verbalizer
import tiny

from bbprompt.backends import stock
from bbprompt.backends.body import blocks_of
from bbprompt.backends.scale import facts_of
from bbprompt.backends.stock import StockOracle
from bbprompt.prompts import ModularPrompt
from bbprompt.random_projection import random_prompt
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.units import Unit, plan_units

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
OTHERS = test_causal_families.HEADS | test_causal_families.BLOCKS
FAMILIES = [*test_verbalizer.CAUSAL, *OTHERS, *test_body.FAMILIES]
FORKS = (0, 1, tiny.LAYERS - 1)
#: So few tokens run at once that the texts of `batch` are several chunks, and the candidates several units.
FEW = 80


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[StockOracle, ModularPrompt]]:
    """Opens an oracle with deep prompts for a tiny model of a family."""
    root = tmp_path_factory.mktemp("models")

    def find(name: str, **settings: Any) -> tuple[Any, ModularPrompt]:
        folder = root / name
        if not folder.is_dir():
            write(folder, name)
        if name in test_body.FAMILIES:
            return test_body.open_tiny(folder, "all", **settings)[:2]
        return test_verbalizer.open_tiny(folder, **settings)

    return find


def write(folder: Path, name: str) -> None:
    if name in test_body.FAMILIES:
        tiny.t5_dir(folder, **test_body.FAMILIES[name])
    elif name in OTHERS:
        test_causal_families.family_dir(folder, *OTHERS[name])
    else:
        test_verbalizer.causal_dir(folder, name)


def forked(prompt: ModularPrompt, fork: int, count: int = 3, below: int = 0) -> np.ndarray:
    """Candidates that differ from layer `fork` on; `below` draws what they share."""
    shape = prompt.space.shape
    points = np.random.default_rng(7 + fork).normal(size=(count, *shape)).astype(np.float32)
    points[:, :fork] = np.random.default_rng(100 + below).normal(size=shape).astype(np.float32)[:fork]
    return points


def alone(oracle: StockOracle, batch: Any, points: np.ndarray) -> np.ndarray:
    """The logits of each candidate in a request of its own, which runs through all layers."""
    return np.concatenate([oracle.score(batch, points[n : n + 1]).logits for n in range(len(points))])


@contextmanager
def counted(oracle: StockOracle) -> Iterator[Counter[int]]:
    """Counts how often each block computes: a block that is passed over does not run what is in it."""
    model: Any = oracle._backbone.model
    body = model.base_model if oracle._backbone.head.causal else model.get_encoder()  # type: ignore[union-attr]
    runs, handles = Counter[int](), []
    for number, block in enumerate(blocks_of(body)):
        leaf = next(module for module in block.modules() if not list(module.children()))

        def note(_module: Any, _args: Any, number: int = number) -> None:
            runs[number] += 1

        handles.append(leaf.register_forward_pre_hook(note))
    yield runs
    for handle in handles:
        handle.remove()


def parts(oracle: StockOracle, batch: Any, candidates: int) -> tuple[int, int]:
    """Chunks of the texts, and units of the candidates."""
    return len(oracle._texts(batch, "candidates").chunks), len(plan_units(candidates, oracle.at_once(batch)))


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_each_candidate_alone(name: str, opened: Callable[..., Any]) -> None:
    (oracle, prompt), batch = opened(name, batch_tokens=FEW), test_stock.varied(7, 20)
    whole, plain = opened(name)[0], opened(name, batch_tokens=FEW)[0]
    for step, fork in enumerate((*FORKS, *FORKS[1:], 1)):  # layer by layer, twice, and back
        points = forked(prompt, fork, below=step > len(FORKS))
        expected = alone(plain, batch, points)
        np.testing.assert_allclose(oracle.score(batch, points).logits, expected, **CLOSE)
        np.testing.assert_allclose(whole.score(batch, points).logits, expected, **CLOSE)
    assert parts(oracle, batch, 3)[0] > 1
    assert oracle._forks == dict.fromkeys(FORKS[1:], True), "every family here can share its layers"


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_what_is_kept_changes_no_bits(name: str, opened: Callable[..., Any]) -> None:
    (oracle, prompt), batch = opened(name, batch_tokens=FEW), test_stock.varied(7, 20)
    for step, fork in enumerate((1, 2, 2, 2, 1, 0, 2)):
        points = forked(prompt, fork, below=step == 2)
        found, fresh = oracle.score(batch, points), opened(name, batch_tokens=FEW)[0]
        units = plan_units(len(points), oracle.at_once(batch))
        pieces = [fresh.score_unit(batch, points, "candidates", None, unit).logits for unit in units[::-1]]
        np.testing.assert_array_equal(found.logits, np.concatenate(pieces[::-1]))


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_half_precision_shares_them_too(name: str, opened: Callable[..., Any]) -> None:
    (oracle, prompt), batch = opened(name, dtype="bfloat16"), test_stock.varied(5, 20)
    for fork in FORKS[1:]:
        points = forked(prompt, fork)
        expected = alone(oracle, batch, points)
        np.testing.assert_allclose(oracle.score(batch, points).logits, expected, atol=0.05 * np.abs(expected).max())
    assert oracle._forks == dict.fromkeys(FORKS[1:], True)


# ------------------------------------------------------------------------------------------------ layers run


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "t5"])
def test_shared_layers_run_once(name: str, opened: Callable[..., Any]) -> None:
    (oracle, prompt), batch, layers = opened(name, batch_tokens=FEW), test_stock.varied(7, 20), tiny.LAYERS
    for fork in FORKS:
        oracle.score(batch, forked(prompt, fork))  # so that a fork is tried before it is counted
    oracle.close()
    (chunks, units), front = parts(oracle, batch, 5), int(name != "t5")
    assert chunks > 1 < units

    def ran(fork: int, below: int = 0) -> list[int]:
        with counted(oracle) as runs:
            oracle.score(batch, forked(prompt, fork, 5, below))
        return [runs[layer] for layer in range(layers)]

    once, each = chunks + front, units * (chunks + front)
    assert ran(0) == [each] * layers, "what stands before the texts runs once a unit, not once a chunk"
    assert ran(1) == [once] + [each] * (layers - 1)
    assert ran(1) == [0] + [each] * (layers - 1), "kept for the next request"
    assert ran(layers - 1) == [0] + [once] * (layers - 2) + [each], "taken further"
    assert ran(layers - 1, below=1) == [once] * (layers - 1) + [each], "the prompts below have changed"
    assert ran(1, below=1) == [once] + [each] * (layers - 1)


def test_rows_before_the_first_token_run_once(opened: Callable[..., Any], tmp_path: Path) -> None:
    backbone = test_verbalizer.load_tiny(test_verbalizer.causal_dir(tmp_path / "m", "llama"))
    config = ProjectionConfig(
        readout="verbalizer", layers="input", prompt_length=2, dim=4, scale=1.0, injection="prepend"
    )
    prompt = random_prompt(config, facts_of(backbone), 3)
    oracle, batch = StockOracle(backbone, prompt, batch_tokens=FEW), test_stock.varied(7, 20)
    points = forked(prompt, 0)
    chunks, units = parts(oracle, batch, 3)
    with counted(oracle) as runs:
        scores = oracle.score(batch, points)
    assert runs[0] == units * (chunks + 1)
    np.testing.assert_allclose(scores.logits, alone(oracle, batch, points), **CLOSE)


# ------------------------------------------------------------------------------------------------ fall back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["sizes", "silent", "missing"])
def test_a_model_that_hands_more_on_runs_through_all_layers(
    fault: str,
    dtype: str,
    opened: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (oracle, prompt), batch = opened("llama", batch_tokens=FEW, dtype=dtype), test_stock.varied(7, 20)
    blocks, handed = blocks_of(oracle._backbone.model.base_model), dict[str, Any]()
    first, third = blocks[0].forward, blocks[2].forward

    def gives(states: Any, **more: Any) -> Any:
        handed["states"] = states
        return first(states, **more)

    def takes(states: Any, **more: Any) -> Any:
        before = handed.pop("states") if fault == "missing" else handed["states"]
        if fault == "silent" and before.shape != states.shape:  # of another call
            return third(states, **more)
        return third(states + before, **more)

    monkeypatch.setattr(blocks[0], "forward", gives)
    monkeypatch.setattr(blocks[2], "forward", takes)
    with caplog.at_level(logging.INFO, logger="bbprompt"):
        for fork in FORKS:
            points = forked(prompt, fork)
            close = CLOSE if dtype == "float32" else {"atol": 0.5}  # candidates beside others round otherwise
            np.testing.assert_allclose(oracle.score(batch, points).logits, alone(oracle, batch, points), **close)
    assert oracle._forks == dict.fromkeys(FORKS[1:], False)
    told = [record.getMessage() for record in caplog.records if "cannot go on" in record.getMessage()]
    assert len(told) == 2
    assert all(word in told[0] for word in ("type 'llama'", "layer 1", "run through all layers"))
    assert blocks[0].forward is gives, "blocks are left as they were"
    assert "forward" not in vars(blocks[1])


def test_memory_that_runs_out_in_the_trial_is_no_verdict(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (oracle, prompt), batch = opened("llama"), test_stock.varied(5, 20)
    plain, failed = oracle._body.grown, list[int]()

    def grown(*given: Any) -> Any:
        if not failed:
            failed.append(1)
            raise MemoryError
        return plain(*given)

    monkeypatch.setattr(oracle._body, "grown", grown)
    oracle.score(batch, forked(prompt, 2))
    assert failed
    assert oracle._forks == {2: True}
    assert oracle._portion.tokens == 2048


# ------------------------------------------------------------------------------------------------ memory


def test_kept_bytes_are_those_of_the_states(opened: Callable[..., Any]) -> None:
    oracle, prompt = opened("llama", batch_tokens=FEW)
    batch, fork = test_stock.varied(7, 20), 2
    assert oracle.kept_bytes == 0
    oracle.score(batch, forked(prompt, fork, 1))
    assert oracle.kept_bytes == 0, "a candidate alone shares nothing"
    oracle.score(batch, forked(prompt, fork))
    front, chunks = oracle._frame.text_start, oracle._texts(batch, "candidates").chunks
    rows = sum(chunk.cells - front * len(chunk.sequences) for chunk in chunks) + front + fork * 2
    cached = fork * 2 * front * 2 * tiny.HIDDEN // tiny.HEADS  # keys and values of two heads
    assert oracle.kept_bytes == 4 * (rows * tiny.HIDDEN + cached)
    oracle.close()
    assert oracle.kept_bytes == 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.2])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_no_more_is_kept_than_there_is_room_for(name: str, share: float, opened: Callable[..., Any]) -> None:
    (oracle, prompt), batches = opened(name, batch_tokens=FEW), [test_stock.varied(count, 20) for count in (7, 9)]
    points = forked(prompt, 2)
    oracle.score(batches[1], points)
    oracle._kept_room = int(share * oracle.kept_bytes)
    expected = [alone(oracle, batch, points) for batch in batches]
    for batch, logits in [*zip(batches, expected, strict=True)] * 2:
        scores = oracle.score(batch, points).logits
        np.testing.assert_allclose(scores, logits, **CLOSE)
        fresh = opened(name, batch_tokens=FEW)[0]
        np.testing.assert_array_equal(scores, fresh.score(batch, points).logits)
        assert oracle.kept_bytes <= oracle._kept_room
        found = oracle.score_unit(batch, points, "candidates", None, Unit(0, 1)).logits
        np.testing.assert_allclose(found, logits[:1], **CLOSE)
        assert (oracle.kept_bytes > 0) == (share > 0)


def test_texts_that_are_too_many_to_keep_take_no_more_room(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (oracle, prompt), batch = opened("llama", batch_tokens=FEW), test_stock.varied(9, 20)
    points, most = forked(prompt, 2), 0
    oracle.score(batch, points)
    chunk = max(given.bytes for _, given in oracle._texts(batch, "candidates").shared[1].texts.values())
    oracle._kept_room = oracle.kept_bytes // 2
    oracle.close()
    plain = oracle._make_room

    def noted(running: Any, trunk: Any, done: int) -> None:
        nonlocal most
        most = max(most, trunk.bytes)
        plain(running, trunk, done)
        assert trunk.bytes <= oracle._kept_room

    monkeypatch.setattr(stock, "_KEPT_TOKENS", 1)
    monkeypatch.setattr(oracle, "_make_room", noted)
    oracle.score(batch, points)
    assert oracle._kept == {}
    assert oracle._kept_room < most <= oracle._kept_room + chunk
