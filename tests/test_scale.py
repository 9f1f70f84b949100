"""States that scale a random projection: measured layer by layer, some texts at a time."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from reference import plain_states
from test_verbalizer import causal_dir
from transformers import BertConfig, BertModel

from bbprompt.backends import scale
from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.random_projection import clipped_std

LENGTHS = (5, 40, 9, 23, 24, 5, 3, 38, 60, 60, 60)


def texts(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 300, size).tolist() for size in LENGTHS]


def cut_short(model: Any, layers: int) -> list[list[np.ndarray]]:
    """States that enter each later layer: the last ones of a model that ends there."""
    found, whole = [], model.encoder.layer
    for count in range(1, layers):
        model.encoder.layer = whole[:count]
        found.append(plain_states(model, texts()))
        model.encoder.layer = whole
    return found


@pytest.mark.parametrize("most", [1, 70, 100_000])
def test_texts_in_pieces_have_the_states_of_all_at_once(
    most: int, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cut_short(backbone.model, backbone.layers)
    ran: list[int] = []
    plain = Encoder.layer

    def layer(self: Encoder, index: int, states: torch.Tensor, *rest: Any) -> torch.Tensor:
        ran.append(states.shape[1])
        return plain(self, index, states, *rest)

    monkeypatch.setattr(Encoder, "layer", layer)
    monkeypatch.setattr(scale, "best_batch_tokens", lambda device: most)
    with torch.inference_mode():
        found = [states[0].copy() for states in scale._states(backbone, texts())]
    order = sorted(range(len(LENGTHS)), key=lambda i: (LENGTHS[i], i))
    assert len(found) == len(expected) == backbone.layers - 1
    for states, stock in zip(found, expected, strict=True):
        np.testing.assert_allclose(states, np.concatenate([stock[i] for i in order]), atol=1e-5)
    assert max(ran) <= max(most, max(LENGTHS))
    assert sum(ran) == (backbone.layers - 1) * sum(LENGTHS)


@pytest.mark.parametrize(("room", "passes"), [(0, 2), (1, 2), (2, 1), (100, 1)])
def test_a_stock_model_runs_again_where_its_states_do_not_fit(
    room: int, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(str(causal_dir(tmp_path / "llama", "llama")), head=True)
    layer = 4 * sum(LENGTHS) * backbone.hidden
    monkeypatch.setattr(scale, "free_bytes", lambda device: 4 * layer * room)
    ran: list[int] = []
    hook = backbone.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.inference_mode():
        found = list(scale._stock_states(backbone, texts()))
        assert len(ran) == passes * len(LENGTHS)
        hook.remove()
        stock = [
            backbone.model(input_ids=torch.tensor([each]), output_hidden_states=True).hidden_states for each in texts()
        ]
    assert len(found) == backbone.layers - 1 == 2
    for number, states in enumerate(found, start=1):
        assert np.array_equal(states, np.concatenate([each[number].numpy().ravel() for each in stock]))


@pytest.mark.parametrize("size", [3, 1000, (1 << 16) + 1, 300_007])
def test_the_deviation_is_that_of_the_formula(size: int) -> None:
    values = np.random.default_rng(1).standard_t(2, size).astype(np.float32)
    assert clipped_std(values) == reference.clipped_std(values)
    assert clipped_std(values) < values.std() or size == 3


def _peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_deviation_needs_no_copy_in_float64() -> None:
    values = np.random.default_rng(1).normal(size=1 << 21).astype(np.float32)
    assert _peak(lambda: reference.clipped_std(values)) > 2 * values.nbytes, "numpy's memory is traced"
    assert _peak(lambda: clipped_std(values)) < values.nbytes // 2


def test_one_layer_is_held() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, intermediate_size=64), add_pooling_layer=False).eval().requires_grad_(False)
    backbone = Backbone("made", model, None, "0" * 64, 0, "directory")
    with torch.inference_mode():
        states = list(scale._states(backbone, [[5] * 100] * 4))
    assert len(states) == 5
    assert len({each.__array_interface__["data"][0] for each in states}) == 1, "each layer has memory of its own"
