"""Self-supervised examples for prompt pre-training, as pure functions (PPT, section 3.2 and its code).

Three formats: a pair of sentences (are they adjacent, of one document, or of two?), a choice (which of these
sentences comes next?), a single sentence (the label that another model gives it). The unified format is the choice
with 2 to 16 options, the more the shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bbprompt.pretrain.ppt_corpus import Document
from bbprompt.tasks.example import Example, input_uid

__all__ = ["CHOICE", "Caps", "around_gap", "choice", "pair", "pseudo_labelled", "unified_caps"]

#: Labels of a pair.
OTHER, SAME, ADJACENT = 0, 1, 2

_OTHER_DOCUMENTS = 4
_RATIO = (0.01, 100.0)


@dataclass(frozen=True, slots=True)
class Caps:
    """How long a choice may be, and where its wrong options come from.

    Attributes:
        query: Most tokens of the query.
        option: Most tokens of an option.
        same: Wrong options from the query's own document; the rest come from four others.
    """

    query: int
    option: int
    same: int

    def scaled(self, share: float) -> Caps:
        """The caps for a model that reads `share` of the length they were made for; never longer."""
        share = min(share, 1.0)
        return Caps(max(int(self.query * share), 4), max(int(self.option * share), 2), self.same)


#: Next-sentence selection among 6 options, outside the unified format.
CHOICE = Caps(389, 86, 1)


def unified_caps(options: int) -> Caps:
    """Lengths in the unified format (PPT's code, for 768 tokens).

    Args:
        options: 2 to 16.
    """
    table = ((4, Caps(400, 50, 1)), (5, Caps(400, 40, 1)), (6, Caps(300, 40, 1)), (7, Caps(250, 30, 2)))
    longer = ((9, Caps(200, 30, 2)), (10, Caps(150, 20, 2)), (16, Caps(150, 20, 3)))
    if not 2 <= options <= 16:
        raise ValueError(f"{options} options: the unified format has 2 to 16")
    return next(caps for most, caps in (*table, *longer) if options <= most)


def pair(
    document: Document, others: Sequence[Document], size: Callable[[str], int], rng: np.random.Generator
) -> Example | None:
    """Two sentences and how they stand to each other: each of the three labels in a third of the draws.

    0: of different documents; 1: of one document, not adjacent; 2: adjacent, in either order. None where the
    document has no such second sentence or one is over a hundred times as long as the other.
    """
    label = int(rng.integers(3))
    at = int(rng.integers(len(document)))
    if label == OTHER:
        if not others:
            return None
        other = others[int(rng.integers(len(others)))]
        second = other[int(rng.integers(len(other)))]
    else:
        apart = [i for i in range(len(document)) if (abs(i - at) == 1) == (label == ADJACENT) and i != at]
        if not apart:
            return None
        second = document[apart[int(rng.integers(len(apart)))]]
    ratio = max(size(document[at]), 1) / max(size(second), 1)
    if not _RATIO[0] <= ratio <= _RATIO[1] or second == document[at]:
        return None
    fields = {"text_a": document[at], "text_b": second}
    return Example(fields, (), label, (), input_uid(fields))


def around_gap(
    example: Example,
    room: int,
    tokenize: Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]],
    last: bool = False,
) -> Example:
    """A pair that is too long, both texts shortened in proportion: what stands nearest to the gap stays.

    Args:
        example: With the fields text_a and text_b.
        room: Most tokens of both together, at least 2.
        tokenize: Text to token ids and their character offsets.
        last: Whether the gap stands behind both texts, as causal models need it, and not between them.
    """
    before, behind = example.fields["text_a"], example.fields["text_b"]
    (_, first), (_, second) = tokenize(before), tokenize(behind)
    total = len(first) + len(second)
    if total <= room or not first or not second:
        return example
    kept = min(max(round(room * len(first) / total), 1), room - 1)
    other = room - kept
    nearest = behind[second[-other][0] :] if last else behind[: second[other - 1][1]]
    fields = {"text_a": before[first[-kept][0] :], "text_b": nearest}
    return Example(fields, example.options, example.label, (), input_uid(fields))


def choice(
    document: Document,
    others: Sequence[Document],
    options: int,
    caps: Caps,
    cut: Callable[[str, int], str],
    rng: np.random.Generator,
) -> Example | None:
    """A sentence and `options` that may come next: the one that does, some of its document, the rest of four others.

    Where the document has too few sentences that are not adjacent, more come from the others. None where it is too
    short, or options are equal once they are cut.

    Args:
        document: At least two sentences.
        others: Documents to take wrong options from.
        options: Number of options.
        caps: Lengths.
        cut: Text and a number of tokens -> the text up to there.
        rng: Where chance comes from.
    """
    at = int(rng.integers(len(document) - 1))
    apart = [sentence for i, sentence in enumerate(document) if abs(i - at) > 1]
    same = min(caps.same, len(apart), options - 1)
    wrong = [apart[i] for i in rng.permutation(len(apart))[:same].tolist()]
    sources = [others[i] for i in rng.permutation(len(others))[:_OTHER_DOCUMENTS].tolist()]
    shuffled = [[source[i] for i in rng.permutation(len(source)).tolist()] for source in sources]
    turn = 0
    while len(wrong) < options - 1 and any(shuffled):
        pile = shuffled[turn % len(shuffled)]
        if pile:
            wrong.append(pile.pop())
        turn += 1
    texts = [cut(text, caps.option) for text in (document[at + 1], *wrong)]
    if len(texts) < options or len(set(texts)) < options or not all(text.strip() for text in texts):
        return None
    order = rng.permutation(options).tolist()
    fields = {"query": cut(document[at], caps.query)}
    shown = tuple(texts[i].strip() for i in order)
    return Example(fields, shown, order.index(0), (), input_uid(fields, shown))


def pseudo_labelled(texts: Sequence[str], probabilities: NDArray[np.floating], confidence: float) -> Iterator[Example]:
    """Yield the texts that an annotator is sure of, with the label it gives them.

    Args:
        texts: N single sentences.
        probabilities: `(N, L)` by the annotator, a model trained for such labels on other data.
        confidence: Least probability of the likeliest label.
    """
    for text, row in zip(texts, probabilities, strict=True):
        label = int(row.argmax())
        if row[label] >= confidence:
            fields = {"text": text}
            yield Example(fields, (), label, (), input_uid(fields))
