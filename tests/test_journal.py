"""The journal: what was acknowledged is there, a torn end is cut, all other damage is noticed."""

from __future__ import annotations

import errno
import logging
import random
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from depth import deep
from faultdisk import FaultDisk
from hypothesis import given, settings
from hypothesis import strategies as st

from bbprompt.errors import DiskError, JournalCorrupt
from bbprompt.store.journal import Journal, canonical_json

RUN = "0123456789abcdef"
RECORDS: list[dict[str, Any]] = [
    {"op": "reserve", "ids": ["a", "b"], "kind": "train"},
    {"op": "settle", "ids": ["a", "b"], "values": [{"loss": 0.1}, {"loss": 1e-300, "metric": 0.75}]},
    {"text": "two\nlines, a \x00, \u2028, Grüße, 你好", "deep": [[], {}, None, True, 2**70]},
    {"op": "reserve", "ids": ["c"], "kind": "dev"},
]


def written(path: Path, records: list[dict[str, Any]] = RECORDS, run: str = RUN) -> bytes:
    journal = Journal(path, run)
    for record in records:
        journal.append(record)
    journal.close()
    return path.read_bytes()


def opened(path: Path, run: str = RUN) -> list[dict[str, Any]]:
    journal = Journal(path, run)
    journal.close()
    return journal.records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.log"


def test_records_come_back_as_append_returned_them(path: Path) -> None:
    journal = Journal(path, RUN)
    returned = [journal.append(record) for record in RECORDS]
    journal.close()
    assert opened(path) == returned
    assert returned[1]["values"][0] == {"loss": (0.1).hex()}
    assert returned[2] == RECORDS[2]


def test_the_format_is_what_the_documentation_says(path: Path) -> None:
    data = written(path, [{"b": 0.5, "a": "ü"}])
    payload = rb'{"n":1,"record":{"a":"\u00fc","b":"0x1.0000000000000p-1"},"run":"0123456789abcdef"}'
    assert data.startswith(payload + b" ")
    assert len(data) == len(payload) + 1 + 8 + 1
    assert data.endswith(b"\n")


def test_a_cut_at_every_byte_leaves_a_prefix_that_can_be_continued(path: Path) -> None:
    data = written(path)
    lines = data.splitlines(keepends=True)
    full = opened(path)
    for size in range(len(data) + 1):
        disk, whole = FaultDisk(), data[:size].count(b"\n")
        disk.put(path, data[:size], durable=True)
        journal = Journal(path, RUN, disk)
        assert journal.records == full[:whole]
        assert disk.durable(path) == b"".join(lines[:whole])  # cut on the disk, before any append
        for record in RECORDS[whole:]:
            journal.append(record)
        assert disk.durable(path) == data


def test_a_torn_line_is_logged_and_its_cut_is_durable(caplog: pytest.LogCaptureFixture) -> None:
    disk, path = FaultDisk(), Path("/journal.log")
    Journal(path, RUN, disk).append({"x": 1})
    whole = disk.durable(path)
    disk.put(path, whole + b'{"n":2,"rec', durable=True)
    with caplog.at_level(logging.WARNING, "bbprompt"):
        Journal(path, RUN, disk)
    assert caplog.messages == ["/journal.log:2: cut a torn last line of 11 bytes"]
    assert disk.durable(path) == whole


@pytest.mark.parametrize("nuls", [b"\0" * 40, b"\0" * 40 + b'":1} 00000000\n'])
def test_blocks_that_never_reached_the_disk_count_as_torn(path: Path, nuls: bytes) -> None:
    data = written(path)
    path.write_bytes(data + nuls)
    assert len(opened(path)) == len(RECORDS)
    assert path.read_bytes() == data


def test_every_bit_flip_is_noticed_or_cuts_only_the_last_line(path: Path) -> None:
    data = written(path)
    full = opened(path)
    last = data.rindex(b"\n", 0, -1) + 1
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            disk = FaultDisk()
            disk.put(path, bytes(damaged), durable=True)
            if position < last:
                with pytest.raises(JournalCorrupt, match=r"journal\.log:\d: .* does not match its checksum"):
                    Journal(path, RUN, disk)
                assert disk.durable(path) == damaged  # nothing written
                continue
            with suppress(JournalCorrupt):
                assert Journal(path, RUN, disk).records == full[:-1]


def test_random_double_flips_never_change_a_record(path: Path) -> None:
    data = written(path)
    full = opened(path)
    random_ = random.Random(1)
    for _ in range(1000):
        damaged = bytearray(data)
        for bit in random_.sample(range(8 * len(data)), 2):
            damaged[bit // 8] ^= 1 << bit % 8
        disk = FaultDisk()
        disk.put(path, bytes(damaged), durable=True)
        try:
            assert Journal(path, RUN, disk).records == full[:-1]
        except JournalCorrupt:
            assert disk.durable(path) == damaged


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], 2),
        (lambda lines: [lines[0], lines[0], *lines[1:]], 2),
        (lambda lines: [*lines, lines[3]], 5),
        (lambda lines: lines[1:], 1),
        (lambda lines: [*lines[:2], lines[3]], 3),
        (lambda lines: [*lines[:2], b"\n", *lines[2:]], 3),
        (lambda lines: [*lines, b"\n"], 5),
        (lambda lines: [*lines[:2], lines[2][:20], lines[3]], 3),
    ],
)
def test_moved_repeated_and_removed_lines_are_named(path: Path, change: Any, line: int) -> None:
    lines = written(path).splitlines(keepends=True)
    damaged = b"".join(change(lines))
    path.write_bytes(damaged)
    with pytest.raises(JournalCorrupt, match=rf"journal\.log:{line}: this line .*backup"):
        opened(path)
    assert path.read_bytes() == damaged


