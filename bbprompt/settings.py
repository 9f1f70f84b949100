"""What the modules of settings share: frozen, strict about keys, and a few kinds of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Count", "Name", "Positive", "Settings"]

#: What a directory may be called after: no way leads out of the folder that it is made in.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Settings that were checked once and do not change; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
