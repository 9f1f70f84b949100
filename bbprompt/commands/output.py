"""Where results go: standard output, one JSON object where `--json` asks for it; and files, whole or not at all."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bbprompt.errors import DiskError

__all__ = ["abandon", "command", "whole_file", "write", "write_json"]


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


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """A UTF-8 stream whose file appears whole or not at all; pipes and devices are written directly.

    Raises:
        DiskError: It cannot be written; what stood there before is kept.
    """
    try:
        if path.exists() and not path.is_file():
            with path.open("w", encoding="utf-8") as stream:
                yield stream
        else:
            yield from _replaced(path)
    except OSError as error:
        raise DiskError(
            f"{path}: cannot be written: {error.strerror or error}; free that place or name another"
        ) from None


def _replaced(path: Path) -> Iterator[IO[str]]:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


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
