"""How large a model's own states are, for random prompts that are to be of their size (BBTv2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import pack
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.oracle import TextBatch
from bbprompt.random_projection import BackboneFacts, clipped_std, placeholders_for
from bbprompt.tasks.example import Form
from bbprompt.texts.mrc import encode

__all__ = ["facts_of", "measure"]


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
    are clipped (see `clipped_std`). The released code measures while a first random candidate is at the input layer
    and counts padding; here there is neither. The forward is that of the untuned prompt on the few-shot texts, which
    the run pays for as its first call.
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


def _states(backbone: Backbone, ids: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """States that enter the second and each later layer of an encoder."""
    encoder = Encoder(backbone.model, token_type=backbone.token_type, prepack=False)
    layout = pack([len(each) for each in ids])
    states = encoder.embed(ids, layout)[None]
    found = []
    for layer in range(len(encoder.layers) - 1):
        states = encoder.layer(layer, states, layout)
        found.append(states.float().numpy())
    return found


def _stock_states(backbone: Backbone, ids: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """The same of a causal model or of T5's encoder, by its own forward, text by text."""
    causal = backbone.head is not None and backbone.head.causal
    model: Any = backbone.model if causal else backbone.model.get_encoder()
    texts = [
        model(input_ids=torch.tensor([each]), output_hidden_states=True, use_cache=False).hidden_states for each in ids
    ]
    return [
        np.concatenate([states[layer].float().numpy().ravel() for states in texts])
        for layer in range(1, backbone.layers)
    ]
