"""One run of a sweep as a process of its own, and what its directory says of it.

The process is handed its settings in a file and stops in good order when the pipe to its standard input is closed,
so that a sweep that is killed takes its runs along.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from bbprompt.errors import DiskError
from bbprompt.store.disk import Disk, RealDisk
from bbprompt.store.rundir import CURVE, LOCK, MANIFEST, RESULT
from bbprompt.sweep.experiment import Cell

__all__ = ["Job", "LocalJob", "Progress", "begun", "finished", "locked", "progress", "put", "start_local"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_TAIL = 4096  # bytes; a row of a curve and the last lines of a log are far shorter


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def stop(self) -> None:
        """Ask it to stop at its next safe point."""

    def kill(self) -> None:
        """End it at once."""

    def wait(self) -> int:
        """Wait for its end; the exit code."""

    def last_words(self) -> str:
        """The last line that it wrote to standard error."""


class LocalJob:
    """A process on this machine.

    Args:
        process: The process, its standard input a pipe.
        log: Where its standard error goes.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log

    def poll(self) -> int | None:
        """See `Job.poll`."""
        return self._process.poll()

    def stop(self) -> None:
        """See `Job.stop`."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """See `Job.kill`."""
        self._process.kill()

    def wait(self) -> int:
        """See `Job.wait`."""
        return self._process.wait()

    def last_words(self) -> str:
        """See `Job.last_words`."""
        lines = [line.strip() for line in _tail(self._log).splitlines()]
        return next((line for line in reversed(lines) if line), "")


def start_local(cell: Cell, out: Path) -> LocalJob:
    """Begin a run, or go on with it.

    The settings are kept in `settings/NAME.json` (a file for `bbprompt tune --config`), what it says in
    `logs/NAME.log`.

    Raises:
        DiskError: A file of the sweep cannot be written.
    """
    run = out / cell.name
    for folder in ("settings", "logs"):
        RealDisk().make_folder(out / folder)
    settings = out / "settings" / f"{cell.name}.json"
    values = {key: value for key, value in cell.config.model_dump(mode="json").items() if value is not None}
    put(settings, values)
    words = ["tune", "--config", str(settings), "--run-dir", str(run)]
    if begun(run):
        # Its manifest has the settings, but not where it is computed.
        where = {"--ray": cell.config.ray, "--workers": cell.config.workers}
        words = ["resume", str(run), *(word for key, value in where.items() if value for word in (key, str(value)))]
    environment = dict(os.environ)
    if cell.config.threads is not None:
        environment |= dict.fromkeys(_THREADS, str(cell.config.threads))
    log = out / "logs" / f"{cell.name}.log"
    with _appending(log) as stream:
        process = subprocess.Popen(  # noqa: S603 - our own command, no shell
            [sys.executable, "-m", "bbprompt.commands.child", *words],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the sweep, which asks its runs itself
        )
    return LocalJob(process, log)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: calls made, stage, best dev metric."""

    calls: int
    stage: str
    dev: str


def progress(run: Path) -> Progress:
    """The last whole row of a run's curve."""
    rows = _tail(run / CURVE).split("\n")[:-1]
    cells = rows[-1].split(",") if rows else []
    if len(cells) < 5 or not cells[0].isdecimal():
        return Progress(0, "", "")
    return Progress(int(cells[0]), cells[1], cells[3])


def finished(run: Path) -> bool:
    """Whether a run has its result."""
    return (run / RESULT).is_file()


def begun(run: Path) -> bool:
    """Whether a run has its manifest, so that it can be resumed."""
    return (run / MANIFEST).is_file()


def locked(run: Path) -> bool:
    """Whether a process works on this run."""
    try:
        with (run / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # not begun, or not to be locked: the run itself will say what is wrong
    return False


def put(path: Path, value: object, disk: Disk | None = None) -> None:
    """Write a JSON file atomically and durably.

    Raises:
        DiskError: It cannot be written.
    """
    disk = disk if disk is not None else RealDisk()
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    file = disk.open(scratch, fresh=True)
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        disk.write(file, text.encode("utf-8", "backslashreplace"))
        disk.sync(file)
    finally:
        disk.close(file)
    disk.replace(scratch, path)
    disk.sync_folder(path.parent)


def _appending(path: Path) -> IO[bytes]:
    try:
        return path.open("ab")
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}; check the disk") from None


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
