"""The machine-reading form on tokens: where options and context stand, and what is cut from a long text.

A sequence is `[first] placeholders text options [last]`: the placeholders are the positions that prompts are
added to, the options follow the text, each closed by a comma. A prepended prompt has rows of its own in their place,
before everything else. The whole text is tokenized at once and its spans are found by character offsets, so any fast
tokenizer serves. When a sequence is too long, tokens are taken from the end of the parts marked as cuttable, the
longest first; the question and the options are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bbprompt.errors import DataError
from bbprompt.tasks.example import Answer, Form

__all__ = ["NO_TOKEN", "SEPARATOR", "Encoded", "Frame", "Offsets", "encode", "keep", "owners"]

#: Closes each option.
SEPARATOR = "，"

#: In place of a token id: a row of zeros where the embeddings of tokens stand, which has no position among theirs.
NO_TOKEN = -1

#: Character span (start, end) of each token.
Offsets = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Frame:
    """What surrounds every text: special tokens, placeholder ids and the length limit.

    Attributes:
        first: Token ids before the placeholders ([CLS] or <s>).
        placeholders: Token ids at the prompt positions, P of them; all `NO_TOKEN` for a prompt before `first`.
        last: Token ids after the options ([SEP] or </s>).
        limit: Longest sequence in tokens, everything included.
    """

    first: tuple[int, ...]
    placeholders: tuple[int, ...]
    last: tuple[int, ...]
    limit: int

    @property
    def prepended(self) -> bool:
        """Whether the prompt has rows of its own, before the first token."""
        return NO_TOKEN in self.placeholders

    @property
    def front(self) -> tuple[int, ...]:
        """What stands before every text, in order."""
        return (*self.placeholders, *self.first) if self.prepended else (*self.first, *self.placeholders)

    @property
    def prompt_start(self) -> int:
        """Position of the first row of the prompt."""
        return 0 if self.prepended else len(self.first)

    @property
    def prompt_end(self) -> int:
        """Position behind the last row of the prompt."""
        return self.prompt_start + len(self.placeholders)

    @property
    def text_start(self) -> int:
        """Position of the first token of the text."""
        return len(self.first) + len(self.placeholders)

    @property
    def room(self) -> int:
        """Tokens left for text and options."""
        return self.limit - self.text_start - len(self.last)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence.

    Attributes:
        ids: Token ids; `NO_TOKEN` at the rows of a prepended prompt.
        spans: First and last position of each option; for extraction of each given answer that is in sight.
        context: First position of the context and the one after its last; (0, 0) without one.
        offsets: Character span in the context of each of its tokens.
        cut: Number of tokens cut.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    context: tuple[int, int]
    offsets: tuple[tuple[int, int], ...]
    cut: int


def encode(
    form: Form,
    tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
    frame: Frame,
    answers: Sequence[Answer] = (),
) -> Encoded:
    """Write `form` as one token sequence.

    Args:
        form: Text parts and options.
        tokenize: Text to token ids (no special tokens) and their character offsets.
        frame: Special tokens, placeholders and limit.
        answers: Extraction only: known answers. When the context must be cut, the part that is kept holds the
            first answer; without answers the beginning is kept.

    Raises:
        DataError: The sequence does not fit even with everything cuttable cut, an answer cannot be found, or
            an option or the context has no token.
    """
    text = "".join(part.text for part in form.parts)
    starts, position = [], 0
    for part in form.parts:
        starts.append(position)
        position += len(part.text)
    option_spans, end = [], len(text)
    for option in form.options:
        option_spans.append((end, end + len(option)))
        end += len(option) + len(SEPARATOR)
    ids, offsets = _tokens(text, form.options, option_spans, tokenize)

    owner = owners(offsets, [*starts, position])
    kept = keep(form, owner, frame.room, offsets, answers, starts)
    ids, cut = [ids[i] for i in kept], len(ids) - len(kept)
    offsets = [offsets[i] for i in kept]
    owner = [owner[i] for i in kept]

    base = frame.text_start
    spans = [_span(offsets, a, b, base) for a, b in option_spans]
    context, context_offsets = (0, 0), []
    if form.context >= 0:
        inside = [i for i, part in enumerate(owner) if part == form.context]
        if inside:
            shift = starts[form.context]
            context = (base + inside[0], base + inside[-1] + 1)
            context_offsets = [(max(a - shift, 0), b - shift) for a, b in (offsets[i] for i in inside)]
            for answer in answers:
                begin = shift + answer.start
                end = begin + len(answer.text)
                if offsets[inside[0]][0] <= begin and end <= offsets[inside[-1]][1]:
                    spans.append(_span(offsets, begin, end, base))
        else:
            raise DataError("the context has no token: the tokenizer drops this text")
    if answers and not spans:
        raise DataError(
            f"answer '{answers[0].text[:40]}' does not fit into {frame.limit} tokens; shorten the question, raise "
            "--max-tokens if it was set, or take a --backbone with a longer input"
        )
    return Encoded(
        (*frame.front, *ids, *frame.last),
        tuple(spans),
        context,
        tuple(context_offsets),
        cut,
    )


def _tokens(
    text: str,
    options: Sequence[str],
    spans: Sequence[tuple[int, int]],
    tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of the text and its options at `spans`, as one text wherever the options stay apart in it.

    A subword vocabulary may hold a piece such as "2,3", which would be the end of one option and the start of
    the
    next: the two could not be told apart. Then each option is tokenized for itself.
    """
    ids, offsets = tokenize(text + "".join(option + SEPARATOR for option in options))
    starts = [begin for begin, _ in spans[1:]]
    if all(end <= start or begin >= start for begin, end in offsets for start in starts):
        return list(ids), list(offsets)
    all_ids: list[int] = []
    all_offsets: list[tuple[int, int]] = []
    pieces = [text, *(option + SEPARATOR for option in options)]
    for piece, shift in zip(pieces, [0, *(begin for begin, _ in spans)], strict=True):
        ids, offsets = tokenize(piece)
        all_ids += ids
        all_offsets += [(shift + a, shift + b) for a, b in offsets]
    return all_ids, all_offsets


