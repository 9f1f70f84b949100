"""The append-only journal: what a run did, one checksummed line a record.

A line is canonical JSON, a space, the CRC32 of that JSON in eight hex digits, and a newline::

    {"n":7,"record":{...},"run":"3f1c..."} 9ae0f1c2

The checksum covers the line number ``n`` and the run id, so lines that were swapped, repeated, removed or
brought in from another run are noticed as surely as a flipped bit. Floats are written as ``float.hex()``:
what is read back is the same number to the last bit.

`Journal.append` returns only when the line is durable. Whatever goes wrong on the way, the journal is dead: a
failed ``fsync`` may have dropped the bytes, and a second one that "succeeds" proves nothing. A line that was
torn by a crash is always the last one and was never acknowledged; it is cut when the journal is opened again.
"""

from __future__ import annotations

import codecs
import json
import logging
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bbprompt.errors import DiskError, JournalCorrupt
from bbprompt.store.disk import Disk, File, RealDisk

__all__ = ["Journal", "canonical_json"]

_log = logging.getLogger("bbprompt")
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_RESTORE = "restore the file from a backup or start again in a new --run-dir"


def canonical_json(value: object) -> bytes:
    """The one spelling of a value: sorted keys, no spaces, ASCII, no NaN or infinity.

    Raises:
        ValueError: for a float that is not finite.
        TypeError: for what JSON cannot hold.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def _exact(value: Any) -> Any:
    """The same value with every float as its ``float.hex()`` string."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot stand in a journal: only finite numbers can")
        return value.hex()
    if isinstance(value, Mapping):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    return value


def _line(number: int, run_id: str, record: Mapping[str, Any]) -> bytes:
    payload = canonical_json({"n": number, "record": record, "run": run_id})
    return b"%s %08x\n" % (payload, zlib.crc32(payload))


def _checked(line: bytes, number: int, run_id: str) -> dict[str, Any]:
    """The record of one line without its newline; a ``ValueError`` says what is wrong with it."""
    payload, _, checksum = line.rpartition(b" ")
    if checksum != b"%08x" % zlib.crc32(payload):
        if line.endswith(b"\r"):
            raise ValueError("ends in CR LF: an editor or a file transfer has converted the line ends")
        raise ValueError("does not match its checksum")
    try:
        entry = json.loads(payload)
    except RecursionError:
        raise ValueError("is nested too deep for a journal line") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("record"), dict):
        raise ValueError("is not a journal line")
    if entry.get("run") != run_id:
        raise ValueError(f"belongs to run {_short(entry.get('run'))}, and manifest.json says this is run {run_id}")
    if entry.get("n") != number:
        raise ValueError(f"carries number {_short(entry.get('n'))}: lines were removed, repeated or moved")
    record: dict[str, Any] = entry["record"]
    return record


def _short(value: object) -> str:
    """A value for a message: one line, at most 40 characters."""
    return " ".join(str(value).split())[:40]


def _verified(path: Path, run_id: str, data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records of a journal and the number of bytes that hold them; what lies behind is a torn line."""
    if data.startswith(_BYTE_ORDER_MARKS):
        raise JournalCorrupt(f"{path}:1: starts with a byte-order mark: an editor has changed it; {_RESTORE}")
    *lines, tail = data.split(b"\n")
    if lines and not tail and b"\0" in lines[-1]:
        lines.pop()  # torn as well: blocks of the last write that never reached the disk read as NULs
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_checked(line, number, run_id))
        except ValueError as error:
            raise JournalCorrupt(f"{path}:{number}: this line {error}; {_RESTORE}") from error
    return records, sum(len(line) + 1 for line in lines)


class Journal:
    """The journal of one run, open for appending; used by one thread of the one process that holds the lock.

    Attributes:
        path: the file.
        records: what the file held when it was opened, in order; ``records[i]`` stood in line ``i + 1``.
    """

    def __init__(self, path: Path, run_id: str, disk: Disk | None = None) -> None:
        """Open or create a journal, check every line, and cut a torn last one.

        Args:
            path: the file; its folder must exist.
            run_id: the run that every line must belong to.
            disk: where the file lies; the real file system by default.

        Raises:
            JournalCorrupt: for damage anywhere but in a torn last line; nothing is written then.
            DiskError: when the file cannot be read or written.
        """
        self.path = path
        self._run_id = run_id
        self._disk = disk if disk is not None else RealDisk()
        self._file: File | None = (file := self._disk.open(path, fresh=False))
        try:
            data = self._disk.read(path)
            self.records, end = _verified(path, run_id, data)
            if end < len(data):
                _log.warning("%s:%d: cut a torn last line of %d bytes", path, len(self.records) + 1, len(data) - end)
                self._disk.truncate(file, end)
            # A killed process may have left lines that are written but not durable: trust none before this.
            self._disk.sync(file)
            self._disk.sync_folder(path.parent)
        except BaseException:
            self._disk.close(file)
            raise
        self._count = len(self.records)
        self._alive = True

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write one record as one line and make it durable.

        Args:
            record: what JSON can hold, with finite floats.

        Returns:
            The record as a later reader will find it: floats as ``float.hex()`` strings.

        Raises:
            DiskError: if the line may not be durable, and from then on for every further call.
            ValueError: for a float that is not finite; the journal lives on.
        """
        line = _line(self._count + 1, self._run_id, _exact(record))
        if self._file is None or not self._alive:
            raise DiskError(
                f"{self.path}: closed after an earlier failure, so nothing more is written; "
                "mend the disk, then go on with `bbprompt resume`"
            )
        self._alive = False  # and so it stays if anything below fails, an interrupt included
        self._disk.write(self._file, line)
        self._disk.sync(self._file)
        self._alive = True
        self._count += 1
        return _checked(line[:-1], self._count, self._run_id)

    def close(self) -> None:
        """Close the file; what was appended is durable already. Closing twice is harmless."""
        if self._file is not None:
            self._disk.close(self._file)
        self._file = None
