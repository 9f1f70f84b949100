"""How large a model's own states are, for random prompts that are to be of their size (BBTv2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.encoder import Encoder, pack
from bbprompt.backends.tokens import frame_for, tokenize_with
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
    backbone: Backbone, forms: Sequence[Form], prompt_length: int, max_tokens: int | None = None
) -> BackboneFacts:
    """Standard deviations of the states that enter each layer, on texts with placeholders and no prompt.

    For the first layer it is that of the whole word-embedding matrix. Later ones are clipped (see `clipped_std`). The
    released code measures while a first random candidate is at the input layer and counts padding; here there is
    neither. The forward is that of the untuned prompt on the few-shot texts, which the run pays for as its first call.
    """
    words = backbone.model.get_input_embeddings().weight
    facts = facts_of(backbone)
    encoder = Encoder(backbone.model, token_type=backbone.token_type, prepack=False)
    limit = backbone.max_positions if max_tokens is None else min(max_tokens, backbone.max_positions)
    frame = frame_for(backbone.tokenizer, placeholders_for(facts.vocabulary, prompt_length), limit)
    tokenize = tokenize_with(backbone.tokenizer)
    ids = [encode(form, tokenize, frame).ids for form in forms]
    layout = pack([len(each) for each in ids])
    states = encoder.embed(ids, layout)[None]
    stds = [float(words.detach().float().std(correction=0))]
    for layer in range(len(encoder.layers) - 1):
        states = encoder.layer(layer, states, layout)
        stds.append(clipped_std(states.float().numpy()))
    return replace(facts, stds=tuple(stds))