def owners(offsets: Offsets, bounds: Sequence[int]) -> list[int]:
    """Index of the part that each token ends in; the number of parts for the options."""
    owners, part = [], 0
    for _, end in offsets:
        while part < len(bounds) - 1 and end > bounds[part + 1]:
            part += 1
        owners.append(part if end <= bounds[-1] else len(bounds) - 1)
    return owners


def keep(
    form: Form,
    owner: Sequence[int],
    room: int,
    offsets: Offsets,
    answers: Sequence[Answer],
    starts: Sequence[int],
) -> list[int]:
    """Indices of the tokens that stay.

    Raises:
        DataError: The parts that may not be cut do not fit.
    """
    excess = len(owner) - room
    if excess <= 0:
        return list(range(len(owner)))
    tokens = {i: [t for t, part in enumerate(owner) if part == i] for i, part in enumerate(form.parts) if part.cut}
    if excess > sum(max(len(t) - 1, 0) for t in tokens.values()):
        fixed = len(owner) - sum(len(t) for t in tokens.values())
        raise DataError(
            f"question and options alone take {fixed} of {max(room, 0)} tokens, and nothing else may be cut; "
            "shorten them, raise --max-tokens if it was set, or take a --backbone with a longer input"
        )
    sizes = {i: len(t) for i, t in tokens.items()}
    for _ in range(excess):  # always from the part that is longest at that moment
        longest = max(sizes, key=lambda i: (sizes[i], -i))
        sizes[longest] -= 1
    dropped: set[int] = set()
    for i, own in tokens.items():
        first = 0
        if i == form.context and answers and sizes[i] < len(own):
            begin = starts[i] + answers[0].start
            end = begin + len(answers[0].text)
            held = [j for j, t in enumerate(own) if offsets[t][0] < end and offsets[t][1] > begin]
            if held and held[-1] >= sizes[i]:
                # Around the answer's middle token: whatever fits at all is then inside.
                first = min(max((held[0] + held[-1] + 1) // 2 - sizes[i] // 2, 0), len(own) - sizes[i])
        dropped.update(own[:first], own[first + sizes[i] :])
    return [t for t in range(len(owner)) if t not in dropped]


def _span(offsets: Offsets, begin: int, end: int, base: int) -> tuple[int, int]:
    """First and last position of the tokens that touch characters begin..end."""
    touching = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin and b > a]
    if not touching:
        raise DataError(f"characters {begin}..{end} have no token: the tokenizer drops this text")
    return base + touching[0], base + touching[-1]
