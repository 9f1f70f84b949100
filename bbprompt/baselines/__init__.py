"""What a user would pick instead of tuning a prompt: cheap methods on the pooled states of the frozen model."""

from __future__ import annotations

__all__: list[str] = []
