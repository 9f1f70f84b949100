"""What the published scripts do for one candidate, on a stock model: the rivals of the speed table.

Both score one candidate per forward, in float32, on a padded batch, through all layers, with the plain products of
attention that models had then.
BBTv2 (Sun et al. 2022, arXiv:2205.11200): prompts of d = 500 before every layer; the language model head gives the
logits of the whole vocabulary at every position. MP2 (Sun et al. 2023, arXiv:2210.07565): d = 300, K = 8 modules; the
prompts of all layers and modules are generated anew for each candidate; a head of two columns reads every position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForMaskedLM

from bbprompt.prompts import ModularPrompt
from bbprompt.texts.mrc import Encoded
from benchmarks.frozen import OPTIONS

__all__ = ["ATTENTION", "bbtv2", "forward_with_prompts", "mp2", "padded", "plain"]

#: Of the scripts' own model files.
ATTENTION = "eager"


def bbtv2(
    model: BertForMaskedLM, prompt: ModularPrompt, texts: Sequence[Encoded], point: NDArray[np.floating]
) -> Callable[[int], Tensor]:
    """One candidate `(L, d)` as BBTv2 scores it in a visit of a layer: logits `(N, O)` of the options' words."""
    kept, projection = _prompts(prompt, point), torch.from_numpy(prompt.projection)
    batch, masks = padded([text.ids for text in texts]), torch.as_tensor([text.spans[0][0] for text in texts])

    def run(layer: int) -> Tensor:
        prompts = list(kept)
        moved = torch.as_tensor(point[layer], dtype=torch.float32)
        prompts[layer] = (moved @ projection[layer]).view_as(kept[layer])
        logits: Tensor = model.cls(forward_with_prompts(model, batch, prompts))
        return logits[torch.arange(len(masks)), masks][:, list(OPTIONS)]

    return run


def mp2(
    model: BertForMaskedLM, prompt: ModularPrompt, texts: Sequence[Encoded], weights: NDArray[np.floating]
) -> Callable[[], Tensor]:
    """One candidate as MP2 scores it, its modules mixed by `weights` `(L, K)`: start and end `(N, O, 2)` of options."""
    projection, modules = torch.from_numpy(prompt.projection), torch.from_numpy(prompt.modules)
    head = torch.from_numpy(prompt.head_weight), torch.from_numpy(prompt.head_bias)
    batch, mixing = padded([text.ids for text in texts]), torch.as_tensor(weights, dtype=torch.float32)
    spans = torch.as_tensor([text.spans for text in texts])

    def run() -> Tensor:
        size = prompt.config.prompt_length
        prompts = [
            (mixing[layer] @ (modules[layer] @ projection[layer])).view(size, -1) for layer in range(len(mixing))
        ]
        logits = F.linear(forward_with_prompts(model, batch, prompts), *head)
        return logits.gather(1, spans)

    return run


def padded(ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Texts as a tokenizer gives them: padded ids and mask."""
    rows = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, text in enumerate(ids):
        rows[row, : len(text)] = torch.as_tensor(text)
        mask[row, : len(text)] = 1
    return {"input_ids": rows, "attention_mask": mask}


def forward_with_prompts(model: BertForMaskedLM, batch: dict[str, Tensor], prompts: Sequence[Tensor]) -> Tensor:
    """Last states of a stock model, prompts `(P, H)` added before each layer by hooks."""

    def adder(prompt: Tensor) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states = args[0].clone()
            states[:, 1 : 1 + len(prompt)] += prompt
            return (states, *args[1:])

        return hook

    layers = model.bert.encoder.layer
    handles = [layer.register_forward_pre_hook(adder(prompt)) for layer, prompt in zip(layers, prompts, strict=True)]
    try:
        states: Tensor = model.bert(**batch).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return states


def plain(
    model: BertForMaskedLM, prompt: ModularPrompt, texts: Sequence[Encoded], point: NDArray[np.floating]
) -> Callable[[], Tensor]:
    """One candidate `(L, d)` through a plain batched `model(**batch)`: last states."""
    prompts, batch = _prompts(prompt, point), padded([text.ids for text in texts])
    return lambda: forward_with_prompts(model, batch, prompts)


def _prompts(prompt: ModularPrompt, point: NDArray[np.floating]) -> list[Tensor]:
    """Prompts `(P, H)` of all layers."""
    return list(torch.from_numpy(prompt.prompts(point)))
