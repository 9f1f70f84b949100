"""What could make products faster and is not used: 8-bit integers and a compiler, beside our own layers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.setting import Setting
from benchmarks.timing import interleaved

__all__ = ["alternatives"]


def alternatives(rounds: int, threads: int, small: bool) -> list[str]:
    """Seconds of some layers at the shape of the bundled model, one candidate, and their error against float32."""
    setting = Setting(layers=4).shrunk(small).but(shortest=48, longest=48)
    model = setting.model()
    stock = model.bert.encoder.layer
    states = torch.randn(setting.texts, setting.longest, setting.hidden)
    low = states.bfloat16()

    def through(layers: Any) -> Callable[[Tensor], Tensor]:
        def run(entering: Tensor) -> Tensor:
            for layer in layers:
                entering = layer(entering)
            return entering

        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch
        eight = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            nn.ModuleList(stock), {nn.Linear}, dtype=torch.qint8
        )
        half = setting.model().bert.encoder.layer.bfloat16()
        compiled = torch.compile(through(half))
        began = time.monotonic()
        compiled(low)
        compiling = time.monotonic() - began
    ours, rough = setting.encoder(model), setting.encoder(model, torch.bfloat16)
    place, flat = setting.layout(), states.flatten(0, 1)[None]

    def own(encoder: Any, entering: Tensor) -> Tensor:
        for layer in range(setting.layers):
            entering = encoder.layer(layer, entering, place)
        return entering

    ways: dict[str, Callable[[], Tensor]] = {
        "ours, float32": lambda: own(ours, flat),
        "ours, bfloat16": lambda: own(rough, flat.bfloat16()),
        "stock layers, float32": lambda: through(stock)(states),
        "stock layers, bfloat16": lambda: through(half)(low),
        "stock layers, bfloat16, compiled": lambda: compiled(low),
        "stock layers, int8 products (dynamic)": lambda: through(eight)(states),
    }
    exact = ways["stock layers, float32"]().flatten()
    taken = interleaved(ways, rounds, threads)
    first = taken["ours, float32"]
    lines = [
        f"{setting.layers} layers, {setting.texts} texts of {setting.longest} tokens; compiled in {compiling:.0f} s.",
        "",
        "| what | ms | ours, float32 / this | relative error |",
        "|---|---|---|---|",
    ]
    for name, work in ways.items():
        error = float((work().float().flatten() - exact).norm() / exact.norm())
        lines.append(f"| {name} | {1e3 * taken[name]:.1f} | {first / taken[name]:.2f} | {error:.1e} |")
    return lines
