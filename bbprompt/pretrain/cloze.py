"""Self-supervised examples as texts with a gap: what is stored of them, and the loss under a language model's head.

The right label word is told from the other words of its text, as when prompts are tuned: the loss is the cross-entropy
over the options, not over the vocabulary as in PPT's code, and only the rows of these words are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bbprompt.backends.body import Body
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.layout import pack
from bbprompt.backends.lm_head import LanguageHead
from bbprompt.backends.verbalizer_head import VerbalizerHead
from bbprompt.oracle import TextBatch
from bbprompt.pretrain.model import ModularPrompts, Phase
from bbprompt.tasks.example import Form
from bbprompt.texts.mrc import Encoded

__all__ = ["ClozeBatch", "StockModel", "cloze_loss", "collate_cloze", "write_cloze"]


@dataclass(frozen=True, slots=True)
class StockModel:
    """A frozen causal model or encoder-decoder as a training sees it.

    Attributes:
        body: Runs it.
        dtype: Its precision.
        device: Where it is.
        hidden: H.
        layers: Those that prompts can stand before.
    """

    body: Body
    dtype: torch.dtype
    device: torch.device
    hidden: int
    layers: range


@dataclass(frozen=True, slots=True)
class ClozeBatch:
    """N texts with a gap.

    Attributes:
        sequences: The texts; the one span of each is its gap.
        tasks: `(N,)` task index of each text.
        gaps: `(N, R)` positions of the gap's tokens, the last repeated where a gap has fewer than R.
        words: Token ids of the option words of each text.
        gold: `(N,)` index of the right option.
        uids: Which examples these are, for messages.
    """

    sequences: list[Encoded]
    tasks: Tensor
    gaps: Tensor
    words: list[list[list[int]]]
    gold: Tensor
    uids: tuple[str, ...] = ()

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """Token ids of each text."""
        return [item.ids for item in self.sequences]

    @property
    def rows_read(self) -> int:
        """Rows that the last layer computes."""
        return self.gaps.numel()


def write_cloze(form: Form, head: VerbalizerHead) -> Encoded:
    """A text with a gap and its option words as one item of a token store.

    The first span is the gap. Each further one is no span but a token of a word: (index of the option, token id).

    Raises:
        DataError: It does not fit, or its words have no tokens that tell them apart.
    """
    (item,) = head.sequences(TextBatch((form,)))
    tokens = tuple((index, token) for index, word in enumerate(head.words(form)) for token in word)
    return Encoded(item.ids, (*item.spans, *tokens), (0, 0), (), item.cut)


def collate_cloze(
    items: Sequence[Encoded], gold: Sequence[int], tasks: Sequence[int], uids: Sequence[str] = ()
) -> ClozeBatch:
    """Collect items of `write_cloze` with the index of each right option and of each task."""
    sequences, words = [], []
    for item in items:
        gap, *tokens = item.spans
        sequences.append(Encoded(item.ids, (gap,), (0, 0), (), item.cut))
        own: list[list[int]] = [[] for _ in range(tokens[-1][0] + 1)]
        for option, token in tokens:
            own[option].append(token)
        words.append(own)
    spans = [item.spans[0] for item in sequences]
    width = max(last - first + 1 for first, last in spans)
    gaps = torch.as_tensor([[min(first + i, last) for i in range(width)] for first, last in spans])
    return ClozeBatch(sequences, torch.as_tensor(tasks), gaps, words, torch.as_tensor(gold), tuple(uids))


def cloze_loss(
    prompts: ModularPrompts,
    model: Encoder | StockModel,
    head: LanguageHead,
    batch: ClozeBatch,
    phase: Phase,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the right word among the options, and whether it scores highest, `(N,)` both.

    The logit of a word is the mean over its tokens; see `bbprompt.backends.verbalizer_head`. All texts of a batch for a
    stock model are under one prompt.
    """
    features = head.transform(_states(prompts, model, batch, phase, generator))
    entries = [
        (text, place, token, option, len(word))
        for text, words in enumerate(batch.words)
        for option, word in enumerate(words)
        for place, token in enumerate(word)
    ]
    text, place, token, option, size = torch.as_tensor(entries, device=features.device).unbind(1)
    most = max(map(len, batch.words))
    values = head.logits(features[text, place], token) / size
    logits = values.new_zeros(len(batch.words) * most).index_add(0, text * most + option, values).view(-1, most)
    sizes = torch.as_tensor([len(words) for words in batch.words], device=features.device)
    logits = logits.masked_fill(torch.arange(most, device=features.device) >= sizes[:, None], -torch.inf)
    gold = batch.gold.to(features.device)
    return F.cross_entropy(logits, gold, reduction="none"), (logits.argmax(1) == gold).float()


def _states(
    prompts: ModularPrompts, model: Encoder | StockModel, batch: ClozeBatch, phase: Phase, generator: torch.Generator
) -> Tensor:
    """States `(N, R, H)` in the gaps, float32."""
    if isinstance(model, Encoder):
        layout = pack([len(ids) for ids in batch.ids], model.device)
        read = layout.rows(batch.gaps)
        return prompts.states(model, batch.ids, batch.tasks, layout, phase, generator, read)
    vectors = prompts.vectors(phase, generator, batch.tasks[:1])
    return model.body.states(batch.sequences, prompts.frame, vectors)[0].float()
