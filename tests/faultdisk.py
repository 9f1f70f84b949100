"""An in-memory `bbprompt.store.disk.Disk` that fails where it is told to and forgets what was not made durable.

It keeps two states apart: what the running process sees (the page cache) and what a power cut would leave.
Every operation but ``close`` is counted; operation number ``fail_at`` (from 1) fails, either with an errno,
once or from then on, or with a `Crash`, after which nothing works any more. `rebooted` then gives the disk
that the next process finds, as one of four images:

* ``nothing``: only what was synced;
* ``everything``: all that was written (what a killed process leaves);
* ``prefix``: all names, and a share of the unsynced bytes of each file, half of them unless told otherwise;
* ``renamed``: all names, but only synced bytes, so an unsynced file under a new name is empty or old.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bbprompt.errors import RunLocked
from bbprompt.store.disk import File, disk_error

Image = Literal["nothing", "everything", "prefix", "renamed"]
ROOT = Path("/")
IMAGES: tuple[Image, ...] = ("nothing", "everything", "prefix", "renamed")


class Crash(BaseException):
    """The machine stops here. Not an ``Exception``: no code under test may catch it and go on."""


@dataclass(eq=False)
class Node:
    """The bytes of one file, as seen now and as safe from a power cut."""

    seen: bytes = b""
    durable: bytes = b""


class FaultDisk:
    """See the module; the parameters are the fault to come."""

    def __init__(self, fail_at: int | None = None, code: int | None = None, persistent: bool = False) -> None:
        self.fail_at, self.code, self.persistent = fail_at, code, persistent
        self.operations: list[str] = []
        self.space = 2**40
        self._seen: dict[Path, Node | None] = {}  # None is a folder; the root is always there
        self._durable: dict[Path, Node | None] = {}
        self._open: dict[int, Node] = {}
        self._locks: dict[Path, int] = {}

    # For tests to look and to meddle; none of this is counted.

    @property
    def failed(self) -> bool:
        """Whether the fault has happened."""
        return self.fail_at is not None and len(self.operations) >= self.fail_at

    def files(self) -> dict[str, bytes]:
        """The names and bytes that a process sees now, without those of lock files."""
        return {str(path): node.seen for path, node in self._seen.items() if node and path.suffix != ".lock"}

    def durable(self, path: Path) -> bytes:
        """What a power cut would leave of a file at worst."""
        node = self._durable.get(path)
        return node.durable if node else b""

    def put(self, path: Path, data: bytes, *, durable: bool) -> None:
        """Give a file this content, for better or worse."""
        node = self._seen[path] = self._seen.get(path) or Node()
        node.seen = data
        if durable:
            node.durable = data
            self._durable[path] = node

    def rebooted(self, image: Image, share: float = 0.5) -> FaultDisk:
        """The disk that the next process finds after a crash; without faults."""
        names = self._durable if image == "nothing" else self._seen
        disk = FaultDisk()
        for path, node in names.items():
            if path.parent != ROOT and path.parent not in names:
                continue
            if node is None:
                disk._seen[path] = None
                continue
            if image == "everything":
                data = node.seen
            elif image == "prefix" and node.seen.startswith(node.durable):
                data = node.seen[: len(node.durable) + int(share * (len(node.seen) - len(node.durable)))]
            else:
                data = node.durable
            disk._seen[path] = Node(data, data)
        disk._durable = dict(disk._seen)
        return disk

    # The Disk protocol.

    def real(self, path: Path) -> Path:
        self._step("real", path)
        return path

    def exists(self, path: Path) -> bool:
        self._step("exists", path)
        return path == ROOT or path in self._seen

    def names(self, folder: Path) -> list[str]:
        self._step("names", folder)
        return sorted(path.name for path in self._seen if path.parent == folder)

    def free(self, path: Path) -> int:
        self._step("free", path)
        return self.space

    def make_folder(self, path: Path) -> None:
        self._step("make_folder", path)
        self._seen[path] = None

    def read(self, path: Path) -> bytes:
        self._step("read", path)
        node = self._seen[path]
        assert node is not None
        return node.seen

    def open(self, path: Path, *, fresh: bool) -> File:
        self._step("open", path)
        file = self._handle(path)
        if fresh:
            self._open[file.descriptor].seen = b""
        return file

    def lock(self, path: Path) -> File:
        self._step("lock", path)
        if path in self._locks:
            raise RunLocked(f"{path.parent}: locked")
        file = self._handle(path)
        self._locks[path] = file.descriptor
        return file

    def write(self, file: File, data: bytes) -> None:
        node = self._open[file.descriptor]
        try:
            self._step("write", file.path)
        except Exception:
            node.seen += data[: len(data) // 2]  # a full disk takes what it can
            raise
        node.seen += data

    def truncate(self, file: File, size: int) -> None:
        self._step("truncate", file.path)
        node = self._open[file.descriptor]
        node.seen = node.seen[:size]

    def sync(self, file: File) -> None:
        node = self._open[file.descriptor]
        try:
            self._step("sync", file.path)
        except Exception:
            node.seen = node.durable  # the kernel drops the pages that it could not write
            raise
        node.durable = node.seen

    def close(self, file: File) -> None:
        self._open.pop(file.descriptor, None)
        if self._locks.get(file.path) == file.descriptor:
            del self._locks[file.path]

    def replace(self, source: Path, target: Path) -> None:
        self._step("replace", target)
        self._seen[target] = self._seen.pop(source)

    def remove(self, path: Path) -> None:
        self._step("remove", path)
        del self._seen[path]

    def sync_folder(self, folder: Path) -> None:
        self._step("sync_folder", folder)
        elsewhere = {path: node for path, node in self._durable.items() if path.parent != folder}
        here = {path: node for path, node in self._seen.items() if path.parent == folder}
        self._durable = {**elsewhere, **here}

    def _handle(self, path: Path) -> File:
        assert path in self._seen or path.parent == ROOT or path.parent in self._seen, "no such folder"
        node = self._seen.setdefault(path, Node())
        assert node is not None
        descriptor = max(self._open, default=2) + 1
        self._open[descriptor] = node
        return File(path, descriptor)

    def _step(self, name: str, path: Path) -> None:
        self.operations.append(f"{name} {path.name}")
        number = len(self.operations)
        if self.fail_at is None or number < self.fail_at:
            return
        if self.code is None:
            raise Crash(f"operation {number}: {name} {path}")
        if number == self.fail_at or self.persistent:
            raise disk_error(OSError(self.code, os.strerror(self.code)), name, path)
