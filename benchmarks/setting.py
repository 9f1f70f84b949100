"""A frozen model with random weights, texts and prompts, ready to be timed in several ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import Layout, pack
from bbprompt.backends.population import Place, Runner, Trunk
from bbprompt.units import plan_units

__all__ = ["Setting", "interleaved"]


@dataclass(frozen=True)
class Setting:
    """Shape of a model, its prompts and its texts; the defaults are the bundled ones' and LCQMC's."""

    layers: int = 12
    hidden: int = 384
    inner: int = 1536
    heads: int = 12
    vocabulary: int = 1000
    prompt: int = 8
    dim: int = 64
    texts: int = 32
    shortest: int = 41
    longest: int = 55
    population: int = 20
    read: int = 2

    def but(self, **changes: Any) -> Setting:
        """The same but for some fields."""
        return replace(self, **changes)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        rng = np.random.default_rng(0)
        return rng.integers(self.shortest, self.longest + 1, self.texts).tolist()

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of each text."""
        rng = np.random.default_rng(1)
        return [rng.integers(5, self.vocabulary, size).tolist() for size in self.lengths]

    def model(self) -> BertForMaskedLM:
        """A stock model with random weights."""
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.inner,
        )
        return BertForMaskedLM(config).eval()

    def projection(self) -> Tensor:
        """One random projection `(d, P H)`, seen as one for each layer to save memory."""
        torch.manual_seed(1)
        one = torch.randn(self.dim, self.prompt * self.hidden) * 0.05 / self.dim**0.5
        return one.expand(self.layers, -1, -1)

    def points(self, layer: int | None) -> np.ndarray:
        """Candidates that differ in one layer, or in all with None."""
        rng = np.random.default_rng(2)
        points = rng.normal(size=(self.population, self.layers, self.dim)).astype(np.float32)
        if layer is None:
            return points
        same = np.repeat(points[:1], self.population, axis=0)
        same[:, layer] = points[:, layer]
        return same

    def encoder(self, model: BertForMaskedLM, dtype: torch.dtype = torch.float32, prepack: bool = True) -> Encoder:
        """Our forward of the stock model."""
        return Encoder(model.bert, dtype, prepack=prepack)

    def layout(self) -> Layout:
        """How the texts lie packed."""
        return pack(self.lengths)

    def scorer(
        self,
        runner: Runner,
        layer: int | None,
        *,
        padded: bool = False,
        read: bool = True,
        slack: int = 4,
        deviations: bool = False,
    ) -> Callable[[], Any]:
        """Score the population once with our forward; the states below the changed layer are kept."""
        lengths = [max(self.lengths)] * self.texts if padded else self.lengths
        ids = [(row * 2)[:size] for row, size in zip(self.ids, lengths, strict=True)]
        layout = pack(lengths, slack=slack, fast=runner.encoder.dtype)
        slots = layout.rows(torch.arange(self.prompt) + 1).flatten()
        rows = layout.rows(torch.arange(self.read) + self.prompt + 1)
        place, points = Place(layout, slots, rows if read else None), self.points(layer)
        trunk = Trunk([runner.encoder.embed(ids, layout)[None]])

        units = plan_units(len(points), max(4096 // sum(lengths), 1))

        def run() -> Any:
            if deviations:
                return runner.run_deviations(place, trunk, points, torch.clone)
            return [runner.run(place, trunk, points, unit, torch.clone) for unit in units]

        return run

    def flops(self, layer: int) -> float:
        """Operations of the linear maps of a call whose candidates differ from `layer` on, at their least.

        The changed layer's projections are needed at the prompt's rows only; of the last layer next to nothing.
        """
        tokens, h = sum(self.lengths), self.hidden
        whole = 2 * (4 * h**2 + 2 * h * self.inner)
        full = max(self.layers - 1 - layer, 0)
        return float(tokens * (whole * full - (2 * 3 * h**2 if full else 0)))


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int, threads: int) -> dict[str, float]:
    """Least seconds of each way over some rounds, the ways in turn.

    With one thread the clock is the process's own CPU time, which other programs on the machine hardly touch.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    best = dict.fromkeys(ways, float("inf"))
    for number in range(rounds + 1):
        for name, work in ways.items():
            began = clock()
            work()
            if number:
                best[name] = min(best[name], clock() - began)
    return best
