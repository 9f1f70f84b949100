"""Pooled states of a local encoder: the mean of a text's last hidden states, as a unit vector.

That is how E5 (Wang et al. 2022, arXiv:2212.03533) and most embedding models are meant to be read. Special tokens
count in the mean, padding does not exist here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.fit import info_of
from bbprompt.backends.layout import pack
from bbprompt.backends.memory import Portion
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.embedding import Embeddings
from bbprompt.oracle import OracleInfo
from bbprompt.texts.mrc import Frame, Offsets

__all__ = ["LocalEmbedder", "embed_texts", "marker_for"]


def marker_for(backbone: str) -> str:
    """What a backbone wants before each text: "query: " for the E5 family, else nothing."""
    return "query: " if re.search(r"(^|[^a-z0-9])e5([^a-z0-9]|$)", backbone.lower()) else ""


@torch.inference_mode()
def embed_texts(
    encoder: Encoder,
    tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
    frame: Frame,
    texts: Sequence[str],
    marker: str = "",
    batch_tokens: int = 4096,
) -> Embeddings:
    """Read texts without any prompt.

    Args:
        encoder: The frozen encoder.
        tokenize: Text to token ids.
        frame: Special tokens and limit; its placeholders are left out.
        texts: At least one.
        marker: Put before each text.
        batch_tokens: Tokens that run through the encoder at once.
    """
    frame = replace(frame, placeholders=())
    sequences, cut = [], 0
    for text in texts:
        ids = tokenize(marker + text)[0]
        cut += max(len(ids) - frame.room, 0)
        sequences.append((*frame.first, *ids[: frame.room], *frame.last))
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
    vectors = np.empty((len(sequences), encoder.hidden), dtype=np.float32)
    begin = 0
    while begin < len(order):
        end, tokens = begin, 0
        while end < len(order) and (end == begin or tokens + len(sequences[order[end]]) <= batch_tokens):
            tokens += len(sequences[order[end]])
            end += 1
        some = [sequences[i] for i in order[begin:end]]
        layout = pack([len(sequence) for sequence in some], encoder.device)
        states = encoder.last_states(some, layout)
        for at, number, sequence in zip(layout.starts.tolist(), order[begin:end], some, strict=True):
            mean = states[0, at : at + len(sequence)].float().mean(dim=0)
            vectors[number] = (mean / mean.norm().clamp_min(1e-12)).cpu().numpy()
        begin = end
    return Embeddings(vectors, cut)


class LocalEmbedder:
    """A frozen encoder on this machine, read without prompts.

    Args:
        backbone: The stock model with its tokenizer.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
        batch_tokens: Tokens that run through the encoder at once; halved for good where memory runs out.
        max_tokens: Longest sequence; None for the backbone's limit.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_tokens: int = 4096,
        max_tokens: int | None = None,
    ) -> None:
        self._encoder = Encoder(backbone.model, getattr(torch, dtype), device, backbone.token_type)
        limit = backbone.limit(max_tokens)
        self._frame = frame_for(backbone.tokenizer, (), limit)
        self._tokenize = tokenize_with(backbone.tokenizer)
        self._portion = Portion(batch_tokens, device)
        self._info = info_of(backbone, device, dtype, limit, batch_tokens)

    @property
    def info(self) -> OracleInfo:
        """What this model is."""
        return self._info

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """Read texts; see `bbprompt.embedding.Embedder`."""
        marker = marker_for(self._info.backbone)
        return self._portion.fit(
            lambda: embed_texts(self._encoder, self._tokenize, self._frame, texts, marker, self._portion.tokens)
        )

    def close(self) -> None:
        """Nothing is held beside the model."""
