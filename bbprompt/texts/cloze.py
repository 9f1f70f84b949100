"""The cloze form on tokens: a text with a gap, and the words that may fill it.

A sequence is `[first] placeholders text-before gap text-behind [last]`, or has a prepended prompt in front. White space
before the gap belongs to the word that fills it ("It was {gap}" is filled by " great"), as byte-level vocabularies have
it. What does not fit is cut as in `bbprompt.texts.mrc`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bbprompt.errors import DataError
from bbprompt.tasks.example import Form
from bbprompt.texts.mrc import Encoded, Frame, Offsets, keep, owners

__all__ = ["Tokenize", "encode_cloze", "word_tokens"]

Tokenize = Callable[[str], tuple[Sequence[int], Offsets]]


def encode_cloze(form: Form, tokenize: Tokenize, frame: Frame, gap: Sequence[int]) -> Encoded:
    """Write `form` with the tokens `gap` in its gap; the one span of the result is where they stand.

    Raises:
        DataError: The form has no gap, or does not fit even with everything cuttable cut.
    """
    if form.gap < 0:
        raise DataError("no gap for a word in this text; write it for a verbalizer readout")
    texts = [part.text for part in form.parts]
    if form.gap:
        texts[form.gap - 1] = texts[form.gap - 1].rstrip()
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text))
    middle = starts[form.gap]
    front, before_gap = tokenize("".join(texts[: form.gap]))
    more, behind = tokenize("".join(texts[form.gap :]))
    boundary = len(front)
    ids = [*front, *more]
    offsets = [*before_gap, *((middle + a, middle + b) for a, b in behind)]
    kept = keep(form, owners(offsets, starts), frame.room - len(gap), offsets, (), starts)
    before = [ids[i] for i in kept if i < boundary]
    after = [ids[i] for i in kept if i >= boundary]
    at = frame.text_start + len(before)
    return Encoded(
        (*frame.front, *before, *gap, *after, *frame.last),
        ((at, at + len(gap) - 1),),
        (0, 0),
        (),
        len(ids) - len(kept),
    )


def word_tokens(before: str, word: str, tokenize: Tokenize) -> tuple[int, ...]:
    """Token ids of `word` as it stands behind the text `before`.

    Raises:
        DataError: The tokenizer drops the word.
    """
    stem = before.rstrip()
    filled = before[len(stem) :] + word
    ids, offsets = tokenize(stem + filled)
    inside = [(token, a) for token, (a, b) in zip(ids, offsets, strict=True) if b > len(stem)]
    if not inside or inside[0][1] < len(stem):  # a piece that holds the end of the text too: the word by itself
        ids, _ = tokenize(filled)
        inside = [(token, 0) for token in ids]
    if not inside:
        raise DataError(f"the option word '{word}' has no token: the tokenizer drops it")
    return tuple(token for token, _ in inside)
