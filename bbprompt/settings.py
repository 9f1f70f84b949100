"""What the modules of settings share: frozen, strict about keys, and a few kinds of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["BatchTokens", "Count", "Name", "Positive", "Settings", "tokens_at_once"]

#: What a directory may be called after: no way leads out of the folder that it is made in.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def tokens_at_once(given: object) -> int | None:
    """A number of tokens, also as text; None for "auto".

    Raises:
        ValueError: It is neither.
    """
    if given is None or given == "auto":
        return None
    number = int(given) if isinstance(given, str) and given.isascii() and given.isdigit() else given
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"expected a number of tokens from 1 on, or auto, got {given!r}")
    return number


BatchTokens = Annotated[int | None, BeforeValidator(tokens_at_once)]


class Settings(BaseModel):
    """Settings that were checked once and do not change; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
