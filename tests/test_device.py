"""What runs on a GPU waits for nothing and mixes no devices, shown on torch's device without data.

A tensor there has a shape and no content, so to look at one of its entries is an error; and no operation may be given
tensors of two devices. Whatever gets through would not have made the host wait for a GPU, either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import points_of
from test_prototype_head import data_for, prompt_for
from tiny_prompt import batch_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bbprompt.backends import fit, local
from bbprompt.backends.backbone import Backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.oracle import Support
from bbprompt.prompts import ModularPrompt
from bbprompt.units import Unit


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices; some of them, such as products, let a host's tensor pass there."""

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        given: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}  # numbers go everywhere
        if len(devices) > 1:
            raise RuntimeError(f"{operation}: tensors on meta and another device")
        return operation(*given, **(named or {}))


def away(backbone: Backbone, prompt: ModularPrompt, monkeypatch: pytest.MonkeyPatch, dtype: str) -> LocalOracle:
    """An oracle on the device without data, whose scores are left where they are."""
    monkeypatch.setattr(fit, "_describe", lambda device: device)
    monkeypatch.setattr(local, "join", lambda parts: parts[0])  # of one unit, and no scores
    oracle: Any = LocalOracle(backbone, prompt, device="meta", dtype=dtype, batch_tokens=200)
    head = oracle._head
    monkeypatch.setattr(head, "scores", lambda batch, plans, outputs, _longest: head.values(batch, plans, outputs))
    return oracle


def left(oracle: Any, batch: Any, points: np.ndarray, support: Support) -> tuple[torch.Tensor, ...]:
    """Logits and normalizers of all candidates on all texts, where they are."""
    with torch.inference_mode(), OneDevice():
        return oracle._units(batch, points, support, None, [Unit(0, len(points))])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("support", ["candidates", "sequence"])
@pytest.mark.parametrize("kind", ["pair", "choice", "extract"])
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_candidates_run_without_a_look_at_them(
    layer: int | None,
    kind: str,
    support: Support,
    dtype: str,
    deep: ModularPrompt,
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = points_of(deep, 3)
    if layer is not None:
        points[1:] = points[:1]
        points[1, layer] += 1
    batch = batch_of(kind)
    here = LocalOracle(backbone, deep, dtype=dtype).score(batch, points, support)
    logits, normalizer = left(away(backbone, deep, monkeypatch, dtype), batch, points, support)
    assert (logits.device.type, normalizer.device.type) == ("meta", "meta")
    assert (logits.shape, normalizer.shape) == (here.logits.shape, here.normalizer.shape)


@pytest.mark.parametrize("kind", ["single", "pair", "same"])
def test_embeddings_are_compared_without_a_look_at_them(
    kind: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, batch = prompt_for(backbone), data_for(kind).batch
    points = points_of(prompt, 3)
    here = LocalOracle(backbone, prompt).score(batch, points)
    logits, normalizer = left(away(backbone, prompt, monkeypatch, "float32"), batch, points, "candidates")
    assert (logits.device.type, normalizer.device.type) == ("meta", "meta")
    assert (logits.shape, normalizer.shape) == (here.logits.shape, here.normalizer.shape)


@pytest.mark.parametrize(
    "spoilt",
    [lambda states: states * float(states.sum()), lambda states: states @ torch.ones(states.shape[-1], 2)],
    ids=["look", "product with the host"],
)
def test_what_it_is_shown_by_is_an_error(
    spoilt: Callable[[torch.Tensor], torch.Tensor],
    deep: ModularPrompt,
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    oracle: Any = away(backbone, deep, monkeypatch, "float32")
    monkeypatch.setattr(oracle._head, "apply", lambda _plan, states: spoilt(states))
    with pytest.raises(RuntimeError, match="meta"):
        left(oracle, batch_of("pair"), points_of(deep, 3), "candidates")
