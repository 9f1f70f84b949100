"""The one object through which a run touches files.

The journal and the run directory never call ``os`` themselves: they are handed a `Disk`. So a test can count
the operations, fail any of them, and keep what was merely written apart from what was made durable.

`RealDisk` is the only implementation in the package (POSIX: it needs ``flock`` and ``O_NOFOLLOW``). Every
``OSError`` leaves it as a `DiskError` of one line: path, what was being done, the system's words, what to do.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bbprompt.errors import DiskError, RunLocked

__all__ = ["Disk", "File", "RealDisk", "disk_error"]

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space, then go on with `bbprompt resume`",
    errno.EDQUOT: "your disk quota is used up: free some space, then go on with `bbprompt resume`",
    errno.EFBIG: "a file size limit is reached: raise it (`ulimit -f`), then go on with `bbprompt resume`",
    errno.EROFS: "the file system is mounted read-only: remount it or choose another --run-dir",
    errno.EACCES: "this user may not do that: change the permissions or choose another --run-dir",
    errno.EPERM: "this user may not do that: change the permissions or choose another --run-dir",
    errno.EIO: "the device reports a fault: check it before you go on with `bbprompt resume`",
    errno.ENOENT: "nothing of that name is there: check the path",
    errno.ENOTDIR: "a part of the path is a file, not a directory: check the path",
    errno.EISDIR: "a directory stands where a file belongs: move it away",
    errno.ELOOP: "a symbolic link stands where a file belongs, and none is followed here: move it away",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter --run-dir",
}
_OTHERWISE = "check the path and the disk, then go on with `bbprompt resume`"


def disk_error(error: OSError, doing: str, path: Path) -> DiskError:
    """Put an ``OSError`` into one line.

    Args:
        error: what the system said.
        doing: the verb that fits "cannot …", for example ``"append to it"``.
        path: the file or folder concerned.

    Returns:
        The error to raise; its ``__cause__`` is for the caller to set with ``raise … from``.
    """
    said = error.strerror or str(error)
    return DiskError(f"{path}: cannot {doing}: {said}; {_ADVICE.get(error.errno or 0, _OTHERWISE)}")


@dataclass(frozen=True, slots=True)
class File:
    """An open file: its path, for messages, and its descriptor."""

    path: Path
    descriptor: int


class Disk(Protocol):
    """What a run needs of a file system. Every method but `close` may raise `DiskError`.

    Nothing written, renamed, created or removed is safe from a power cut before the matching `sync` (for
    bytes) or `sync_folder` (for names) has returned. After a failed `sync` the unsynced bytes count as lost.
    """

    def real(self, path: Path) -> Path:
        """The absolute path with all symbolic links resolved; it need not exist."""
        ...

    def exists(self, path: Path) -> bool:
        """Whether anything, a dangling link included, has this name."""
        ...

    def names(self, folder: Path) -> list[str]:
        """The names in a folder, sorted."""
        ...

    def free(self, path: Path) -> int:
        """Bytes that this user may still write on the file system of an existing path."""
        ...

    def make_folder(self, path: Path) -> None:
        """Make one folder; that it is there already is no error."""
        ...

    def read(self, path: Path) -> bytes:
        """The whole content of a regular file; no link is followed."""
        ...

    def open(self, path: Path, *, fresh: bool) -> File:
        """Open a regular file for writing: emptied if ``fresh``, else for appending. No link is followed."""
        ...

    def lock(self, path: Path) -> File:
        """Take the exclusive lock on a file until it is closed or this process dies; raises `RunLocked`."""
        ...

    def write(self, file: File, data: bytes) -> None:
        """Write all of ``data`` with one system call; a short write is an error."""
        ...

    def truncate(self, file: File, size: int) -> None:
        """Cut a file to ``size`` bytes."""
        ...

    def sync(self, file: File) -> None:
        """Make the bytes of a file durable."""
        ...

    def close(self, file: File) -> None:
        """Close a file; never raises."""
        ...

    def replace(self, source: Path, target: Path) -> None:
        """Give ``source`` the name ``target`` in one step, over whatever had that name."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file."""
        ...

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        ...


