"""A run directory: fixed file names, one writer at a time, nothing half written.

======================  ===============================================================================
``manifest.json``       what the run is; written first, never changed
``journal.log``         every reserved and settled call; the truth (see `bbprompt.store.journal`)
``curve.csv``           progress, derived from the journal: a resumed run writes it anew from the first row
``prompt.safetensors``  what was tuned
``result.json``         written last: it exists only when the run is finished
``run.lock``            held by the process that works on the run; its content is that process's pid
======================  ===============================================================================

The run id is a digest of the manifest. It stands in the manifest itself and in every line of the journal, so
a changed manifest, or a journal that belongs to another one, is noticed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bbprompt.errors import DiskError, ResumeMismatch, UsageError
from bbprompt.store.disk import Disk, File, RealDisk
from bbprompt.store.journal import Journal, canonical_json

__all__ = ["CHECKPOINT", "CURVE", "CURVE_COLUMNS", "JOURNAL", "LOCK", "MANIFEST", "PROMPT", "RESULT", "RunDirectory"]

MANIFEST = "manifest.json"
JOURNAL = "journal.log"
CURVE = "curve.csv"
PROMPT = "prompt.safetensors"
CHECKPOINT = "checkpoint.safetensors"
RESULT = "result.json"
LOCK = "run.lock"
CURVE_COLUMNS = ("calls", "stage", "train_loss", "best_dev", "seconds", "oracle_seconds")

_OWN_WAY = (MANIFEST, JOURNAL, CURVE, LOCK)  # these are not for write_bytes
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LEAST_FREE = 16 * 2**20  # bytes; a run of 8,000 calls needs about a tenth of it beside its prompt


class RunDirectory:
    """One run on disk. Make it with `create` or `open`, and close it, or use it in a ``with`` block.

    Attributes:
        path: the directory, absolute, all links resolved.
        manifest: what `create` was given, as JSON reads it back.
        run_id: 16 hex digits, a digest of the manifest.
    """

    path: Path
    manifest: dict[str, Any]
    run_id: str

    def __init__(self, path: Path, disk: Disk, lock: File | None) -> None:
        """For `create` and `open` only."""
        self.path = path
        self._disk = disk
        self._lock = lock
        self._curve: File | None = None
        self._journal: Journal | None = None
        self._created = False

    @classmethod
    def create(cls, path: Path | str, manifest: Mapping[str, Any], disk: Disk | None = None) -> Self:
        """Make the directory, lock it and write its manifest.

        Args:
            path: a directory that does not exist or is empty; missing parents are made.
            manifest: what the run is, as JSON can hold it; it must not have a key ``run_id``.
            disk: where the directory lies; the real file system by default.

        Raises:
            UsageError: if the directory holds something already, or a link leads elsewhere.
            DiskError: if less than 16 MB are free or anything cannot be written.
            RunLocked: if another process is just making the same run.
        """
        if "run_id" in manifest:
            raise ValueError("the key run_id of a manifest is taken")
        disk = disk if disk is not None else RealDisk()
        path = _located(Path(path), disk)
        missing = [folder for folder in (path, *path.parents) if not disk.exists(folder)]
        if not missing:
            _refuse_used(path, disk)
        free = disk.free(missing[-1].parent if missing else path)
        if free < _LEAST_FREE:
            raise DiskError(
                f"{path}: cannot start a run: {free / 2**20:.1f} MB are free and it takes 16; "
                "free some space or choose another --run-dir"
            )
        for folder in reversed(missing):
            disk.make_folder(folder)
            disk.sync_folder(folder.parent)
        run = cls(path, disk, disk.lock(path / LOCK))
        try:
            _refuse_used(path, disk)  # again: until the lock was ours, another process could have made it
            run.manifest = json.loads(_pretty(manifest))
            run.run_id = _run_id(run.manifest)
            # In the order given, not sorted: it is read by people too.
            run._put(MANIFEST, _pretty({"run_id": run.run_id, **manifest}))
            run._created = True
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path | str, disk: Disk | None = None, *, writable: bool = True) -> Self:
        """Open an existing run.

        Args:
            path: its directory.
            disk: where the directory lies; the real file system by default.
            writable: take the lock and remove what a crash left half written. False takes no lock and touches
                nothing: for readers of a run, which may be many at once.

        Raises:
            UsageError: if there is no run, or a link leads elsewhere.
            DiskError: if the manifest cannot be read or was changed.
            RunLocked: if another process works on this run.
        """
        disk = disk if disk is not None else RealDisk()
        path = _located(Path(path), disk)
        if not disk.exists(path):
            raise UsageError(f"{path}: there is no such run directory; check the path")
        if MANIFEST not in disk.names(path):
            raise UsageError(
                f"{path}: no {MANIFEST} in it, so it is no run or died before its first call; "
                "check the path or start with `bbprompt tune`"
            )
        run = cls(path, disk, disk.lock(path / LOCK) if writable else None)
        try:
            run.manifest = _parsed_manifest(path / MANIFEST, disk.read(path / MANIFEST))
            run.run_id = _run_id(run.manifest)
            if writable:
                for name in filter(_is_temporary, disk.names(path)):
                    disk.remove(path / name)
        except BaseException:
            run.close()
            raise
        return run

    def check_manifest(self, current: Mapping[str, Any]) -> None:
        """Compare the manifest with what a run started here and now would have.

        Raises:
            ResumeMismatch: naming the first dotted key that differs, and both values.
        """
        then, now = dict(_leaves(self.manifest)), dict(_leaves(json.loads(canonical_json(current))))
        for key in {**then, **now}:
            if then.get(key) != now.get(key):
                name = _short(json.dumps(key)[1:-1])  # whoever wrote the manifest chose it: one line, and short
                raise ResumeMismatch(
                    f"{self.path / MANIFEST}: {name} was {_short(then.get(key))} when the run began and is "
                    f"{_short(now.get(key))} now; resume with what it began with, or start a new run"
                )

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return self.holds(RESULT)

    def holds(self, name: str) -> bool:
        """Whether the run has a file of this name."""
        return self._disk.exists(self.path / name)

    def journal(self) -> Journal:
        """The journal of this run, opened at the first call; it is closed with the directory."""
        self._must_be_writable()
        if self._journal is None:
            self._journal = Journal(self.path / JOURNAL, self.run_id, self._disk)
        return self._journal

    def append_curve(
        self, calls: int, stage: str, train_loss: float, best_dev: float | None, seconds: tuple[float, float]
    ) -> None:
        """Add a row to the curve; the first row after opening the directory begins the file anew.

        The curve is not made durable row by row: a resumed run replays its journal and so writes every row
        again. It is made durable before ``result.json`` is written.

        Args:
            calls: train and dev calls settled so far.
            stage: name of the stage.
            train_loss: the stage's best train loss so far.
            best_dev: the best dev metric so far as a fraction, or None before the first dev call.
            seconds: wall time of the run, all its parts together, and how much of it was in the model.
        """
        self._must_be_writable()
        if self._curve is None:
            self._curve = self._disk.open(self.path / CURVE, fresh=True)
            self._disk.write(self._curve, _row(CURVE_COLUMNS))
        self._disk.write(self._curve, _row((calls, stage, train_loss, best_dev, *(round(each, 3) for each in seconds))))

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file atomically and durably; see `write_bytes`."""
        self.write_bytes(name, _pretty(value))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file atomically and durably: at any moment it is the old one or the new one, whole.

        Args:
            name: a plain name such as ``prompt.safetensors``. Write ``result.json`` last: it ends the run.
            data: the whole content.

        Raises:
            DiskError: if it may not be durable.
        """
        self._must_be_writable()
        if not _NAME.fullmatch(name) or name in _OWN_WAY:
            raise ValueError(f"{name!r} is not a name that can be written here")
        if name == RESULT:
            self._close_curve()
        self._put(name, data)

    def read_bytes(self, name: str) -> bytes:
        """The content of one file of the run; raises `DiskError`, also where it is missing."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name that can be read here")
        return self._disk.read(self.path / name)

    def remove(self, name: str) -> None:
        """Remove a file that `write_bytes` wrote, if it is there; raises `DiskError` where that fails."""
        self._must_be_writable()
        if not _NAME.fullmatch(name) or name in _OWN_WAY:
            raise ValueError(f"{name!r} is not a name that can be removed here")
        if self.holds(name):
            self._disk.remove(self.path / name)
            self._disk.sync_folder(self.path)

    def withdraw(self) -> None:
        """Undo `create` for a run that came to nothing, so that the directory may be used again; close it then.

        Only where this very process made the run and no row of the curve stands: then all that is lost is calls that
        the same run would ask for again and fail at.

        Raises:
            DiskError: A file cannot be removed.
        """
        self._must_be_writable()
        if not self._created or self._curve is not None or self.holds(CURVE):
            return
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        for name in (JOURNAL, MANIFEST):  # the manifest last: a journal alone would be no run and no free directory
            if self.holds(name):
                self._disk.remove(self.path / name)
                self._disk.sync_folder(self.path)

    def close(self) -> None:
        """Close all files and give the lock back; closing twice is harmless."""
        if self._journal is not None:
            self._journal.close()
        for file in (self._curve, self._lock):
            if file is not None:
                self._disk.close(file)
        self._journal = self._curve = self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _must_be_writable(self) -> None:
        if self._lock is None:
            raise ValueError(f"{self.path} is closed or was opened for reading only")

    def _put(self, name: str, data: bytes) -> None:
        temporary = self.path / f".{name}.tmp"
        file = self._disk.open(temporary, fresh=True)
        try:
            self._disk.write(file, data)
            self._disk.sync(file)  # before the rename: a name must never be safer than its bytes
        finally:
            self._disk.close(file)
        self._disk.replace(temporary, self.path / name)
        self._disk.sync_folder(self.path)

    def _close_curve(self) -> None:
        if self._curve is not None:
            self._disk.sync(self._curve)
            self._disk.close(self._curve)
        self._curve = None


