"""The oracle of a vLLM server: prompts of causal models at the input layer, label words by the model's own output.

vLLM takes embeddings in place of a text, and nothing for later layers. So what stands before a text (special tokens,
placeholders with the prompt added or the rows of a prepended one) and the text itself are embedded here, with the
tokenizer and the embedding matrix of the backbone; the layers are the server's. Of the layers one is loaded, never run:
what enters it shows whether the model reads embeddings as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbprompt.backends.backbone import Backbone
from bbprompt.backends.body import embedded
from bbprompt.backends.calls import Policy
from bbprompt.backends.completions import Completions
from bbprompt.backends.remote import Pieces
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.backends.virtual_tokens import front_of, virtual_tokens
from bbprompt.errors import OracleError, UsageError
from bbprompt.oracle import OracleInfo, ReadoutKind, Scores, Support, TextBatch, check_points, check_scores
from bbprompt.prompts import ModularPrompt
from bbprompt.random_projection import placeholders_for
from bbprompt.texts.mrc import Frame

__all__ = ["VllmOracle", "check_prompts"]

_log = logging.getLogger("bbprompt")

_BYTES = 2**24  # of embeddings in one request
_PROBE = 8  # tokens of the text that both sides embed; fewer than a block of the server's prefix cache
_SAME = 0.05  # largest difference of two log-probabilities that bfloat16 and the order of sums may make


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts ready to be sent.

    Attributes:
        rows: Embeddings `(tokens, H)` of each, without what stands before it.
        words: Of each the first token of each option.
        groups: Texts that go together: the first, and the one after the last.
        cut: Tokens that did not fit.
    """

    rows: tuple[Tensor, ...]
    words: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, int], ...]
    cut: int