def test_a_line_of_another_run_is_noticed(tmp_path: Path, path: Path) -> None:
    lines = written(path).splitlines(keepends=True)
    other = written(tmp_path / "other.log", run="feedfeedfeedfeed").splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], other[2], lines[3]]))
    with pytest.raises(JournalCorrupt, match=":3: this line belongs to run feedfeedfeedfeed"):
        opened(path)
    written(tmp_path / "odd.log", RECORDS[:1], run="two\nlines " + "x" * 99)
    with pytest.raises(JournalCorrupt, match=rf"belongs to run two lines {'x' * 30}, and manifest"):
        opened(tmp_path / "odd.log")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: data.replace(b"\n", b"\r\n"), "CR LF"),
        (lambda data: b"\xef\xbb\xbf" + data, "byte-order mark"),
        (lambda data: data.decode().encode("utf-16"), "byte-order mark"),
    ],
)
def test_editors_are_recognised(path: Path, change: Any, text: str) -> None:
    path.write_bytes(change(written(path)))
    with pytest.raises(JournalCorrupt, match=rf"journal\.log:1: .*{text}"):
        opened(path)


@pytest.mark.parametrize("payload", [b"[]", b'{"n":1,"run":"0123456789abcdef"}', b'"x"', b"{", b"[" * 10**5])
def test_a_right_checksum_on_nonsense_is_refused(path: Path, payload: bytes) -> None:
    path.write_bytes(b"%s %08x\n" % (payload, zlib.crc32(payload)))
    with pytest.raises(JournalCorrupt, match=":1: this line"):
        opened(path)


@pytest.mark.parametrize("operation", ["write journal.log", "sync journal.log"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_after_a_failed_append_the_journal_is_dead_and_touches_nothing(operation: str, code: int) -> None:
    path = Path("/journal.log")
    dry = FaultDisk()
    Journal(path, RUN, dry).append({"x": 1})
    disk = FaultDisk(len(dry.operations) + (1 if "write" in operation else 2), code)
    journal = Journal(path, RUN, disk)
    journal.append({"x": 1})
    with pytest.raises(DiskError, match="cannot"):
        journal.append({"x": 2})
    assert disk.operations[-1] == operation
    count = len(disk.operations)
    with pytest.raises(DiskError, match="closed after an earlier failure"):
        journal.append({"x": 3})
    assert len(disk.operations) == count  # above all: the fsync is not tried again
    journal.close()
    again = Journal(path, RUN, disk.rebooted("everything"))
    assert again.records == [{"x": 1}]


def test_an_interrupt_between_write_and_sync_kills_the_journal_too() -> None:
    class Interrupting(FaultDisk):
        def sync(self, file: Any) -> None:
            if len(self._open[file.descriptor].seen) > 0:
                raise KeyboardInterrupt
            super().sync(file)

    journal = Journal(Path("/journal.log"), RUN, Interrupting())
    with pytest.raises(KeyboardInterrupt):
        journal.append({"x": 1})
    with pytest.raises(DiskError):
        journal.append({"x": 1})


def test_what_a_killed_process_left_unsynced_is_synced_before_it_is_trusted() -> None:
    path = Path("/journal.log")
    dry = FaultDisk()
    Journal(path, RUN, dry).append({"x": 1})
    disk = FaultDisk()
    disk.put(path, dry.durable(path), durable=False)  # written, never synced
    assert Journal(path, RUN, disk).records == [{"x": 1}]
    assert disk.durable(path) == dry.durable(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_and_the_journal_lives_on(path: Path, number: float) -> None:
    journal = Journal(path, RUN)
    with pytest.raises(ValueError, match="finite"):
        journal.append({"x": [{"y": number}]})
    with pytest.raises(ValueError, match=r"finite|JSON compliant"):
        canonical_json({"x": number})
    journal.append({"x": 1})
    journal.close()
    journal.close()
    with pytest.raises(DiskError):
        journal.append({"x": 2})
    assert opened(path) == [{"x": 1}]


def test_a_closed_journal_holds_no_file_and_touches_nothing() -> None:
    disk, path = FaultDisk(), Path("/journal.log")
    journal = Journal(path, RUN, disk)
    journal.close()
    assert not disk._open
    count = len(disk.operations)
    with pytest.raises(DiskError, match="closed after an earlier failure"):
        journal.append({"x": 1})
    journal.close()
    assert len(disk.operations) == count


def test_a_failed_opening_closes_the_file() -> None:
    disk, path = FaultDisk(), Path("/journal.log")
    disk.put(path, b"nonsense\n", durable=True)
    with pytest.raises(JournalCorrupt):
        Journal(path, RUN, disk)
    assert not disk._open
    assert disk.durable(path) == b"nonsense\n"


_scalars = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
_values = st.recursive(_scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def _hexed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hexed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hexed(item) for item in value]
    return float.hex(value) if isinstance(value, float) else value


@settings(max_examples=deep(200), deadline=None)
@given(st.lists(st.dictionaries(st.text(), _values, max_size=4), max_size=5))
def test_any_records_survive_the_round_trip(records: list[dict[str, Any]]) -> None:
    disk, path = FaultDisk(), Path("/journal.log")
    journal = Journal(path, RUN, disk)
    for record in records:
        journal.append(record)
    journal.close()
    found = Journal(path, RUN, disk.rebooted("nothing")).records
    assert found == [_hexed(record) for record in records]


@settings(max_examples=deep(300), deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_comes_back_to_the_last_bit(number: float) -> None:
    record = Journal(Path("/journal.log"), RUN, FaultDisk()).append({"x": number})
    assert float.fromhex(record["x"]).hex() == number.hex()
