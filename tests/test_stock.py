"""The oracle that runs stock forwards: texts of like length together, nothing tokenized twice, memory that runs out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_prompt
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_body import open_tiny as open_t5
from test_verbalizer import batch_for, causal_dir, points_for
from test_verbalizer import open_tiny as open_causal

from bbprompt.backends import body, stock
from bbprompt.backends.chunks import chunks_of, in_order
from bbprompt.backends.stock import StockOracle
from bbprompt.errors import OracleError
from bbprompt.oracle import TextBatch
from bbprompt.prompts import ModularPrompt
from bbprompt.tasks.task import Task
from bbprompt.texts.cloze import Tokenize
from bbprompt.texts.forms import cloze_form
from bbprompt.texts.mrc import Encoded
from bbprompt.units import Unit

FAMILIES = ("llama", "t5")
Opener = Callable[..., tuple[StockOracle, ModularPrompt]]


@pytest.fixture(scope="module", params=FAMILIES)
def opener(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """Opens an oracle of the family with the settings given, and its prompts."""
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param == "t5":
        tiny.t5_dir(folder)
        return lambda **settings: open_t5(folder, "all", **settings)[:2]
    causal_dir(folder, request.param)
    return lambda **settings: open_causal(folder, **settings)  # type: ignore[return-value]


def varied(count: int, longest: int = 60) -> TextBatch:
    """Texts of all lengths, a short one after a long one."""
    task = Task.model_validate(tiny_prompt.SINGLE | {"cloze": "{text}很{gap}"})
    sizes = np.random.default_rng(2).integers(1, longest, size=count)
    texts = [{"text": "天气" * (size // 2) + "好" * (size % 2 + 1), "label": "l1"} for size in sizes.tolist()]
    return TextBatch(tuple(cloze_form(task, task.example(text)) for text in texts))


# ------------------------------------------------------------------------------------------------ chunks


@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 800), st.booleans())
def test_chunks_hold_every_sequence_once_and_outputs_come_back(sizes: list[int], most: int, padded: bool) -> None:
    sequences = [Encoded((number,) * size, ((0, 0),), (0, 0), (), 0) for number, size in enumerate(sizes)]
    chunks = chunks_of(sequences, most, padded=padded)
    assert sorted(number for chunk in chunks for number in chunk.numbers) == list(range(len(sizes)))
    assert all(chunk.cells <= most or len(chunk.sequences) == 1 for chunk in chunks)
    assert all(item.ids[0] == n for chunk in chunks for n, item in zip(chunk.numbers, chunk.sequences, strict=True))
    outputs = [torch.tensor([chunk.numbers, chunk.numbers])[..., None] for chunk in chunks]
    back = in_order(chunks, outputs)
    assert [piece.shape for piece in back] == [output.shape for output in outputs]
    assert torch.cat(back, dim=1)[1, :, 0].tolist() == list(range(len(sizes)))


@pytest.mark.parametrize("count", [64, 300])
def test_hardly_anything_that_runs_is_padding(count: int, opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, prompt = opener(batch_tokens=2048)
    cells = tokens = 0
    plain = body._padded

    def note(sequences: list[Any], device: torch.device) -> Any:
        nonlocal cells, tokens
        lengths = [len(ids) for ids in sequences]
        cells, tokens = cells + len(lengths) * max(lengths), tokens + sum(lengths)
        return plain(sequences, device)

    monkeypatch.setattr(body, "_padded", note)
    oracle.score(varied(count), points_for(prompt)[:1])
    assert tokens > 0
    assert cells - tokens < 0.1 * tokens


@pytest.mark.parametrize("batch_tokens", [1, 200, 4096])
def test_the_order_of_work_changes_no_score(batch_tokens: int, opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = varied(40)
    oracle, prompt = opener(batch_tokens=batch_tokens)
    points = points_for(prompt)
    scores = oracle.score(batch, points)
    turned = oracle.score(TextBatch(batch.forms[::-1]), points)
    monkeypatch.setattr(stock, "chunks_of", partial(chunks_of, padded=False))
    unsorted = opener(batch_tokens=batch_tokens)[0].score(batch, points)
    for name in ("logits", "normalizer"):
        found = getattr(scores, name)
        np.testing.assert_allclose(found, getattr(unsorted, name), atol=1e-5, rtol=1e-5)
        by_text = getattr(turned, name).reshape(len(points), 40, -1)[:, ::-1]
        np.testing.assert_allclose(found.reshape(by_text.shape), by_text, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------- kept batches


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that oracles opened from now on tokenize."""
    seen: list[str] = []
    plain = stock.tokenize_with

    def counting(tokenizer: Any) -> Tokenize:
        tokenize = plain(tokenizer)

        def count(text: str) -> Any:
            seen.append(text)
            return tokenize(text)

        return count

    monkeypatch.setattr(stock, "tokenize_with", counting)
    return seen


