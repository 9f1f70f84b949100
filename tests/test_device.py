"""What runs on a GPU waits for nothing and mixes no devices, shown on torch's device without data.

A tensor there has a shape and no content, so to look at one of its entries is an error; and no operation may be given
tensors of two devices. What this does not show are the moments at which a copy from the host is waited for; so copies
of tensors are counted: a request makes as many for any number of candidates and units. Lists that become tensors are
not seen here.
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
    """Refuses operations on tensors of two devices; some of them, such as products, let a host's tensor pass there.

    Attributes:
        copies: Tensors that were copied from the host so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

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
        found = operation(*given, **(named or {}))
        if "cpu" in devices and isinstance(found, torch.Tensor) and found.device.type == "meta":
            self.copies += 1
        return found


def away(backbone: Backbone, prompt: ModularPrompt, monkeypatch: pytest.MonkeyPatch, dtype: str) -> LocalOracle:
    """An oracle on the device without data, whose scores are left where they are."""
    monkeypatch.setattr(fit, "_describe", lambda device: device)
    monkeypatch.setattr(local, "join", lambda parts: parts[0])  # they are read at once, and are no scores
    monkeypatch.setattr(local, "_READ", 1)
    oracle: Any = LocalOracle(backbone, prompt, device="meta", dtype=dtype, batch_tokens=200)
    head = oracle._head
    monkeypatch.setattr(head, "scores", lambda batch, plans, outputs, _longest: head.values(batch, plans, outputs))
    return oracle


def left(oracle: Any, batch: Any, points: np.ndarray, support: Support) -> tuple[torch.Tensor, ...]:
    """Logits and normalizers of all candidates on all texts, where they are."""
    with torch.inference_mode(), OneDevice():
        return oracle._units(batch, points, support, None, [Unit(0, 1), Unit(1, len(points))])


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


@pytest.mark.parametrize("kind", ["span", "prototype"])
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_deviations_are_not_looked_at(
    layer: int | None, kind: str, deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, batch = (deep, batch_of("pair")) if kind == "span" else (prompt_for(backbone), data_for("pair").batch)
    points = points_of(prompt, 9)
    if layer is not None:
        points[1:, [other for other in range(points.shape[1]) if other != layer]] = points[0, 0]
    oracle: Any = away(backbone, prompt, monkeypatch, "mixed")
    copies = []
    for count in (9, 9, 5):
        with torch.inference_mode(), OneDevice() as counted:
            logits, normalizer = oracle._deviations(batch, points[:count], "candidates", None)
        copies.append(counted.copies)
    points = points[:count]
    here = LocalOracle(backbone, prompt).score(batch, points)
    assert (logits.device.type, normalizer.device.type) == ("meta", "meta")
    assert (logits.shape, normalizer.shape) == (here.logits.shape, here.normalizer.shape)
    assert copies[1] == copies[2] <= 4, "behind the first request, which embeds the texts"


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_more_candidates_and_units_are_no_more_copies(
    layer: int | None, deep: ModularPrompt, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle: Any = away(backbone, deep, monkeypatch, "float32")
    points, batch = points_of(deep, 6), batch_of("pair")
    if layer is not None:
        points[1:, [other for other in range(points.shape[1]) if other != layer]] = points[0, 0]
    found = []
    for count, size in ((6, 6), (2, 2), (2, 1), (6, 1)):
        units = [Unit(first, first + size) for first in range(0, count, size)]
        with torch.inference_mode(), OneDevice() as counted:
            oracle._units(batch, points[:count], "candidates", None, units)
        found.append(counted.copies)
    # The first request embeds the texts, whose tokens come from the host, too.
    assert found[1:] == [found[1]] * 3
    assert 2 <= found[1] <= 4, "the points that differ, those that do not, and where to read"


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
