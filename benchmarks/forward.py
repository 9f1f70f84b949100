"""Cost of a call against the published protocols, a plain loop and the arithmetic floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import BertForMaskedLM

from bbprompt.backends import local
from bbprompt.backends.local import LocalOracle
from bbprompt.oracle import Scores
from benchmarks.frozen import Sweep, open_frozen, prompt_of, sequences, texts_of
from benchmarks.released import ATTENTION, bbtv2, mp2, plain
from benchmarks.setting import Setting
from benchmarks.timing import gemm_rate, swept

__all__ = ["BASE", "PAPER", "against_published"]

#: The papers' sizes of prompts and texts on the shape of the bundled prompts' model, and on that of BERT-base.
PAPER = Setting(prompt=50, shortest=114, longest=114, vocabulary=50265, dim=500)
BASE = PAPER.but(hidden=768, inner=3072)
_MP2_DIM = 300


def against_published(paper: Setting, rounds: int, threads: int, small: bool) -> list[str]:
    """A full sweep over the layers, states kept for it and checks included: ms a candidate, and what of the floor."""
    paper = paper.shrunk(small)
    model = paper.model()
    rivals, (ours, mixed) = _rivals(paper, model), _ours(paper, model)
    rates = dict.fromkeys((torch.float32, torch.bfloat16), 0.0)

    def products(_: int) -> None:
        """At every step anew, for the speed of a machine changes within a run."""
        for kind in rates:
            rates[kind] = max(rates[kind], gemm_rate(paper, kind, threads))

    taken = swept({**rivals, **ours, "products": products}, range(paper.layers), rounds, threads)
    counts = dict.fromkeys(rivals, paper.layers) | dict.fromkeys(ours, paper.layers * paper.population)
    each = {name: seconds / counts[name] for name, seconds in taken.items() if name in counts}
    lines = [
        f"{paper.layers} layers of {paper.hidden}, {paper.texts} texts of {paper.longest} tokens, {paper.prompt} of "
        f"them prompt; ours visits all layers in turn with populations of {paper.population}. Products run at "
        f"{rates[torch.float32] / 1e12:.3f} TFLOP/s in float32 and {rates[torch.bfloat16] / 1e12:.3f} in bfloat16 at "
        "these shapes, the best of all steps.",
        "",
        "| what | calls/s | ms a candidate | BBTv2 / this | MP2 / this | plain / this | of float32 floor "
        "| of bfloat16 floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seconds in each.items():
        ratios = " | ".join(f"{each[rival] / seconds:.1f}" for rival in rivals)
        floors = " | ".join(f"{paper.mean_flops / rate / seconds:.0%}" for rate in rates.values())
        lines.append(f"| {name} | {1 / seconds:.2f} | {1e3 * seconds:.1f} | {ratios} | {floors} |")
    used = ", ".join(f"{count} in {kind}" for kind, count in mixed.precisions.items())
    return [*lines, "", f"Mixed, of itself, scored {used} (populations, those before the first round included)."]


def _rivals(paper: Setting, model: BertForMaskedLM) -> dict[str, Callable[[int], Any]]:
    """BBTv2, MP2 and a plain loop, in this order, a candidate at each step."""
    old, first = paper.model(ATTENTION), prompt_of(paper, "verbalizer")
    second = prompt_of(paper.but(dim=_MP2_DIM), "span")
    cloze, even = sequences(paper, "verbalizer"), np.full(second.modules.shape[:2], 1 / second.config.modules)
    released = mp2(old, second, sequences(paper, "span"), even)
    loop = plain(model, first, cloze, first.space.even())
    return {
        f"BBTv2 as released ({ATTENTION} attention)": bbtv2(old, first, cloze, first.space.even()),
        f"MP2 as released ({ATTENTION} attention)": lambda _: released(),
        "plain `model(**batch)` (sdpa attention)": lambda _: loop(),
    }


def _ours(paper: Setting, model: BertForMaskedLM) -> tuple[dict[str, Callable[[int], Any]], LocalOracle]:
    """Ours, a population at each step, in each precision; and the one whose precision is its own choice."""
    data = texts_of(paper, "verbalizer")

    def visits(dtype: str) -> Sweep:
        oracle, _ = open_frozen(paper, model, "verbalizer", dtype)
        return Sweep(oracle, data, paper.population)

    chooses, _ = open_frozen(paper, model, "verbalizer", "mixed")
    trusting = visits("mixed")
    theirs = paper.but(dim=_MP2_DIM)
    spans = Sweep(open_frozen(theirs, model, "span", "bfloat16")[0], texts_of(theirs, "span"), paper.population)

    def trusted(layer: int) -> Scores:
        with patch.object(local, "ENOUGH_THROUGHOUT", 0.0):
            return trusting(layer)

    ways: dict[str, Callable[[int], Any]] = {
        "ours, float32": visits("float32"),
        "ours, mixed": Sweep(chooses, data, paper.population),
        "ours, mixed, where bfloat16 passes its check": trusted,
        "ours, bfloat16": visits("bfloat16"),
        f"ours, bfloat16, of MP2's sizes (d = {_MP2_DIM}, a span head)": spans,
    }
    return ways, chooses
