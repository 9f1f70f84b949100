"""Error against spread, on which texts and candidates it is measured, and what "auto" means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bbprompt.backends.precision import (
    Probe,
    best_precision,
    error_of,
    log_probabilities,
    spread_of,
    training_precision,
    warn_of_slow,
)
from bbprompt.oracle import Scores, TextBatch
from bbprompt.tasks.example import Answer, Form, Part

SIZES = (2, 3)


def scores(logits: np.ndarray) -> Scores:
    return Scores(logits.astype(np.float32), np.zeros((len(logits), 2, 2), np.float32), None, 0)


def test_spread_and_error() -> None:
    logits = np.zeros((4, 5, 2))
    logits[:, :, :] = np.array([-1.0, 1.0, -1.0, 1.0])[:, None, None]
    assert spread_of(scores(logits), SIZES) == pytest.approx(1.0)
    assert spread_of(scores(logits[:1].repeat(4, 0)), SIZES) == 0
    values = log_probabilities(scores(logits), SIZES)
    assert error_of(values, values + 0.25) == pytest.approx(0.25)
    assert error_of(values, values) == 0


def test_what_is_common_to_a_text_drops_out() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 5, 2))
    first = scores(logits)
    moved = Scores(first.logits + 3, first.normalizer + 3, None, 0)
    np.testing.assert_allclose(log_probabilities(moved, SIZES), log_probabilities(first, SIZES), atol=1e-6)


def test_nothing_scored_is_no_evidence() -> None:
    empty = Scores(np.zeros((4, 0, 2), np.float32), np.zeros((4, 2, 2), np.float32), None, 0)
    assert spread_of(empty, (0, 0)) == 0
    assert error_of(log_probabilities(empty, (0, 0)), np.zeros((4, 0))) == np.inf


def test_a_probe_takes_texts_from_all_of_the_batch_and_the_farthest_candidate() -> None:
    forms = tuple(Form((Part(str(i), cut=True),), ("a",) * (1 + i % 3), -1) for i in range(35))
    points = np.zeros((5, 2, 3), np.float32)
    points[:, 1] = np.array([0.0, 1.0, -3.0, 2.0, 0.5])[:, None]
    probe = Probe.of(TextBatch(forms), points)
    assert probe.batch.forms == forms[::4]
    assert probe.pair == (0, 2)
    bounds = np.cumsum([0, *(1 + i % 3 for i in range(35))])
    assert probe.spans.tolist() == [j for i in range(0, 35, 4) for j in range(bounds[i], bounds[i + 1])]


def test_a_probe_of_few_texts_takes_all_with_their_answers() -> None:
    forms = tuple(Form((Part(str(i), cut=True),), (), 0) for i in range(5))
    batch = TextBatch(forms, (None, Answer("a", 0), None, Answer("b", 1), None))
    probe = Probe.of(batch, np.zeros((4, 1, 1), np.float32))
    assert probe.batch == batch
    assert probe.spans.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("avx", "tiles", "precision"), [(True, True, "mixed"), (True, False, "mixed"), (False, False, "float32")]
)
def test_auto(avx: bool, tiles: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert best_precision("cpu") == precision
    assert training_precision("cpu") == ("float32" if precision == "float32" else "bfloat16")


@pytest.mark.parametrize(("fast", "precision"), [(True, "mixed"), (False, "float32")])
def test_auto_on_a_gpu(fast: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast and not including_emulation)
    assert best_precision("cuda") == precision
    assert training_precision("cuda") == ("float32" if precision == "float32" else "bfloat16")


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_without_its_instructions_is_said_to_be_slow(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with caplog.at_level("WARNING", "bbprompt"):
        warn_of_slow(torch.float32, "cpu")
        assert not caplog.messages
        warn_of_slow(torch.bfloat16, "cpu")
    assert caplog.messages == ([] if fast else ["no bfloat16 instructions here (cpu): float32 is several times faster"])
