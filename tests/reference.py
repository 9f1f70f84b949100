"""The plain way: a stock transformers model, forward hooks, padded batches. What our fast paths must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.oracle import Scores, Support, TextBatch
from bbprompt.prompts import ModularPrompt
from bbprompt.texts.mrc import Encoded, Offsets, encode


def prepended_states(
    model: Any, ids: Sequence[Sequence[int]], prompt: np.ndarray, token_type: int = 0
) -> list[np.ndarray]:
    """Last hidden states `(P + S_i, H)` with the rows of a prompt `(P, H)` before each text.

    They stand behind the stock embedding layer, which sees the tokens alone; the stock encoder sees all.
    """
    width, padding = max(map(len, ids)), model.config.pad_token_id or 0
    batch = torch.tensor([[*text, *[padding] * (width - len(text))] for text in ids])
    mask = torch.tensor([[1.0] * (len(prompt) + len(text)) + [0.0] * (width - len(text)) for text in ids])
    with torch.no_grad():
        embedded = model.embeddings(input_ids=batch, token_type_ids=torch.full_like(batch, token_type))
        embedded = getattr(model, "embeddings_project", torch.nn.Identity())(embedded)
        rows = torch.cat([torch.from_numpy(prompt).expand(len(ids), -1, -1), embedded], dim=1)
        hidden = (1.0 - mask)[:, None, None] * torch.finfo(torch.float32).min
        out = model.encoder(rows, attention_mask=hidden).last_hidden_state
    return [states[: len(prompt) + len(text)].numpy() for states, text in zip(out, ids, strict=True)]


def plain_states(
    model: Any, ids: Sequence[Sequence[int]], prompts: np.ndarray | None = None, first: int = 1, token_type: int = 0
) -> list[np.ndarray]:
    """Last hidden states `(S_i, H)` of each text from the stock forward on a padded batch.

    Args:
        model: Stock encoder.
        ids: Token ids of each text.
        prompts: `(L, P, H)`, added at positions first..first+P-1 before layer l; None for none.
        first: First prompt position.
        token_type: Token type of every position.
    """
    width = max(map(len, ids))
    padding = model.config.pad_token_id or 0
    batch = torch.tensor([[*text, *[padding] * (width - len(text))] for text in ids])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in ids])

    def adder(prompt: torch.Tensor) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            states[:, first : first + len(prompt)] += prompt
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        return hook

    handles = [
        model.encoder.layer[i].register_forward_pre_hook(adder(torch.from_numpy(prompt)), with_kwargs=True)
        for i, prompt in enumerate(prompts if prompts is not None else ())
    ]
    try:
        with torch.no_grad():
            out = model(
                input_ids=batch, attention_mask=mask, token_type_ids=torch.full_like(batch, token_type)
            ).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return [states[: len(text)].numpy() for states, text in zip(out, ids, strict=True)]


class PlainOracle:
    """Scores one candidate at a time through `plain_states`, in float64 after the encoder."""

    def __init__(self, backbone: Backbone, prompt: ModularPrompt, max_tokens: int | None = None) -> None:
        self.backbone, self.prompt = backbone, prompt
        limit = min(max_tokens or backbone.max_positions, backbone.max_positions)
        self.frame = frame_for(backbone.tokenizer, prompt.config.placeholders, limit)
        self.tokenize = tokenize_with(backbone.tokenizer)

    def encoded(self, batch: TextBatch) -> list[Encoded]:
        answers = batch.answers or (None,) * len(batch.forms)
        return [
            encode(form, self.tokenize, self.frame, () if answer is None else (answer,))
            for form, answer in zip(batch.forms, answers, strict=True)
        ]

    def score(
        self, batch: TextBatch, point: np.ndarray, support: Support, longest: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Return log-probabilities `(O, 2)`, raw logits `(O, 2)` and the best character span of each text."""
        encoded = self.encoded(batch)
        prompts = self.prompt.prompts(point.astype(np.float32))
        model, ids, token_type = self.backbone.model, [item.ids for item in encoded], self.backbone.token_type
        if self.prompt.config.injection == "prepend":
            states = prepended_states(model, [text[len(prompts[0]) :] for text in ids], prompts[0], token_type)
        else:
            states = plain_states(model, ids, prompts, self.frame.prompt_start, token_type)
        log_probabilities, raw, best = [], [], []
        for item, rows in zip(encoded, states, strict=True):
            logits = rows.astype(np.float64) @ self.prompt.head_weight.T + self.prompt.head_bias
            start, end = logits[:, 0], logits[:, 1]
            if support == "sequence":
                firsts = lasts = list(range(len(rows)))
            elif item.offsets:
                firsts = lasts = list(range(*item.context))
            else:
                firsts, lasts = [a for a, _ in item.spans], [b for _, b in item.spans]
            norms = np.logaddexp.reduce(start[firsts]), np.logaddexp.reduce(end[lasts])
            for a, b in item.spans:
                raw.append((start[a], end[b]))
                log_probabilities.append((start[a] - norms[0], end[b] - norms[1]))
            if longest is not None and item.offsets:
                low, high = item.context
                spans = [(a, b) for a in range(low, high) for b in range(a, min(a + longest, high))]
                a, b = max(spans, key=lambda span: start[span[0]] + end[span[1]])
                best.append((item.offsets[a - low][0], item.offsets[b - low][1]))
        return np.array(log_probabilities).reshape(-1, 2), np.array(raw).reshape(-1, 2), best


def counted_texts(module: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that what is opened in a module from now on cuts into tokens, in a list that grows."""
    written: list[str] = []

    def tokenize_and_count(tokenizer: Any) -> Callable[[str], tuple[Sequence[int], Offsets]]:
        tokenize = tokenize_with(tokenizer)

        def count(text: str) -> tuple[Sequence[int], Offsets]:
            written.append(text)
            return tokenize(text)

        return count

    monkeypatch.setattr(f"{module}.tokenize_with", tokenize_and_count)
    return written


def points_of(prompt: ModularPrompt, count: int, seed: int = 0) -> np.ndarray:
    """Random points of a prompt's space."""
    return np.random.default_rng(seed).normal(0, 1, (count, *prompt.space.shape))


def compare(ours: Scores, plain: PlainOracle, batch: TextBatch, points: np.ndarray, support: Support) -> None:
    """See that an oracle answered what the plain forward does."""
    longest = None if ours.best is None else 3
    owner = np.repeat(np.arange(len(batch.forms)), batch.sizes)
    for n, point in enumerate(points):
        log_probabilities, raw, best = plain.score(batch, point, support, longest)
        np.testing.assert_allclose(ours.logits[n], raw, atol=1e-5)
        np.testing.assert_allclose(ours.logits[n] - ours.normalizer[n][owner], log_probabilities, atol=1e-5)
        if ours.best is not None:
            assert ours.best[n].tolist() == [list(span) for span in best]


def clipped_std(values: np.ndarray) -> float:
    """BBTv2's: clip to mean +- 3 deviations and measure anew, five times; all values at once, in float64."""
    kept = np.asarray(values, dtype=np.float64).ravel()
    for _ in range(5):
        mean, std = kept.mean(), kept.std()
        kept = kept.clip(mean - 3.0 * std, mean + 3.0 * std)
    return float(kept.std())
