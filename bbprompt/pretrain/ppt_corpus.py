"""Raw text as a stream of documents and their sentences; a window of documents is all that is ever held."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bbprompt.errors import DataError
from bbprompt.tasks.recordfile import read_lines

__all__ = ["Document", "documents", "sentences", "usable", "windows"]

#: A document's sentences in order.
Document = tuple[str, ...]

_CLOSING = "\"'”’」』）)】》"
_ENDS = {
    # Chinese needs no space behind a full stop; a closing quote belongs to the sentence.
    "zh": re.compile(rf"(?<=[。！？!?…])(?![。！？!?…{_CLOSING}])|(?<=[。！？!?…][{_CLOSING}])(?![{_CLOSING}])"),
    "en": re.compile(rf"(?<=[.!?])\s+(?![.!?)\]])|(?<=[.!?][{_CLOSING}])\s+"),
}


def documents(files: Iterable[str | Path]) -> Iterator[tuple[str, list[str]]]:
    """Yield each document of the files: where it begins, and its lines.

    One of each file in turn, so that whoever stops early has read from all of them.

    Args:
        files: Text files, `.gz` ones unpacked on the way; blank lines part documents.

    Raises:
        DataError: A file cannot be read or is not UTF-8; names file and line.
    """
    readers = [_documents(file) for file in files]
    while readers:
        for reader in tuple(readers):
            if (document := next(reader, None)) is None:
                readers.remove(reader)
            else:
                yield document


def _documents(file: str | Path) -> Iterator[tuple[str, list[str]]]:
    lines: list[str] = []
    where, found = "", False
    for number, line in read_lines(file):
        if line.strip():
            where = where if lines else f"{file}:{number}"
            lines.append(line.strip())
        elif lines:
            yield where, lines
            lines, found = [], True
    if lines:
        yield where, lines
    elif not found:
        raise DataError(f"{file}: there is no text in it")


def sentences(lines: Iterable[str], language: str) -> Document:
    """Cut lines into sentences; the end of a line ends one too.

    Args:
        lines: Of one document.
        language: "zh" or "en".
    """
    return tuple(piece.strip() for line in lines for piece in _ENDS[language].split(line) if piece.strip())


def usable(document: Sequence[str], size: Callable[[str], int], least: int = 5, count: int = 5) -> Document | None:
    """The sentences of at least `least` tokens, or None where there are fewer than `count` of them (PPT's code).

    What is left counts as adjacent where only shorter sentences stood between.
    """
    kept = tuple(dict.fromkeys(sentence for sentence in document if size(sentence) >= least))
    return kept if len(kept) >= count else None


def windows(
    stream: Iterable[Document], size: int, rng: np.random.Generator
) -> Iterator[tuple[int, Document, list[Document]]]:
    """Yield every document once, in an order drawn within a window, with the others of the window.

    Args:
        stream: Documents, of which at most `size` are held.
        size: At least 2.
        rng: Where chance comes from.

    Yields:
        Number of the document in the stream, the document, and others to take negatives from.
    """
    held: list[tuple[int, Document]] = []

    def take() -> tuple[int, Document, list[Document]]:
        at = int(rng.integers(len(held)))
        number, document = held[at]
        return number, document, [other for i, (_, other) in enumerate(held) if i != at]

    for number, document in enumerate(stream):
        if len(held) == size:
            chosen = take()
            yield chosen
            held = [item for item in held if item[0] != chosen[0]]
        held.append((number, document))
    # The last ones stay among the others to the end, or the very last would have none.
    for at in rng.permutation(len(held)).tolist():
        number, document = held[at]
        yield number, document, [other for i, (_, other) in enumerate(held) if i != at]
