"""Record files read strictly: JSON Lines (also gzipped), TSV, CSV and Parquet.

Reading streams, so a file may be large; a single line may not. A line ends at a line feed and nowhere else:
U+2028, U+0085 and form feeds inside a text are data. TSV is read literally, a quote being a character like
any other; CSV follows the quoting rules of the `csv` module in strict mode.
"""

from __future__ import annotations

import csv
import gzip
import json
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bbprompt.errors import DataError, UsageError

__all__ = ["FORMATS", "MAX_LINE", "read_lines", "read_records", "read_texts"]

FORMATS = (".jsonl", ".jsonl.gz", ".tsv", ".csv", ".parquet")
"""File name endings that `read_records` understands."""

MAX_LINE = 50_000_000
"""Longest line, in bytes."""


def read_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a file, each with its line number.

    Args:
        path: A regular file with one of the endings in `FORMATS`; text is strict UTF-8, with or without a
            byte order mark. TSV and CSV start with a header line that names the fields, and all their values
            are strings.

    Yields:
        Line number counted from 1 (in Parquet the row, counted from 1) and the record.

    Raises:
        DataError: The file or a line cannot be read; the message starts with file and line.
        UsageError: Parquet without pyarrow.
    """
    file = Path(path)
    _check_regular(file)
    name = file.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl(file)
    if name.endswith(".tsv"):
        return _table(file, ((number, line.split("\t")) for number, line in _lines(file)))
    if name.endswith(".csv"):
        return _table(file, _csv_rows(file))
    if name.endswith(".parquet"):
        return _parquet(file)
    raise DataError(f"{file}: unknown kind of file; known endings are {', '.join(FORMATS)}")


def read_texts(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a plain text file, each with its number; lines of white space are left out.

    Args:
        path: A regular file in strict UTF-8, with or without a byte order mark.

    Raises:
        DataError: The file or a line cannot be read; the message starts with file and line.
    """
    return ((number, line) for number, line in read_lines(path) if line.strip())


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield every line of a plain text file, gzipped or not, each with its number.

    Args:
        path: As for `read_texts`.

    Raises:
        DataError: As `read_texts`.
    """
    file = Path(path)
    _check_regular(file)
    return _lines(file)


def _check_regular(file: Path) -> None:
    try:
        status = file.stat()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    # A pipe or a device could block or never end.
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{file}: not a regular file")
    if status.st_size == 0:
        raise DataError(f"{file}: the file is empty")


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, unpacked where it is gzipped, and name it in every reading error."""
    try:
        with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: damaged gzip data: {error}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def _lines(file: Path, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each line, without its line end unless that is asked for."""
    offset = number = 0
    with _opened(file) as stream:
        while raw := stream.readline(MAX_LINE + 1):
            number += 1
            if len(raw) > MAX_LINE:
                raise DataError(f"{file}:{number}: the line is longer than {MAX_LINE} bytes")
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                hint = _encoding_hint(raw, error.start, offset)
                where = f"{file}:{number}: not UTF-8 at byte {offset + error.start} of the file"
                raise DataError(f"{where}{hint}; convert the file to UTF-8") from None
            offset += len(raw)
            if number == 1:
                line = line.removeprefix("\ufeff")
            if not keep_ends:
                line = line.removesuffix("\n").removesuffix("\r")
            yield number, line


def _encoding_hint(raw: bytes, at: int, offset: int) -> str:
    if offset == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return " (it looks like UTF-16)"
    # Where one line reads as GBK from the broken byte on, the whole file most often is GBK.
    try:
        raw[at:].decode("gbk")
    except UnicodeDecodeError:
        return ""
    return " (it looks like GBK)"


def _jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(file):
        if not line.strip(" \t\r"):
            continue
        try:
            record = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{number}: not JSON at character {error.pos + 1}: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deep"
            raise DataError(f"{file}:{number}: not acceptable JSON: {reason}") from None
        if not isinstance(record, dict):
            raise DataError(f"{file}:{number}: a record must be a JSON object, not a {type(record).__name__}")
        yield number, record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _table(file: Path, rows: Iterable[tuple[int, list[str]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] = []
    for number, row in rows:
        if not header:
            header = row
            for name in header:
                if not name.strip() or header.count(name) > 1:
                    problem = "is blank" if not name.strip() else "stands twice"
                    raise DataError(f"{file}:{number}: the column {name[:60]!r} of the header {problem}")
            continue
        if len(row) != len(header):
            raise DataError(f"{file}:{number}: {len(row)} columns, but the header has {len(header)}")
        yield number, dict(zip(header, row, strict=True))


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line for _, line in _lines(file, keep_ends=True)), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{file}:{number}: not CSV: {error}") from None
        yield number, row


def _parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"{file}: reading Parquet needs pyarrow: pip install 'bbprompt[data]'") from None
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: damaged Parquet data after row {number}: {reason}") from None
