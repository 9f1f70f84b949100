"""What a candidate costs as one size changes and all others stay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.frozen import Sweep, open_frozen, texts_of
from benchmarks.setting import Setting
from benchmarks.timing import interleaved

__all__ = ["scaling"]

_SIZES = {
    "population": (1, 2, 4, 8, 16),
    "texts": (4, 8, 16, 32),
    "tokens a text": (24, 48, 96, 192),
    "layers": (3, 6, 12, 24),
}
_DTYPES = ("float32", "bfloat16")


def scaling(rounds: int, threads: int, small: bool) -> list[str]:
    """Cost of a candidate that differs from the first layer on."""
    base = _sized(Setting(population=4, texts=8, layers=6).shrunk(small), "tokens a text", 48)
    cases = {f"{name} {value}": _sized(base, name, value) for name, values in _SIZES.items() for value in values}
    models = {layers: base.but(layers=layers).model() for layers in {case.layers for case in (base, *cases.values())}}
    ways: dict[tuple[Setting, str], Callable[[], Any]] = {}
    for case in (base, *cases.values()):
        for dtype in _DTYPES:
            oracle, _ = open_frozen(case, models[case.layers], "span", dtype)
            ways[case, dtype] = functools.partial(Sweep(oracle, texts_of(case, "span"), case.population), 0)
    taken = interleaved(ways, rounds, threads)
    each = {(case, dtype): 1e3 * seconds / case.population for (case, dtype), seconds in taken.items()}
    lines = [
        f"{base.texts} texts of {base.shortest} to {base.longest} tokens, {base.layers} layers of {base.hidden}, a "
        f"population of {base.population}, but for the size that is named; ratios to this.",
        "",
        "| what | " + " | ".join(f"{dtype}, ms a candidate | ratio" for dtype in _DTYPES) + " |",
        "|---" * (1 + 2 * len(_DTYPES)) + "|",
    ]
    for name, case in {"as said": base, **cases}.items():
        cells = (f"{each[case, dtype]:.2f} | {each[case, dtype] / each[base, dtype]:.2f}" for dtype in _DTYPES)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _sized(base: Setting, name: str, value: int) -> Setting:
    if name == "tokens a text":
        return base.but(shortest=value - value // 8, longest=value + value // 8)
    return base.but(**{name: value})
