"""A frozen model with random weights, texts and prompts, ready to be timed in several ways."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import Layout, pack

__all__ = ["Setting"]

_TINY = {
    "layers": 3,
    "hidden": 32,
    "inner": 64,
    "heads": 4,
    "vocabulary": 100,
    "prompt": 4,
    "dim": 8,
    "texts": 4,
    "shortest": 14,
    "longest": 18,
    "population": 8,
    "spread": 0.3,
}


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
    spread: float = 0.02  # standard deviation of the weights

    def but(self, **changes: Any) -> Setting:
        """The same but for some fields."""
        return replace(self, **changes)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        rng = np.random.default_rng(0)
        lengths: list[int] = rng.integers(self.shortest, self.longest + 1, self.texts).tolist()
        return lengths

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of each text."""
        rng = np.random.default_rng(1)
        return [rng.integers(5, self.vocabulary, size).tolist() for size in self.lengths]

    def shrunk(self, small: bool) -> Setting:
        """The same, or what runs in no time where that is asked for."""
        return self.but(**_TINY) if small else self

    def model(self, attention: str = "sdpa") -> BertForMaskedLM:
        """A stock model with random weights, the same whichever of its `attention` implementations it has."""
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.inner,
            initializer_range=self.spread,
        )
        model: BertForMaskedLM = AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
        return model.eval()

    def encoder(self, model: BertForMaskedLM, dtype: torch.dtype = torch.float32) -> Encoder:
        """Our forward of the stock model."""
        return Encoder(model.bert, dtype)

    def layout(self) -> Layout:
        """How the texts lie packed."""
        return pack(self.lengths)

    def flops(self, layer: int) -> float:
        """Operations of the linear maps of a call whose candidates differ from `layer` on, at their least.

        The changed layer's projections are needed at the prompt's rows only; of the last layer next to nothing.
        """
        tokens, h = sum(self.lengths), self.hidden
        whole = 2 * (4 * h**2 + 2 * h * self.inner)
        full = max(self.layers - 1 - layer, 0)
        return float(tokens * (whole * full - (2 * 3 * h**2 if full else 0)))

    @property
    def mean_flops(self) -> float:
        """The mean of `flops` in a sweep over the layers."""
        return sum(self.flops(layer) for layer in range(self.layers)) / self.layers