class VllmOracle:
    """A causal language model behind a vLLM server, with a verbalizer readout.

    Replies are log-probabilities over the vocabulary in place of raw logits, which differ by a constant of the text.
    A candidate is one request, or as many as its texts need; the number of workers decides how many are under way.

    Args:
        server: Where the layers are; it is closed with the oracle.
        backbone: Tokenizer, embedding matrix and at least one layer of the same model.
        prompt: The artifact; its prompts are of the input layer.
        workers: Most candidates under way.
        max_tokens: Longest sequence; None for the most that backbone and server take.
        policy: How patient the server's caller is.

    Raises:
        UsageError: Prompts or backbone are of a kind that cannot be sent as embeddings.
        ArtifactError: The prompts are for another backbone.
        OracleError: The server has other weights than the backbone.
    """

    def __init__(
        self,
        server: Completions,
        backbone: Backbone,
        prompt: ModularPrompt,
        *,
        workers: int = 1,
        max_tokens: int | None = None,
        policy: Policy | None = None,
    ) -> None:
        self._server = server
        patience = policy or Policy()
        try:
            check_prompts(server.url, prompt.config.layers, prompt.config.readout)
            front = front_of(backbone, prompt, np.ones(prompt.space.shape))
            try:
                virtual_tokens(front)  # what stands before a text can be sent as embeddings
            except UsageError as error:
                raise UsageError(f"--backend {server.url}: {error}") from None
            limit = min(backbone.max_positions, server.room, max_tokens or server.room)
            self._frame = frame_for(backbone.tokenizer, prompt.config.placeholders, limit, open_end=True)
            self._head = _head(backbone, self._frame)
            self._embed = backbone.model.get_input_embeddings()
            self._before = embedded(backbone.model, front.ids[0]).detach()
            self._projection = torch.from_numpy(prompt.projection[0])
            self._info = OracleInfo(
                backbone=backbone.id,
                backbone_digest=backbone.digest,
                prompts_digest=prompt.digest,
                layers=1,
                dim=prompt.config.intrinsic_dim,
                precision="unknown",
                device=f"vLLM {server.version}, {server.model}, {server.way}",
                max_tokens=limit,
                readout="verbalizer",
            )
            self._check_weights()
        except BaseException:
            server.close()
            raise
        self._pieces = Pieces(server.url, workers, 2 * (patience.total + patience.deadline))
        _log.info("%s: vLLM %s, %s; label words by %s", server.url, server.version, server.model, server.way)

    @property
    def info(self) -> OracleInfo:
        """What is known of the model; the precision is the server's."""
        return self._info

    def score(
        self,
        batch: TextBatch,
        points: NDArray[np.floating],
        support: Support = "candidates",
        longest_answer: int | None = None,
    ) -> Scores:
        """Score every candidate on every text; see `bbprompt.oracle.Oracle`."""
        checked, texts = check_points(points, self._info), self._written(batch)
        return self._pieces.score(checked, 1, lambda piece: self._candidate(batch, texts, piece))

    def check_texts(self, batch: TextBatch) -> None:
        """See that every text can be read; see `bbprompt.readable.Checker`."""
        self._head.sequences(batch)

    def close(self) -> None:
        """Close the connections; safe to call twice."""
        self._pieces.close()
        self._server.close()

    @torch.no_grad()
    def _written(self, batch: TextBatch) -> _Texts:
        sequences = self._head.sequences(batch)
        begin = self._frame.text_start
        rows = tuple(self._embed(torch.tensor(item.ids[begin:])) for item in sequences)
        words = tuple(tuple(word[0] for word in self._head.words(form)) for form in batch.forms)
        width = max(len(item.ids) for item in sequences)
        size = max(_BYTES // (width * self._before.shape[1] * self._before.element_size()), 1)
        groups = tuple((first, min(first + size, len(rows))) for first in range(0, len(rows), size))
        return _Texts(rows, words, groups, sum(item.cut for item in sequences))

    @torch.no_grad()
    def _candidate(self, batch: TextBatch, texts: _Texts, point: NDArray[np.float32]) -> Scores:
        """Scores of one candidate `(1, 1, d)`."""
        before = self._before.clone()
        prompt = torch.from_numpy(point[0, 0]) @ self._projection
        before[self._frame.prompt_start : self._frame.prompt_end] += prompt.view(-1, before.shape[1])
        logits: list[NDArray[np.float64]] = []
        for first, last in texts.groups:
            words = texts.words[first:last]
            tokens = sorted({token for options in words for token in options})
            found = self._server.score([torch.cat([before, row]) for row in texts.rows[first:last]], tokens)
            logits += [row[np.searchsorted(tokens, options)] for row, options in zip(found, words, strict=True)]
        normalizer = [np.logaddexp.reduce(row) for row in logits]
        scores = Scores(
            np.concatenate(logits)[None, :, None].astype(np.float32),
            np.array(normalizer)[None, :, None].astype(np.float32),
            None,
            texts.cut,
        )
        return check_scores(scores, batch, 1, channels=1)

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Have the server embed a few tokens and compare with what their embeddings give.

        Raises:
            OracleError: They give something else, or the server does not take this width.
        """
        ids: Sequence[int] = self._frame.front[-_PROBE:]
        if self._frame.prepended:  # rows that the server has no tokens for
            ids = placeholders_for(self._embed.num_embeddings, _PROBE)
        rows = self._embed(torch.tensor(ids))
        tokens = np.linspace(0, self._embed.num_embeddings - 1, _PROBE).astype(int).tolist()
        difference = self._server.difference(ids, rows, tokens)
        if not difference <= _SAME:
            raise OracleError(
                f"{self._server.url}: the embeddings of {self._info.backbone} are not those of {self._server.model} "
                f"there, whose own give other log-probabilities (by {difference:.2g}); give --backbone the model that "
                "the server was started with"
            )


def check_prompts(url: str, layers: int | None, readout: ReadoutKind) -> None:
    """Refuse prompts that embeddings before a text cannot represent.

    Args:
        url: Of the server, for the message.
        layers: L of the prompts; None for all that the model has.
        readout: How they are read.

    Raises:
        UsageError: They are deep, or not read by words for labels.
    """
    reason = None
    if readout != "verbalizer":
        reason = f"it tells next-token probabilities of causal models, not what a '{readout}' readout needs"
    elif layers != 1:
        reason = f"it takes embeddings before the text, and these prompts act before {layers or 'all'} layers"
    if reason is not None:
        raise UsageError(
            f"--backend {url}: {reason}; take a method such as bbt, or another backend (`bbprompt serve`, kserve://)"
        )


def _head(backbone: Backbone, frame: Frame) -> VerbalizerHead:
    if backbone.head is None:
        raise UsageError(f"backbone {backbone.id}: loaded without its language model head")
    tokenizer = backbone.tokenizer
    tokenize, device = tokenize_with(tokenizer), torch.device("cpu")
    return VerbalizerHead(backbone.head, -1, tokenize, frame, device, tokenizer.unk_token_id)
