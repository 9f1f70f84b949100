"""How large a model's own states are, for random prompts that are to be of their size (BBTv2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import Layout, pack
from bbprompt.backends.memory import free_bytes
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.oracle import TextBatch
from bbprompt.random_projection import BackboneFacts, clipped_std, placeholders_for
from bbprompt.tasks.example import Form
from bbprompt.texts.mrc import encode
from bbprompt.units import best_batch_tokens

__all__ = ["facts_of", "measure"]

#: States of a stock model take at most one part in so many of the free memory, or those of one layer.
_PART = 4


def facts_of(backbone: Backbone) -> BackboneFacts:
    """What is known of a model without a forward."""
    rows = int(backbone.model.get_input_embeddings().weight.shape[0])
    return BackboneFacts(backbone.id, backbone.digest, backbone.hidden, rows, backbone.layers)


@torch.inference_mode()
def measure(
    backbone: Backbone,
    forms: Sequence[Form],
    prompt_length: int,
    max_tokens: int | None = None,
    *,
    deep: bool = True,
) -> BackboneFacts:
    """Standard deviations of the states that enter each layer, on texts with placeholders and no prompt.

    For the first layer it is that of the whole word-embedding matrix; without `deep` it is the only one. Later ones
    are clipped (see `bbprompt.random_projection.clipped_std`), for which all values of a layer have to be there: those
    of one layer are held in float32, or of a stock model those of as many as fit. The released code measures while a
    first random candidate is at the input layer and counts padding; here there is neither. The forward is that of the
    untuned prompt on the few-shot texts, which the run pays for as its first call.
    """
    words = backbone.model.get_input_embeddings().weight
    facts = facts_of(backbone)
    stds = [float(words.detach().float().std(correction=0))]
    if deep:
        limit = backbone.limit(max_tokens)
        ids = _written(backbone, forms, placeholders_for(facts.vocabulary, prompt_length), limit)
        stds += [clipped_std(states) for states in (_states if backbone.packed else _stock_states)(backbone, ids)]
    return replace(facts, stds=tuple(stds))


def _written(
    backbone: Backbone, forms: Sequence[Form], placeholders: Sequence[int], limit: int
) -> list[tuple[int, ...]]:
    """Token ids of each text as an oracle reads it; a text with a gap as a verbalizer does."""
    tokenize = tokenize_with(backbone.tokenizer)
    if backbone.head is None or any(form.gap < 0 for form in forms):
        frame = frame_for(backbone.tokenizer, placeholders, limit)
        return [encode(form, tokenize, frame).ids for form in forms]
    frame = frame_for(backbone.tokenizer, placeholders, limit, open_end=backbone.head.causal)
    unknown = backbone.tokenizer.unk_token_id
    head = VerbalizerHead(backbone.head, backbone.gap_token, tokenize, frame, torch.device("cpu"), unknown)
    return [item.ids for item in head.sequences(TextBatch(tuple(forms)))]


def _states(backbone: Backbone, ids: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
    """States that enter the second and each later layer of an encoder; each overwrites the one before."""
    encoder = Encoder(backbone.model, token_type=backbone.token_type, prepack=False)
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    pieces: list[tuple[slice, Layout]] = []
    states = torch.empty(1, sum(map(len, ids)), backbone.hidden)
    first = 0
    for some in _cut([ids[i] for i in order], best_batch_tokens("cpu")):
        layout, size = pack([len(each) for each in some]), sum(map(len, some))
        rows = slice(first, first + size)
        states[0, rows] = encoder.embed(some, layout)
        pieces.append((rows, layout))
        first += size
    for layer in range(len(encoder.layers) - 1):
        for rows, layout in pieces:
            states[:, rows] = encoder.layer(layer, states[:, rows], layout)
        yield states.numpy()


def _cut(texts: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Texts in order, in pieces of at most so many tokens or of one text."""
    piece: list[Sequence[int]] = []
    for text in texts:
        if piece and sum(map(len, piece)) + len(text) > most:
            yield piece
            piece = []
        piece.append(text)
    yield piece


def _stock_states(backbone: Backbone, ids: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
    """The same of a causal model or of T5's encoder, by its own forward, text by text.

    Where memory does not hold all layers' states, the texts run once more for every few layers.
    """
    causal = backbone.head is not None and backbone.head.causal
    model: Any = backbone.model if causal else backbone.model.get_encoder()
    size = sum(map(len, ids)) * backbone.hidden
    several = max(free_bytes("cpu") // _PART // (size * np.dtype(np.float32).itemsize), 1)
    for first in range(1, backbone.layers, several):
        layers = range(first, min(first + several, backbone.layers))
        found, done = np.empty((len(layers), size), dtype=np.float32), 0
        for each in ids:
            states = model(input_ids=torch.tensor([each]), output_hidden_states=True, use_cache=False).hidden_states
            end = done + states[first].numel()
            for row, layer in zip(found, layers, strict=True):
                row[done:end] = states[layer].float().numpy().ravel()
            done = end
        yield from found
