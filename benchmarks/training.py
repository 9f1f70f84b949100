"""What a step of pre-training costs: forward and backward through the frozen layers, against a stock model.

32 texts of four tasks with prompts before every layer or at the input alone, a span head, Adam: what
`bbprompt pretrain mp2` does once its batches are made. Beside it the same sum with hooks on the stock model, padded.
The floor is the arithmetic of both directions at the rate of the bare matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from bbprompt.backends.encoder import Encoder
from bbprompt.pretrain.linear import DifferentiableLinear
from bbprompt.pretrain.model import ModularPrompts, Phase, SpanBatch, span_loss
from bbprompt.pretrain.speed import step_flops
from bbprompt.texts.mrc import Frame
from benchmarks.released import forward_with_prompts, padded
from benchmarks.setting import Setting
from benchmarks.timing import gemm_rate, interleaved

__all__ = ["training"]

_TASKS, _MODULES, _OPTIONS = 4, 8, 2


def training(rounds: int, threads: int, small: bool) -> list[str]:
    """Seconds a step, examples a second and the share of the floor."""
    setting = Setting().shrunk(small)
    model = setting.model().requires_grad_(False)
    ways: dict[str, Callable[[], Any]] = {"stock model with hooks, float32": _stock(setting, model)}
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, kind in kinds.items():
        encoder = Encoder(model.bert, kind, linear=DifferentiableLinear)
        ways |= {
            f"ours, {where}, {name}": _ours(setting, encoder, layers)
            for where, layers in (("every layer", setting.layers), ("the input", 1))
        }
    taken = interleaved(ways, rounds, threads)
    needed = step_flops(setting.lengths, setting.layers, setting.hidden, setting.inner, setting.texts * 2 * _OPTIONS)
    rates = {name: gemm_rate(setting, kind, threads) for name, kind in kinds.items()}
    first = next(iter(taken.values()))
    return [
        f"{setting.texts} texts of {setting.shortest} to {setting.longest} tokens a step; products run at "
        + " and ".join(f"{rate / 1e12:.3f} TFLOP/s in {name}" for name, rate in rates.items())
        + ".",
        "",
        "| a step | seconds | examples/s | times as fast | share of the floor |",
        "|---|---|---|---|---|",
        *(
            f"| {way} | {seconds:.3f} | {setting.texts / seconds:.0f} | {first / seconds:.2f} "
            f"| {needed / rates[way.rpartition(', ')[2]] / seconds:.0%} |"
            for way, seconds in taken.items()
        ),
    ]


def _ours(setting: Setting, encoder: Encoder, layers: int) -> Callable[[], Any]:
    """A step as `bbprompt.pretrain.mp2.Trainer` makes it."""
    generator = torch.Generator().manual_seed(0)
    frame = Frame((101,), tuple(range(5, 5 + setting.prompt)), (102,), 128)
    sizes = (_TASKS, layers, _MODULES, setting.dim)
    prompts = ModularPrompts(*sizes, frame, setting.hidden, 0.05, generator)
    optimizer = torch.optim.Adam([p for p in prompts.parameters() if p.requires_grad], lr=1e-3)
    count = setting.texts
    options = torch.arange(_OPTIONS) + setting.prompt + 1
    batch = SpanBatch(
        [tuple(row) for row in setting.ids],
        torch.arange(count) % _TASKS,
        options.expand(count, 2, -1).contiguous(),
        torch.ones(count, _OPTIONS, dtype=torch.bool),
        torch.zeros(count, 2, dtype=torch.long),
        torch.zeros(count, dtype=torch.bool),
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        each, _ = span_loss(prompts(encoder, batch, Phase(noise=True), generator), batch)
        torch.autograd.backward(each.mean())
        optimizer.step()

    return step


def _stock(setting: Setting, model: Any) -> Callable[[], Any]:
    """The same with a prompt of each layer on the stock model."""
    shape = (setting.prompt, setting.hidden)
    prompts = [torch.nn.Parameter(torch.randn(shape) * 0.05) for _ in range(setting.layers)]
    head = torch.nn.Parameter(torch.randn(2, setting.hidden) * 0.02)
    optimizer = torch.optim.Adam([*prompts, head], lr=1e-3)
    batch, gold = padded(setting.ids), torch.zeros(setting.texts, 2, dtype=torch.long)
    first = setting.prompt + 1

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        states = forward_with_prompts(model, batch, list(prompts))[:, first : first + _OPTIONS]
        torch.autograd.backward(F.cross_entropy(F.linear(states, head), gold))
        optimizer.step()

    return step