def _located(path: Path, disk: Disk) -> Path:
    """The real path of a run directory, which lies inside the folder it is named in.

    A link beside the runs, such as ``latest``, may lead to one of them, and not to anywhere else.
    """
    if "\0" in str(path):
        raise UsageError("--run-dir must not contain a NUL character")
    real = disk.real(path)
    if path.name in ("", ".."):  # the current folder or one above it: no link can be its last part
        return real
    folder = disk.real(path.parent)
    if folder not in real.parents:
        raise UsageError(f"{path}: a link leads out of its folder, to {real}; name that directory instead")
    return real


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _refuse_used(path: Path, disk: Disk) -> None:
    """Raise unless the folder is empty, or left behind by a start that died before it wrote its manifest."""
    found = [name for name in disk.names(path) if name != LOCK and not _is_temporary(name)]
    if MANIFEST in found:
        raise UsageError(
            f"{path}: this run was begun already; go on with `bbprompt resume {path}` or choose another --run-dir"
        )
    if found:
        raise UsageError(
            f"{path}: not empty ({found[0]}) and not a run that `bbprompt resume` could go on with; "
            "choose another --run-dir"
        )


def _run_id(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(manifest)).hexdigest()[:16]


def _parsed_manifest(path: Path, data: bytes) -> dict[str, Any]:
    """The manifest without its run id, which must fit; raises `DiskError`."""
    try:
        manifest = json.loads(data)
        found = manifest.pop("run_id")
        fits = found == _run_id(manifest)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise DiskError(
            f"{path}: damaged or edited: its run_id does not fit its content; restore it or start a new run"
        )
    return dict(manifest)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and JSON text of everything in a nested value, in order."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else ()
    if not items:
        yield prefix, canonical_json(value).decode("ascii")
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _short(text: str | None) -> str:
    if text is None:
        return "absent"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _pretty(value: object) -> bytes:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode("utf-8", "backslashreplace")  # a lone surrogate becomes its JSON escape


def _row(cells: tuple[object, ...]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode()
