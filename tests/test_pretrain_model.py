"""Pre-training, its parts: gates, options, loss."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.tokens import frame_for
from bbprompt.pretrain.card import _curve
from bbprompt.pretrain.linear import DifferentiableLinear
from bbprompt.pretrain.mixture import thin_options
from bbprompt.pretrain.model import ModularPrompts, Phase, collate, relaxed_bernoulli, span_loss
from bbprompt.router import CODE
from bbprompt.tasks.example import Example
from bbprompt.texts.mrc import Encoded

# ----------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_relaxed_bernoulli_opens_gates_with_the_right_probability(temperature: float) -> None:
    logits = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    samples = relaxed_bernoulli(logits.expand(20_000, 5), temperature, generator)
    assert ((samples >= 0) & (samples <= 1)).all()
    # P(gate > 1/2) = sigmoid(logit), whatever the temperature.
    np.testing.assert_allclose((samples > 0.5).float().mean(0), torch.sigmoid(logits), atol=0.015)
    if temperature == 0.1:
        assert ((samples < 0.05) | (samples > 0.95)).float().mean() > 0.75, "nearly binary"


def test_relaxed_bernoulli_is_the_formula() -> None:
    logits = torch.tensor([0.3, -1.2])
    u = torch.rand(2, generator=torch.Generator().manual_seed(4))
    expected = torch.sigmoid((logits + torch.log(u) - torch.log(1 - u)) / 0.7)
    torch.testing.assert_close(relaxed_bernoulli(logits, 0.7, torch.Generator().manual_seed(4)), expected)


def test_points_are_routed_mixtures(tiny_bert_dir: Path) -> None:
    frame = frame_for(load_backbone(str(tiny_bert_dir)).tokenizer, (300, 301), 64)
    prompts = ModularPrompts(5, 3, 4, 6, frame, 32, 0.05, torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompts.router.normal_(generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    tasks = torch.tensor([4, 1])
    points = prompts.points(Phase(noise=False), generator, tasks).detach().numpy()
    router, bank = prompts.router.detach().numpy()[[4, 1]], prompts.bank.detach().numpy()
    expected = np.einsum("glk,lkd->gld", CODE.weights(router), bank)
    np.testing.assert_allclose(points, expected, rtol=1e-4, atol=1e-6)
    noisy = [prompts.points(Phase(noise=True), torch.Generator().manual_seed(s), tasks) for s in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    mean = prompts.points(Phase(noise=False, normalized=False), generator, tasks).detach().numpy()
    np.testing.assert_allclose(
        mean, np.einsum("glk,lkd->gld", 1 / (1 + np.exp(-router)) / 4, bank), rtol=1e-4, atol=1e-6
    )


# ------------------------------------------------------------------------------------------ compiled layers


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at what it is given
def test_compiled_layers_are_the_same_and_compiled_once_for_all_lengths(
    tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced and differentiated as ever; the code generator alone, which takes a minute, is left out.
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    backbone = load_backbone(str(tiny_bert_dir))
    frame = frame_for(backbone.tokenizer, (300, 301), 64)
    layers = backbone.layers
    prompts = ModularPrompts(2, layers, 4, 6, frame, backbone.hidden, 0.05, torch.Generator().manual_seed(0))
    made = {way: Encoder(backbone.model, linear=DifferentiableLinear, compiled=way) for way in (False, True)}

    def gradients(encoder: Encoder, lengths: tuple[int, ...]) -> list[Tensor]:
        items = [Encoded((2, 300, 301, *range(5, 2 + n), 3), ((4, 5), (6, 6)), (0, 0), (), 0) for n in lengths]
        batch = collate(items, [0, 1, 1], [0, 1, 1])
        prompts.zero_grad()
        each, _ = span_loss(prompts(encoder, batch, Phase(noise=False), torch.Generator()), batch)
        torch.autograd.backward(each.mean())
        return [each.detach(), *(p.grad.clone() for p in prompts.parameters() if p.grad is not None)]

    for lengths in ((10, 12, 19), (9, 9, 14), (30, 31, 11)):
        for plain, compiled in zip(gradients(made[False], lengths), gradients(made[True], lengths), strict=True):
            torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
        assert plain.abs().max() > 0
    # One for the layers of all rows, one for the last layer's few; each perhaps once more for sizes that vary.
    assert 2 <= graphs.frame_count <= 4


# --------------------------------------------------------------------------------------------- options


def example(options: tuple[str, ...], label: int) -> Example:
    return Example({"text": "文"}, options, label, (), "0123456789abcdef")


@given(
    st.lists(st.text("甲乙丙", min_size=1, max_size=12), min_size=2, max_size=12, unique=True),
    st.data(),
    st.integers(2, 6),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 1000),
)
def test_thinned_options(options: list[str], data: Any, limit: int, room: int, shuffle: bool, seed: int) -> None:
    label = data.draw(st.integers(0, len(options) - 1))
    thin = thin_options(example(tuple(options), label), limit, room, shuffle, np.random.default_rng(seed))
    assert thin.options[thin.label] == options[label]
    assert 2 <= len(thin.options) <= limit
    assert len(set(thin.options)) == len(thin.options)
    assert set(thin.options) <= set(options)
    assert len(thin.options) == 2 or sum(map(len, thin.options)) <= room
    if not shuffle:
        at = [options.index(option) for option in thin.options]
        assert at == sorted(at)


def test_shuffled_options_stand_anywhere() -> None:
    rng = np.random.default_rng(0)
    original = example(tuple("甲乙丙丁"), 2)
    places = Counter(thin_options(original, 4, 40, True, rng).label for _ in range(400))
    assert set(places) == {0, 1, 2, 3}
    assert min(places.values()) > 60
    assert {thin_options(original, 4, 40, False, rng).label for _ in range(20)} == {2}


def test_an_example_without_options_stays() -> None:
    bare = example((), -1)
    assert thin_options(bare, 2, 10, True, np.random.default_rng(0)) is bare


# ------------------------------------------------------------------------------------------------ loss


def encoded(spans: tuple[tuple[int, int], ...], context: tuple[int, int] = (0, 0)) -> Encoded:
    offsets = tuple((i, i + 1) for i in range(context[1] - context[0]))
    return Encoded(tuple(range(30)), spans, context, offsets, 0)


def test_collate() -> None:
    batch = collate([encoded(((4, 5), (7, 7), (9, 11))), encoded(((6, 8),), (5, 9))], [2, -1], [3, 0])
    assert batch.tasks.tolist() == [3, 0]
    assert batch.present.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.support[0].tolist() == [[4, 7, 9, 0], [5, 7, 11, 0]]
    assert batch.support[1].tolist() == [[5, 6, 7, 8], [5, 6, 7, 8]]
    assert batch.gold.tolist() == [[2, 2], [1, 3]]
    assert batch.extractive.tolist() == [False, True]


def test_span_loss_is_the_mean_of_two_cross_entropies() -> None:
    batch = collate([encoded(((4, 5), (7, 7), (9, 11))), encoded(((6, 8),), (5, 9))], [2, -1], [0, 1])
    logits = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    each, _ = span_loss(logits, batch)
    for n, size, gold in ((0, 3, (2, 2)), (1, 4, (1, 3))):
        expected = sum(F.cross_entropy(logits[n, i, :size], torch.tensor(gold[i])) for i in (0, 1)) / 2
        torch.testing.assert_close(each[n], expected)


def test_what_counts_as_right() -> None:
    batch = collate([encoded(((4, 5), (7, 7))), encoded(((6, 8),), (5, 9))], [1, -1], [0, 1])
    logits = torch.zeros(2, 2, 4)
    logits[0, 0, 0], logits[0, 1, 1] = 1.0, 3.0  # an option by the sum of its start and end
    logits[1, 0, 1], logits[1, 1, 2] = 1.0, 9.0  # an answer by its start
    assert span_loss(logits, batch)[1].tolist() == [1.0, 1.0]
    logits[0, 0, 0], logits[1, 0, 2] = 5.0, 2.0
    assert span_loss(logits, batch)[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("count", [1, 11, 12, 13, 35, 100])
def test_a_long_curve_is_thinned_and_keeps_its_end(count: int) -> None:
    lines = _curve([(i, 1.0, 0.5) for i in range(1, count + 1)])
    steps = [int(line.split()[1]) for line in lines if line.endswith("| 1.000 | 0.500 |")]
    assert steps[-1] == count
    assert len(steps) <= 12
    assert len({b - a for a, b in itertools.pairwise(steps)}) <= 1
