"""Checked values out of one record: nothing is coerced, and every complaint says what was found.

The messages are fragments: whoever reads the file puts file and line in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bbprompt.errors import DataError
from bbprompt.tasks.example import Answer

__all__ = ["answers", "choices", "index", "listed", "short", "text"]

_LIST_JOINER = "，"


def text(record: Mapping[str, Any], name: str) -> str:
    """Return a field's text; a list of strings, such as keywords, is joined with a full-width comma.

    Raises:
        DataError: The field is missing, blank, or neither a string nor a list of strings.
    """
    if name not in record:
        raise DataError(f"the field {name!r} is missing; the record has {listed(list(record))}")
    value = record[name]
    if not isinstance(value, list):
        return _string(value, f"the field {name!r}")
    if not value:
        raise DataError(f"the field {name!r} is an empty list")
    return _LIST_JOINER.join(_string(item, f"item {i} of {name!r}") for i, item in enumerate(value))


def choices(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the field `choices`, at least two strings.

    Raises:
        DataError: It is not that.
    """
    value = record.get("choices")
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"the field 'choices' must be a list of at least 2 strings, got {short(value)}")
    return tuple(_string(choice, f"choice {i}") for i, choice in enumerate(value))


def index(record: Mapping[str, Any], n_choices: int) -> int:
    """Return the field `label` of a choice record, counted from 0.

    Raises:
        DataError: It is no whole number, or there is no such choice.
    """
    value = record.get("label")
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"the label must be the index of a choice, a whole number, got {short(value)}")
    if not 0 <= value < n_choices:
        raise DataError(f"the label {short(value)} is out of range; there are {n_choices} choices, counted from 0")
    return value


def answers(record: Mapping[str, Any], context: str) -> tuple[Answer, ...]:
    """Return the field `answers`, each of which stands in the context at its offset.

    Args:
        record: Holds `answers`, a list of `{"text": str, "start": int}`.
        context: What the offsets count in, by code points.

    Raises:
        DataError: There is none, or one is malformed or not at its place.
    """
    value = record.get("answers")
    if not isinstance(value, list) or not value:
        raise DataError(f"the field 'answers' must be a list of at least one answer, got {short(value)}")
    result = []
    for i, answer in enumerate(value):
        if not isinstance(answer, dict) or "text" not in answer or "start" not in answer:
            raise DataError(f"answer {i} must have 'text' and 'start', got {short(answer)}")
        wanted, start = _string(answer["text"], f"the text of answer {i}"), answer["start"]
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise DataError(f"the start of answer {i} must be a character offset, got {short(start)}")
        found = context[start : start + len(wanted)]
        if found != wanted:
            where = f"at character {start} of the context stands {short(found)}"
            raise DataError(f"answer {i} is {short(wanted)}, but {where}")
        result.append(Answer(wanted, start))
    return tuple(result)


def listed(values: Sequence[Any]) -> str:
    """Return up to 12 values for a message, and how many more there are."""
    more = f" and {len(values) - 12} more" if len(values) > 12 else ""
    return ", ".join(short(value) for value in values[:12]) + more if values else "nothing"


def short(value: Any) -> str:
    """Return a value for a message: control characters escaped, at most 60 characters."""
    shown = repr(value[:100] if isinstance(value, str) else value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {short(value)}, not a string")
    if not value.strip():
        raise DataError(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"half a surrogate pair at character {error.start}"
        raise DataError(f"{what} holds {where}, which is not text") from None
    return value
