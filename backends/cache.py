"""The user's cache folder: converted models, published whole or not at all, and digests computed once.

A converted model is built in a temporary folder beside its final place, flushed to disk, sealed with
a manifest of sizes and digests, and renamed. A file lock lets one process build while others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bbprompt.errors import ArtifactError, DiskError

__all__ = ["cache_root", "check_sealed", "file_digest", "memoised_digest", "publish"]

MANIFEST = "manifest.json"
# Tensor files are checked by size and the digest of their header on each load; all other files in full.
_TENSORS = ".safetensors"
_MAX_HEADER = 64 * 2**20


def cache_root() -> Path:
    """Return ``$BBPROMPT_CACHE``, else ``$XDG_CACHE_HOME/bbprompt``, else ``~/.cache/bbprompt``."""
    if own := os.environ.get("BBPROMPT_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "bbprompt"
    return Path.home() / ".cache" / "bbprompt"


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Return ``root/name``, building it first where it does not exist.

    Args:
        root: Parent folder, made if missing.
        name: Folder name; it must name the content (a digest), since an existing folder is taken as it is.
        build: Fills an empty folder. Called at most once, with other processes waiting.

    Returns:
        The complete folder. Call `check_sealed` before relying on one that was there before.

    Raises:
        DiskError: The cache cannot be written.
    """
    target = root / name
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{name}.lock"):
            if target.is_dir():  # another process built it while this one waited
                return target
            for stale in root.glob(f".{name}.*"):  # left by a build that was killed; the lock makes this safe
                shutil.rmtree(stale)
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
            try:
                build(scratch)
                _seal(scratch)
                scratch.rename(target)
                _sync(root)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
    except OSError as error:
        raise DiskError(
            f"{root}: the cache cannot be written ({error.strerror or error}); free space or set BBPROMPT_CACHE"
        ) from error
    return target


def check_sealed(folder: Path, *, full: bool = False) -> None:
    """Check a published folder against its manifest.

    Args:
        folder: What `publish` returned.
        full: Hash tensor files as a whole (about a second for 500 MB) instead of their size and header only.

    Raises:
        ArtifactError: A file is missing, has another size or another digest; says to delete the folder.
    """
    advice = f"delete {folder} and it will be built again"
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in listed.items():
            path = folder / name
            if path.stat().st_size != entry["size"]:
                raise ArtifactError(f"{path}: has {path.stat().st_size} bytes, not {entry['size']}; {advice}")
            quick = path.suffix == _TENSORS and not full
            if (_header_digest(path) if quick else file_digest(path)) != entry["header" if quick else "sha256"]:
                raise ArtifactError(f"{path}: was altered after it was written; {advice}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{folder}: damaged cache ({error!r}); {advice}") from error


def memoised_digest(files: Sequence[Path], compute: Callable[[], str], kind: str = "") -> str:
    """Return a digest that depends on these files only, computing it once per state of the files.

    A state is each file's resolved path, size, inode and times of change in nanoseconds. Where the cache
    cannot be written the digest is computed every time: the result is the same, only later.

    Args:
        files: Existing files.
        compute: Called where no stored digest fits.
        kind: Tells apart several digests of the same files.
    """
    state = []
    for path in files:
        real = path.resolve()
        stat = real.stat()
        state.append([str(real), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns])
    key = hashlib.sha256(json.dumps(["digest-1", *([kind] if kind else []), *state]).encode()).hexdigest()
    memo = cache_root() / "digests" / key
    try:
        stored = memo.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        stored = ""
    if len(stored) == 64 and set(stored) <= set("0123456789abcdef"):
        return stored
    digest = compute()
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=memo.parent)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(digest + "\n")
        Path(scratch).replace(memo)
    except OSError:  # a read-only cache costs time, not correctness
        return digest
    return digest


def _seal(folder: Path) -> None:
    """Write the manifest of a folder's files and flush everything to disk."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": file_digest(path)}
        if path.suffix == _TENSORS:
            files[path.name]["header"] = _header_digest(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def _header_digest(path: Path) -> str:
    """Return the sha256 of a safetensors file's header: names, types, shapes and offsets of its tensors."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if length > _MAX_HEADER:
            raise ValueError(f"{path.name} has a header of {length} bytes")
        return hashlib.sha256(prefix + file.read(length)).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system frees it when the process ends, however it ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
