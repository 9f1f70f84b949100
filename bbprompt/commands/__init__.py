"""The commands of the terminal, one module each; what is heavy is imported inside the functions."""

from __future__ import annotations

__all__: list[str] = []