def test_a_second_score_tokenizes_nothing(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_calls(monkeypatch)
    oracle, prompt = opener(batch_tokens=100)
    batch, points = batch_for("single"), points_for(prompt)
    first = oracle.score(batch, points)
    assert seen
    seen.clear()
    again = oracle.score(batch, points)
    assert oracle.at_once(batch) >= 1
    assert oracle.count_tokens(batch) > 0
    assert seen == []
    np.testing.assert_array_equal(first.logits, again.logits)
    oracle.close()
    oracle.score(batch, points)
    assert seen


def test_kept_batches_are_few_and_change_no_bits(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, prompt = opener(batch_tokens=200)
    points, batches = points_for(prompt), [varied(count) for count in range(3, 14)]
    fresh = [opener(batch_tokens=200)[0].score(batch, points).logits for batch in batches]
    for batch, logits in [*zip(batches, fresh, strict=True)] * 2:
        np.testing.assert_array_equal(oracle.score(batch, points).logits, logits)
    assert len(oracle._kept) == 8
    most = oracle.count_tokens(batches[-1])
    monkeypatch.setattr(stock, "_KEPT_TOKENS", most)
    oracle.score(batches[0], points)
    assert sum(texts.tokens for texts in oracle._kept.values()) <= most
    monkeypatch.setattr(stock, "_KEPT_TOKENS", most - 1)
    np.testing.assert_array_equal(oracle.score(batches[-1], points).logits, fresh[-1])
    assert all(texts.tokens < most for texts in oracle._kept.values()), "what is too large is not kept"


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate")],
)
def test_memory_that_runs_out_halves_the_batch_for_good(
    error: BaseException, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, (whole, prompt) = varied(30), opener()
    points, oracle = points_for(prompt), opener()[0]
    expected, asked = whole.score(batch, points).logits, [0]

    plain = oracle._body.under

    def under(frame: Any, prompts: torch.Tensor, trunk: Any) -> Any:
        run = plain(frame, prompts, trunk)

        def states(number: int, sequences: Any) -> Any:
            asked.append(len(prompts) * len(sequences) * max(len(item.ids) for item in sequences))
            if asked[-1] > 600:
                raise error
            return run(number, sequences)

        return states

    monkeypatch.setattr(oracle._body, "under", under)
    np.testing.assert_allclose(oracle.score(batch, points).logits, expected, atol=1e-5, rtol=1e-5)
    assert max(asked) > 600
    asked.clear()
    oracle.score(batch, points)
    assert max(asked) <= 600, "it must remember"
    assert oracle.info.batch_tokens == 4096, "as it was opened"


@pytest.mark.parametrize("unit", [False, True])
def test_memory_that_never_suffices(unit: bool, opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    oracle, prompt = opener()
    monkeypatch.setattr(oracle._body, "under", fail)
    batch, points = varied(3), points_for(prompt)
    with pytest.raises(OracleError, match="does not fit into memory with 64 tokens"):
        oracle.score_unit(batch, points, "candidates", None, Unit(0, 1)) if unit else oracle.score(batch, points)
