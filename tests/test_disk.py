"""RealDisk: what the system refuses becomes one line that says what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bbprompt.errors import DiskError, RunLocked
from bbprompt.store.disk import RealDisk, disk_error
from bbprompt.store.rundir import RunDirectory

disk = RealDisk()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EBUSY])
def test_an_error_is_one_line_with_path_deed_cause_and_advice(code: int) -> None:
    text = str(disk_error(OSError(code, os.strerror(code)), "write to it", Path("/runs/x/journal.log")))
    assert text.startswith(f"/runs/x/journal.log: cannot write to it: {os.strerror(code)}; ")
    assert "\n" not in text
    assert len(text.split("; ", 1)[1]) > 20


def test_write_truncate_sync_and_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for data, fresh in ((b"one", True), (b"two", False)):
        file = disk.open(path, fresh=fresh)
        disk.write(file, data)
        disk.sync(file)
        disk.close(file)
    assert disk.read(path) == b"onetwo"
    file = disk.open(path, fresh=False)
    disk.truncate(file, 4)
    disk.write(file, b"!")
    disk.close(file)
    disk.close(file)  # closing never raises
    assert disk.read(path) == b"onet!"
    disk.replace(path, tmp_path / "g")
    disk.sync_folder(tmp_path)
    assert disk.names(tmp_path) == ["g"]
    disk.remove(tmp_path / "g")
    assert not disk.exists(tmp_path / "g")
    assert disk.free(tmp_path) > 0


def test_links_folders_and_pipes_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe"):
        with pytest.raises(DiskError, match=name):
            disk.open(tmp_path / name, fresh=True)
        with pytest.raises(DiskError, match=name):
            disk.lock(tmp_path / name)
        with pytest.raises(DiskError, match=name):
            disk.read(tmp_path / name)
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_what_is_missing_or_in_the_way_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    missing = tmp_path / "no" / "thing"
    for action in (
        lambda: disk.read(missing),
        lambda: disk.names(missing),
        lambda: disk.free(missing),
        lambda: disk.make_folder(missing),
        lambda: disk.remove(missing),
        lambda: disk.replace(missing, tmp_path / "x"),
        lambda: disk.sync_folder(missing),
        lambda: disk.names(tmp_path / "file"),
        lambda: disk.make_folder(tmp_path / "file"),
    ):
        with pytest.raises(DiskError, match=r"cannot .*; "):
            action()


def test_a_loop_of_links_resolves_to_an_error_or_itself(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    if sys.version_info >= (3, 13):
        assert disk.real(tmp_path / "a") in (tmp_path / "a", tmp_path / "b")
    else:
        with pytest.raises(DiskError, match="link"):
            disk.real(tmp_path / "a")


def test_a_short_write_is_an_error_and_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, calls = os.write, []

    def short(descriptor: int, data: bytes) -> int:
        calls.append(data)
        return real_write(descriptor, data[:3])

    file = disk.open(tmp_path / "f", fresh=True)
    monkeypatch.setattr(os, "write", short)
    with pytest.raises(DiskError, match=r"only 3 of 6 bytes could be written; the disk is full"):
        disk.write(file, b"abcdef")
    assert calls == [b"abcdef"]
    disk.close(file)


@pytest.mark.parametrize(("code", "harmless"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_only_a_missing_folder_sync_is_forgiven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, harmless: bool
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    file = disk.open(tmp_path / "f", fresh=True)
    monkeypatch.setattr(os, "fsync", refuse)
    if harmless:
        disk.sync_folder(tmp_path)
    else:
        with pytest.raises(DiskError, match=os.strerror(code)):
            disk.sync_folder(tmp_path)
    with pytest.raises(DiskError, match=r"make it durable \(fsync\)"):
        disk.sync(file)
    disk.close(file)


def test_a_lock_is_exclusive_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text("99999999999 an old and longer content\n")
    held = disk.lock(path)
    with pytest.raises(RunLocked, match=rf"pid {os.getpid()}\)"):
        disk.lock(path)
    disk.close(held)
    disk.close(disk.lock(path))


def test_a_failing_lock_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(DiskError, match="cannot lock it"):
            disk.lock(tmp_path / "run.lock")
    disk.close(disk.lock(tmp_path / "run.lock"))


def test_a_current_folder_that_is_gone_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(DiskError, match="cannot resolve it"):
        disk.real(Path("run"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_run_in_proc_is_refused_for_what_it_is_and_not_as_a_full_disk() -> None:
    with pytest.raises(DiskError, match=r"^/proc: its file system keeps no files, .*; choose another --run-dir$"):
        RunDirectory.create("/proc/x", {})


def test_a_run_on_a_full_read_only_file_system_is_refused_as_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = os.statvfs_result((4096, 4096, 1000, 0, 0, 100, 0, 0, os.ST_RDONLY, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: image)
    with pytest.raises(DiskError, match=r"Read-only file system; .*choose another --run-dir$"):
        RunDirectory.create(tmp_path / "run", {})


@pytest.mark.parametrize(("name", "deed"), [("file", "list it"), ("file/run", "make this folder")])
def test_a_file_in_place_of_a_run_directory_is_named(name: str, deed: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=rf"/{name}: cannot {deed}: Not a directory; a part of the path is a file"):
        RunDirectory.create(tmp_path / name, {})


def test_a_run_in_the_directory_of_another_user_is_refused_as_forbidden() -> None:
    code = (
        "import os, sys\n"
        "from bbprompt.store.rundir import RunDirectory\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"  # root may do anything; the owner of the folder here is root
        "try: RunDirectory.create(sys.argv[1] + '/run', {})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which no other user can look into
        Path(folder).chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout == (
            f"DiskError {Path(folder).resolve()}/run: cannot make this folder: Permission denied; "
            "this user may not do that: change the permissions or choose another --run-dir\n"
        )
