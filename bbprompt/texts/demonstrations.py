"""Solved examples in front of a text, for language models that continue it (Brown et al. 2020, arXiv:2005.14165).

A demonstration is the text with the right word in its gap, what stands behind the gap, and a line break. A row of them
is tokens, which one text after the other is put behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bbprompt.tasks.example import Example, Form
from bbprompt.texts.cloze import Tokenize, encode_cloze, word_tokens
from bbprompt.texts.mrc import Frame

__all__ = ["Demonstrations", "draw_order", "write_demonstrations"]

_BREAK = "\n"
_UNBOUNDED = 2**31


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """A row of solved examples as tokens.

    Attributes:
        ids: Token ids.
        gaps: For each example the number of its ids before the first one of the right word, counted from the start.
    """

    ids: tuple[int, ...]
    gaps: tuple[int, ...]


def draw_order(examples: Sequence[Example], seed: int, number: int) -> tuple[int, ...]:
    """One order of few-shot examples: one of each label in turn, so that also the first few are balanced.

    Within a label and within a turn the order is drawn; what a label has more than others stands at the end.

    Args:
        examples: Labelled.
        seed: Of the run.
        number: Which of its orders.
    """
    rng = np.random.default_rng([seed, number])
    labels = np.array([example.label for example in examples])
    waiting = [rng.permutation(np.flatnonzero(labels == label)).tolist() for label in np.unique(labels)]
    order: list[int] = []
    while any(waiting):
        for label in rng.permutation(len(waiting)):
            order += waiting[label][:1]
            waiting[label] = waiting[label][1:]
    return tuple(order)


def write_demonstrations(shown: Sequence[tuple[Form, int]], tokenize: Tokenize, room: int) -> Demonstrations:
    """Write solved examples in order, up to the first that does not fit whole.

    Args:
        shown: Texts with a gap and the option that is right.
        tokenize: Text to token ids and offsets.
        room: Most tokens for all of them together.

    Raises:
        DataError: A text has no gap, or the tokenizer drops a word.
    """
    close, _ = tokenize(_BREAK)
    ids: list[int] = []
    gaps: list[int] = []
    for form, right in shown:
        before = form.parts[form.gap - 1].text if form.gap > 0 else ""
        word = word_tokens(before, form.options[right], tokenize)
        written = encode_cloze(form, tokenize, Frame((), (), tuple(close), _UNBOUNDED), word)
        if len(ids) + len(written.ids) > room:
            break
        gaps.append(len(ids) + written.spans[0][0])
        ids += written.ids
    return Demonstrations(tuple(ids), tuple(gaps))
