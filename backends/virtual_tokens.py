"""Prompts of causal models in the forms of other tools: rows before the text, or keys and values before the text.

A causal oracle adds the prompt of a layer to the states of placeholder tokens, which stand before the text with
nothing but special tokens before them. Two things follow.

* A shallow prompt is a row of embeddings: that of the placeholder plus the prompt, where the first block reads
  embeddings as they are (Llama), or with a position added (GPT-2).
* Any prompt is a set of keys and values. A causal model never looks ahead, so the states of the placeholders, prompts
  included, are the same for every text; all that a text sees of them is their keys and values in each layer
  (Li and Liang 2021, arXiv:2101.00190, train such a prefix directly).

Neither is looked up by the name of the model: both ways are computed and must agree. The special tokens before the
placeholders become part of either, for other tools put their rows before everything else. A prepended prompt has its
rows there anyhow, and the special tokens follow them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.body import blocks_of, embedded, inputs_of, prompted
from bbprompt.backends.fit import check_fit
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.errors import UsageError
from bbprompt.prompts import ModularPrompt, no_rows
from bbprompt.texts.cloze import word_tokens
from bbprompt.texts.mrc import Frame

__all__ = ["Front", "front_of", "key_value_prefix", "option_tokens", "virtual_tokens"]

#: Largest difference of two states, relative to the largest entry: what the order of float32 sums may change.
_SAME = 1e-4


@dataclass(frozen=True, slots=True)
class Front:
    """What stands before every text.

    Attributes:
        model: The stock causal model without its head.
        frame: Special tokens and placeholders.
        prompts: `(L, P, H)`, added before the first L blocks.
    """

    model: Any
    frame: Frame
    prompts: Tensor

    @property
    def ids(self) -> Tensor:
        """`(1, F + P)` token ids; `NO_TOKEN` at the rows of a prepended prompt."""
        return torch.tensor([self.frame.front])


def front_of(backbone: Backbone, prompt: ModularPrompt, point: NDArray[np.floating]) -> Front:
    """What stands before a text under the intrinsic point `(L, d)`.

    Raises:
        ArtifactError: The prompts are for another backbone.
        UsageError: It is no causal model.
    """
    check_fit(prompt, backbone)
    if backbone.head is None or not backbone.head.causal:
        own = "is its encoder's, and these forms are of models that have none"
        reason = no_rows(prompt.config.injection) if backbone.packed else own
        raise UsageError(f"backbone {backbone.id} is no causal model: its prompt {reason}")
    frame = frame_for(backbone.tokenizer, prompt.config.placeholders, backbone.max_positions)
    return Front(backbone.model, frame, torch.from_numpy(prompt.prompts(point)))


@torch.inference_mode()
def virtual_tokens(front: Front) -> NDArray[np.float32]:
    """The embeddings `(F + P, H)` that stand before a text.

    Raises:
        UsageError: The prompt cannot be written in this form exactly; the message says why.
    """
    if len(front.prompts) > 1:
        raise UsageError(
            f"the prompt is added before {len(front.prompts)} layers, and rows before the text reach the first alone"
        )
    rows = embedded(front.model, front.ids)
    if rows.shape[-1] != front.prompts.shape[-1]:
        raise UsageError(
            f"this backbone's embeddings have {rows.shape[-1]} units and its layers {front.prompts.shape[-1]}: the "
            "prompt is added behind what leads from one to the other"
        )
    rows[0, front.frame.prompt_start : front.frame.prompt_end] += front.prompts[0]
    with _prompted(front):
        expected = _entering(front, **inputs_of(front.model, front.ids))
    _check(_entering(front, inputs_embeds=rows), expected, "embeddings before its first block")
    found: NDArray[np.float32] = rows[0].numpy().astype(np.float32)
    return found


@torch.inference_mode()
def key_value_prefix(front: Front) -> NDArray[np.float32]:
    """The keys and values that a text sees of what stands before it: `(F + P, L, 2, heads, H / heads)`.

    Raises:
        UsageError: The model cannot be given keys and values so that it computes the same.
    """
    model, ids = front.model, front.ids
    text = ids.flip(1)  # any tokens will do
    with _prompted(front):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        expected = model(input_ids=torch.cat([ids, text], dim=1), use_cache=False).last_hidden_state
    pairs = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    rows = torch.stack([torch.stack(pair) for pair in pairs])[:, :, 0].permute(3, 0, 1, 2, 4)
    seen = model(input_ids=text, past_key_values=cache, use_cache=True).last_hidden_state
    _check(seen, expected[:, ids.shape[1] :], "keys and values that it is given")
    return rows.numpy().astype(np.float32)


def option_tokens(backbone: Backbone, before: str, words: Sequence[str]) -> tuple[int, ...]:
    """Id of the token that each option word begins with, behind the text `before`."""
    tokenize = tokenize_with(backbone.tokenizer)
    return tuple(word_tokens(before, word, tokenize)[0] for word in words)


def _check(found: Tensor, expected: Tensor, what: str) -> None:
    difference = float((found - expected).abs().max())
    if not difference <= _SAME * float(expected.abs().max()):
        raise UsageError(
            f"this backbone changes {what} (states differ by {difference:.2g}), so that they would not be what the "
            "prompt was tuned as"
        )


def _prompted(front: Front) -> AbstractContextManager[None]:
    """Add the prompts before the blocks, as the oracle does, while the context is open."""
    return prompted(blocks_of(front.model), front.frame.prompt_start, front.frame.prompt_end, front.prompts[None])


def _entering(front: Front, **inputs: Tensor) -> Tensor:
    """The states that enter the first block, behind other hooks."""
    seen: list[Tensor] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = blocks_of(front.model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        front.model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return seen[0]
