"""Standard output: results only, one JSON object where `--json` asks for it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from bbprompt.errors import DiskError

__all__ = ["abandon", "command", "write", "write_json"]


def write(text: str) -> None:
    """Write a text and a line end to standard output.

    Raises:
        DiskError: It cannot be written, for instance because the reader of a pipe is gone.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        abandon()
        raise DiskError(f"standard output: cannot be written: {error.strerror or error}") from None


def write_json(value: Any) -> None:
    """Write a value as one line of JSON, in ASCII where standard output is not UTF-8."""
    plain = "utf" not in (getattr(sys.stdout, "encoding", None) or "").lower()
    write(json.dumps(value, ensure_ascii=plain, allow_nan=False))


def command(*parts: str | Path) -> str:
    """A bbprompt command that can be pasted into a shell; paths are written relative where they lie below."""
    return shlex.join(["bbprompt", *(part if isinstance(part, str) else _shown(part) for part in parts)])


def abandon() -> None:
    """Point standard output to nowhere: Python flushes it once more at its end and would complain."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _shown(path: Path) -> str:
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path.absolute())
