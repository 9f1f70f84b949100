"""Cost of a call: against the published protocols, a plain loop and the arithmetic floor; each saving switched off."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bbprompt.backends.population import Runner
from benchmarks.released import bbtv2, forward_with_prompts, mp2, padded
from benchmarks.setting import Setting, interleaved

__all__ = ["ablation", "against_published", "scaling"]

#: Changed layers that stand for a sweep over all: the cost is linear in the layer, and these have its mean.
SWEEP = (2, 9)


def runners(setting: Setting, model: Any) -> tuple[Runner, Runner]:
    """Ours in float32 (and mixed), and in bfloat16 throughout."""
    exact, low = setting.encoder(model), setting.encoder(model, torch.bfloat16)
    projection = setting.projection()
    return Runner(exact, projection, low), Runner(low, projection)


def sweep(setting: Setting, runner: Runner, **how: Any) -> Callable[[], Any]:
    """Populations in the layers that stand for a sweep."""
    visits = [setting.scorer(runner, layer, **how) for layer in SWEEP]
    return lambda: [visit() for visit in visits]


def against_published(rounds: int, threads: int, small: bool) -> list[str]:
    """Seconds a candidate at the papers' sizes, and what of the floor is reached."""
    paper = Setting(prompt=50, shortest=114, longest=114, population=8, read=1, vocabulary=50265, dim=500)
    if small:
        paper = paper.but(texts=8)
    model = paper.model()
    exact, low = runners(paper, model)
    prompts = [torch.zeros(paper.prompt, paper.hidden)] * paper.layers
    batch = padded(paper)
    calls = len(SWEEP) * paper.population
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "BBTv2 as released": (bbtv2(paper, model), 1),
        "MP2 as released": (mp2(paper.but(dim=300), model), 1),
        "plain `model(**batch)`": (lambda: forward_with_prompts(model, batch, prompts), 1),
        "ours, float32": (sweep(paper, exact), calls),
        "ours, mixed": (sweep(paper, exact, deviations=True), calls),
        "ours, bfloat16": (sweep(paper, low), calls),
    }
    taken = interleaved({name: work for name, (work, _) in ways.items()}, rounds, threads)
    each = {name: taken[name] / count for name, (_, count) in ways.items()}
    needed = sum(paper.flops(layer) for layer in SWEEP) / len(SWEEP)
    rates = {kind: gemm_rate(paper, kind, threads) for kind in (torch.float32, torch.bfloat16)}
    lines = [
        f"{paper.texts} texts of {paper.longest} tokens, {paper.prompt} of them prompt; populations of "
        f"{paper.population}. Products run at {rates[torch.float32] / 1e12:.3f} TFLOP/s in float32 and "
        f"{rates[torch.bfloat16] / 1e12:.3f} in bfloat16 at these shapes.",
        "",
        "| what | ms a candidate | BBTv2 / this | MP2 / this | plain / this | of float32 floor | of bfloat16 floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seconds in each.items():
        ratios = [each[other] / seconds for other in list(each)[:3]]
        floors = [needed / rate / seconds for rate in rates.values()]
        lines.append(
            f"| {name} | {1e3 * seconds:.0f} | "
            + " | ".join(f"{ratio:.1f}" for ratio in ratios)
            + " | "
            + " | ".join(f"{floor:.0%}" for floor in floors)
            + " |"
        )
    return lines


def ablation(rounds: int, threads: int, small: bool) -> list[str]:
    """Each saving switched off, at the shape of the bundled model and LCQMC."""
    setting = Setting(population=6, texts=8 if small else 32)
    model = setting.model()
    exact, low = runners(setting, model)
    alone = Runner(exact.encoder, setting.projection())
    alone._shared = lambda *_: None  # type: ignore[assignment, method-assign, misc, return-value]
    unpacked = Runner(setting.encoder(model, prepack=False), setting.projection())
    calls = len(SWEEP) * setting.population
    ways = {
        "all savings, float32": sweep(setting, exact),
        "lower layers not shared": lambda: [visit() for visit in [setting.scorer(exact, None)] * len(SWEEP)],
        "changed layer's projections not shared": sweep(setting, alone),
        "last layer at all rows": sweep(setting, exact, read=False),
        "padded texts": sweep(setting, exact, padded=True),
        "attention padded to one length": sweep(setting, exact, slack=1000),
        "weights not pre-packed": sweep(setting, unpacked),
        "mixed": sweep(setting, exact, deviations=True),
        "bfloat16": sweep(setting, low),
    }
    taken = interleaved(ways, rounds, threads)
    full = taken["all savings, float32"]
    lines = ["| what | ms a candidate | cost against all savings |", "|---|---|---|"]
    return lines + [f"| {name} | {1e3 * t / calls:.1f} | {t / full:.2f} |" for name, t in taken.items()]


def scaling(rounds: int, threads: int, small: bool) -> list[str]:
    """Cost of a candidate as one size changes."""
    base = Setting(population=4, texts=8, layers=6)
    ways, calls = {}, {}
    cases = [base, base.but(population=2), base.but(population=16), base.but(texts=32), base.but(layers=12)]
    cases.append(base.but(shortest=82, longest=110))
    names = ["8 texts of 41 to 55 tokens, 6 layers, population 4", "population 2", "population 16", "32 texts"]
    names += ["12 layers", "texts twice as long"]
    for name, case in zip(names, cases, strict=True):
        ways[name] = case.scorer(runners(case, case.model())[0], 0)
        calls[name] = case.population
    taken = interleaved(ways, rounds, threads)
    first = taken[names[0]] / calls[names[0]]
    lines = ["| what | ms a candidate | ratio |", "|---|---|---|"]
    for name, seconds in taken.items():
        each = seconds / calls[name]
        lines.append(f"| {name} | {1e3 * each:.1f} | {each / first:.2f} |")
    return lines


def gemm_rate(setting: Setting, dtype: torch.dtype, threads: int) -> float:
    """Operations a second of the feed-forward pair at these shapes, weights pre-packed; the best of some."""
    clock = time.process_time if threads == 1 else time.perf_counter
    rows = sum(setting.lengths)
    up, down = torch.randn(setting.inner, setting.hidden), torch.randn(setting.hidden, setting.inner)
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype)) for weight in (up, down)]
    states, best = torch.randn(rows, setting.hidden).to(dtype), float("inf")
    for _ in range(6):
        began = clock()
        inner = torch.ops.mkldnn._linear_pointwise(states, packed[0], None, "none", [], "")
        torch.ops.mkldnn._linear_pointwise(inner, packed[1], None, "none", [], "")
        best = min(best, clock() - began)
    return 4 * rows * setting.hidden * setting.inner / best
