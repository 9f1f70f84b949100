"""What the published scripts do for one candidate, on a stock model: the rivals of the speed table.

Both score one candidate per forward, in float32, on a padded batch, through all layers.
BBTv2 (Sun et al. 2022, arXiv:2205.11200): prompts of d = 500 before every layer; the language model head gives the
logits of the whole vocabulary at every position. MP2 (Sun et al. 2023, arXiv:2210.07565): d = 300, K = 8 modules; the
prompts of all layers and modules are generated anew for each candidate; a head of two columns reads every position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from benchmarks.setting import Setting

__all__ = ["bbtv2", "forward_with_prompts", "mp2"]


def bbtv2(setting: Setting, model: BertForMaskedLM) -> Callable[[], Any]:
    """One candidate as BBTv2 scores it."""
    projection, batch = setting.projection(), padded(setting)
    kept = [torch.zeros(setting.prompt, setting.hidden) for _ in range(setting.layers)]

    def run() -> Tensor:
        prompts = list(kept)
        prompts[0] = (torch.ones(setting.dim) @ projection[0]).view(setting.prompt, -1)
        return model.cls(forward_with_prompts(model, batch, prompts))

    return run


def mp2(setting: Setting, model: BertForMaskedLM, modules: int = 8) -> Callable[[], Any]:
    """One candidate as MP2 scores it."""
    projection, batch = setting.projection(), padded(setting)
    head = nn.Linear(setting.hidden, 2)
    intrinsic = torch.randn(setting.layers, modules, setting.dim)

    def run() -> Tensor:
        router = torch.ones(modules) / modules
        prompts = [
            (router @ (intrinsic[layer] @ projection[layer])).view(setting.prompt, -1)
            for layer in range(setting.layers)
        ]
        return head(forward_with_prompts(model, batch, prompts))

    return run


def padded(setting: Setting) -> dict[str, Tensor]:
    """The texts as a tokenizer gives them: padded ids and mask."""
    width = max(setting.lengths)
    ids = torch.zeros(setting.texts, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(setting.ids):
        ids[row, : len(text)] = torch.as_tensor(text)
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def forward_with_prompts(model: BertForMaskedLM, batch: dict[str, Tensor], prompts: list[Tensor]) -> Tensor:
    """Last states of a stock model, prompts `(P, H)` added before each layer by hooks."""

    def adder(prompt: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
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
