"""The verbalizer head: an option scores by what the language model gives its word in a gap of the text.

Masked models: as many mask tokens fill the gap as the longest option word of the text has tokens; the logit of a
word is the mean over its tokens of the raw logit at its mask. Causal models: the gap must end the text, and the
logit of a word is the raw logit of its first token; words that begin with the same token are refused, for they
could not be told apart. Encoder-decoders of the T5 family: one sentinel fills the gap, and the logit is that of the
word's first token as what the decoder says behind this sentinel. With words of one token all are the rule of BBT.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bbprompt.backends.head import each, one_channel
from bbprompt.backends.layout import Layout
from bbprompt.backends.lm_head import HeadKind, LanguageHead
from bbprompt.errors import DataError
from bbprompt.oracle import Scores, Support, TextBatch
from bbprompt.tasks.example import Form
from bbprompt.texts.cloze import encode_cloze, word_tokens
from bbprompt.texts.mrc import Encoded, Frame, Offsets

__all__ = ["VerbalizerHead", "VerbalizerPlan"]


@dataclass(frozen=True, slots=True)
class VerbalizerPlan:
    """Where the gaps of some texts are.

    Attributes:
        read: `(N, R)` packed rows of the gap's tokens; the last repeated where a gap has fewer than R.
        cut: Number of tokens that did not fit.
    """

    read: Tensor
    cut: int


class VerbalizerHead:
    """Label words by the model's own output layer.

    Args:
        head: The output layer.
        mask: Token id of the mask or sentinel; not used by causal models.
        tokenize: Text to token ids and character offsets.
        frame: What surrounds every text.
        device: Where the states are.
        unknown: Token id of what the vocabulary lacks; None where it lacks nothing.
    """

    def __init__(
        self,
        head: LanguageHead,
        mask: int,
        tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
        frame: Frame,
        device: torch.device,
        unknown: int | None,
    ) -> None:
        self._head, self._mask, self._unknown = head.to(device), mask, unknown
        self._tokenize, self._frame, self._device = tokenize, frame, device
        self._known = None if head.tokens is None else frozenset(head.tokens.tolist())
        self._word = functools.lru_cache(maxsize=4096)(self._find)

    @property
    def kind(self) -> HeadKind:
        """How the model fills a gap."""
        return self._head.kind

    def sequences(self, batch: TextBatch) -> list[Encoded]:
        """One sequence a text; of a causal model it ends where the word would begin.

        The gap of a text without options is one token wide.
        """

        def write(number: int) -> Encoded:
            form = batch.forms[number]
            words = self.words(form)
            if not self._head.causal:
                return encode_cloze(form, self._tokenize, self._frame, [self._mask] * max(map(len, words), default=1))
            if any(part.text.strip("。.！!？? ") for part in form.parts[form.gap :]):
                raise DataError("text behind the gap: a causal model reads only what stands before it")
            ended = Form(form.parts[: form.gap], form.options, -1, gap=form.gap)
            written = encode_cloze(ended, self._tokenize, self._frame, ())
            last = len(written.ids) - 1
            return Encoded(written.ids, ((last, last),), written.context, written.offsets, written.cut)

        return each(batch, write)

    def words(self, form: Form) -> list[tuple[int, ...]]:
        """Token ids of each option word in the gap of `form`.

        Raises:
            DataError: A word has no token or one that the head cannot name, or two cannot be told apart.
        """
        if form.gap < 0:
            raise DataError("no gap for a word in this text; a verbalizer readout needs a cloze text")
        before = form.parts[form.gap - 1].text if form.gap else ""
        words = [self._word(before, option) for option in form.options]
        for option, word in zip(form.options, words, strict=True):
            if self._unknown in word:
                raise DataError(f"the option word '{option}' is not in the vocabulary; give the task other `words`")
        if not self._head.whole_words:
            words = [word[:1] for word in words]
        for (one, a), (other, b) in itertools.combinations(zip(form.options, words, strict=True), 2):
            if a == b and one != other:
                raise DataError(
                    f"the option words '{one}' and '{other}' begin with the same token and cannot be told apart; "
                    "give the task other `words`"
                )
        return words

    def _find(self, before: str, word: str) -> tuple[int, ...]:
        tokens = word_tokens(before, word, self._tokenize)
        if self._known is not None and not self._known.issuperset(tokens):
            raise DataError(
                f"the option word '{word}' has a token that the language model head cannot name; give the task other "
                "`words`, or take another --backbone"
            )
        return tokens

    def plan(self, sequences: Sequence[Encoded], layout: Layout, support: Support) -> VerbalizerPlan:
        """Find the rows of the gaps."""
        width = max(item.spans[0][1] - item.spans[0][0] + 1 for item in sequences)
        positions = [
            [min(first + i, last) for i in range(width)] for first, last in (item.spans[0] for item in sequences)
        ]
        return VerbalizerPlan(layout.rows(torch.as_tensor(positions)), sum(item.cut for item in sequences))

    def apply(self, plan: VerbalizerPlan, states: Tensor) -> Tensor:
        """Features before the output matrix, of the same shape as the states `(n, N, R, H)`."""
        features: Tensor = self._head.transform(states.float())
        return features

    def values(
        self, batch: TextBatch, plans: Sequence[VerbalizerPlan], outputs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One logit an option, `(n, O, 1)`, normalised over the options of the text whatever the support."""
        pieces, normalizer, done = [], [], 0
        for features in outputs:
            forms = batch.forms[done : done + features.shape[1]]
            done += len(forms)
            text: list[int] = []
            at: list[int] = []
            tokens: list[int] = []
            owner: list[int] = []
            sizes: list[int] = []
            for number, form in enumerate(forms):
                words = self.words(form)
                for word in words:
                    owner += [len(sizes)] * len(word)
                    sizes.append(len(word))
                    text += [number] * len(word)
                    at += range(len(word))
                    tokens += word
            rows, places, named = (torch.as_tensor(numbers, device=self._device) for numbers in (text, at, tokens))
            # One candidate at a time: the features of all words for those of a large request would take gigabytes.
            values = torch.stack([self._head.logits(own[rows, places], named) for own in features])
            logits = values.new_zeros(*values.shape[:-1], len(sizes))
            logits.index_add_(-1, torch.as_tensor(owner, device=self._device), values)
            logits /= torch.as_tensor(sizes, device=self._device)
            pieces.append(logits)
            normalizer += [
                part.logsumexp(-1) for part in torch.split(logits, [len(form.options) for form in forms], dim=-1)
            ]
        return torch.cat(pieces, dim=1)[..., None], torch.stack(normalizer, dim=1)[..., None]

    def scores(
        self, batch: TextBatch, plans: Sequence[VerbalizerPlan], outputs: Sequence[Tensor], longest_answer: int | None
    ) -> Scores:
        """The same as scores; there are no answers to find."""
        return one_channel(self.values(batch, plans, outputs), sum(plan.cut for plan in plans))
