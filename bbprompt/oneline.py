"""Words of unknown origin, shown to a person: a server's, a file's, a user's."""

from __future__ import annotations

__all__ = ["one_line"]


_MOST = 4_000  # characters


def one_line(text: str) -> str:
    """The text as one line that a terminal shows as it is.

    White space becomes single spaces. What is not to be seen is written as its escape: control characters could move
    the cursor, colour what follows or end the line and so forge another, and marks of direction could turn it around.
    What is longer than a screen is cut.
    """
    words = " ".join(text.split())
    if len(words) > _MOST:
        words = f"{words[:_MOST]} ... and {len(words) - _MOST} characters more"
    if words.isprintable():
        return words
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
