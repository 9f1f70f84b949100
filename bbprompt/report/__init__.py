"""Reports: one self-contained HTML page of a run, a sweep or a prompt artifact."""

from __future__ import annotations

__all__: list[str] = []