@contextmanager
def _reported(doing: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a `DiskError`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, doing, path) from error


def _open_regular(path: Path, flags: int) -> int:
    # O_NONBLOCK: a FIFO put here by somebody must be refused, not waited for; it means nothing to a file.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


class RealDisk:
    """The file system of this machine; see `Disk` for the methods."""

    def real(self, path: Path) -> Path:
        """See `Disk.real`."""
        try:
            return path.resolve()
        except RuntimeError as error:  # how Python < 3.13 reports a loop of links
            raise disk_error(OSError(errno.ELOOP, os.strerror(errno.ELOOP)), "resolve it", path) from error
        except OSError as error:
            raise disk_error(error, "resolve it", path) from error

    def exists(self, path: Path) -> bool:
        """See `Disk.exists`."""
        return os.path.lexists(path)

    def names(self, folder: Path) -> list[str]:
        """See `Disk.names`."""
        with _reported("list it", folder):
            return sorted(entry.name for entry in folder.iterdir())

    def free(self, path: Path) -> int:
        """See `Disk.free`."""
        with _reported("ask for its free space", path):
            status = os.statvfs(path)
            if status.f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))  # else "full" is all that a caller would see
        if not status.f_blocks:
            raise DiskError(
                f"{path}: its file system keeps no files, as /proc and /sys do not; choose another --run-dir"
            )
        return status.f_bavail * status.f_frsize

    def make_folder(self, path: Path) -> None:
        """See `Disk.make_folder`."""
        with _reported("make this folder", path):
            path.mkdir(exist_ok=True)

    def read(self, path: Path) -> bytes:
        """See `Disk.read`."""
        with _reported("read it", path), open(_open_regular(path, os.O_RDONLY), "rb") as file:
            return file.read()

    def open(self, path: Path, *, fresh: bool) -> File:
        """See `Disk.open`."""
        with _reported("open it for writing", path):
            mode = os.O_TRUNC if fresh else os.O_APPEND
            return File(path, _open_regular(path, os.O_WRONLY | os.O_CREAT | mode))

    def lock(self, path: Path) -> File:
        """See `Disk.lock`; the file holds the pid of the process that has, or last had, the lock."""
        with _reported("lock it", path):
            file = File(path, _open_regular(path, os.O_RDWR | os.O_CREAT))
            try:
                fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(file.descriptor, 0)
                os.write(file.descriptor, b"%d\n" % os.getpid())
            except BlockingIOError as error:
                holder = os.read(file.descriptor, 32).decode("ascii", "replace").strip() or "unknown"
                self.close(file)
                raise RunLocked(
                    f"{path.parent}: another process (pid {holder}) works on this run; wait for it or stop it"
                ) from error
            except OSError:
                self.close(file)
                raise
            return file

    def write(self, file: File, data: bytes) -> None:
        """See `Disk.write`."""
        with _reported("write to it", file.path):
            written = os.write(file.descriptor, data)
            if written < len(data):
                # The next call would name the cause, but a second call is just what must not happen.
                raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes could be written")

    def truncate(self, file: File, size: int) -> None:
        """See `Disk.truncate`."""
        with _reported("truncate it", file.path):
            os.ftruncate(file.descriptor, size)

    def sync(self, file: File) -> None:
        """See `Disk.sync`."""
        with _reported("make it durable (fsync)", file.path):
            os.fsync(file.descriptor)

    def close(self, file: File) -> None:
        """See `Disk.close`."""
        with suppress(OSError):  # the descriptor is gone either way, and what had to be durable was synced
            os.close(file.descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """See `Disk.replace`."""
        with _reported("replace it", target):
            source.replace(target)

    def remove(self, path: Path) -> None:
        """See `Disk.remove`."""
        with _reported("remove it", path):
            path.unlink()

    def sync_folder(self, folder: Path) -> None:
        """See `Disk.sync_folder`."""
        with _reported("make its names durable (fsync)", folder):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno != errno.EINVAL:  # some network file systems have no such call for a folder
                    raise
            finally:
                os.close(descriptor)
