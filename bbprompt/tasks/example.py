"""The values that flow through the product: an example, and the form in which a model reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Answer", "Example", "Form", "Part", "input_uid"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One accepted answer of an extraction example.

    Attributes:
        text: The answer, as it stands in the context.
        start: Character offset (code points) of its first character in the context.
    """

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Example:
    """One record of a task, checked.

    Attributes:
        fields: What the template reads, by field name, such as `{"text_a": ..., "text_b": ...}`.
        options: The option words in order; empty for extraction.
        label: Index into `options`; -1 where there is none (extraction, unlabelled input).
        answers: The accepted answers of an extraction example; empty otherwise.
        uid: First 16 hex digits of a SHA-256 of the input (fields, and the options where each example has its
            own), without the label: two examples share it exactly if a model reads the same.
    """

    fields: Mapping[str, str]
    options: tuple[str, ...]
    label: int
    answers: tuple[Answer, ...]
    uid: str


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a form.

    Attributes:
        text: The piece, literally.
        cut: Whether it may be shortened from the right when the whole does not fit the model.
    """

    text: str
    cut: bool


@dataclass(frozen=True, slots=True)
class Form:
    """An example written out for a model: the parts in order, then the options.

    Attributes:
        parts: Literal pieces of the template and field contents, in order.
        options: The option words that follow the parts; empty for extraction.
        context: Index of the part that an extraction answer lies in; -1 otherwise.
        second: Where two texts are compared, each by itself: index of the part that the second begins with; -1
            otherwise.
        same: Then the option that means that both say the same, the first or the last; from there on each option means
            less alike. -1 otherwise.
        gap: Index of the part that a gap stands before (the number of parts for one at the end), which a language
            model is to fill with an option; -1 where there is none.
    """

    parts: tuple[Part, ...]
    options: tuple[str, ...]
    context: int
    second: int = -1
    same: int = -1
    gap: int = -1

    @property
    def grades(self) -> tuple[float, ...]:
        """Where texts are compared, how alike each option means, evenly from 1 ("same") to -1; else empty."""
        if self.second < 0:
            return ()
        last = len(self.options) - 1
        return tuple(1.0 - 2.0 * abs(option - self.same) / last for option in range(last + 1))


def input_uid(fields: Mapping[str, str], options: Sequence[str] = ()) -> str:
    """Return the identity of an input: equal for equal content, whatever the order of the fields.

    Args:
        fields: Field contents by name.
        options: The options, where they belong to the example and not to the task.
    """
    digest = hashlib.sha256()
    # Each string goes in behind its length, so that no two different inputs give the same bytes.
    for text in (
        str(len(fields)),
        *(piece for name in sorted(fields) for piece in (name, fields[name])),
        *options,
    ):
        raw = text.encode("utf-8")
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.hexdigest()[:16]
