"""The run directory: a run stopped anywhere, by anything, ends the same as one that was left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from faultdisk import FaultDisk
from smallrun import (
    FILES,
    RUN,
    SETTINGS,
)

from bbprompt.errors import DiskError, JournalCorrupt, ResumeMismatch, RunLocked, UsageError
from bbprompt.store.disk import File
from bbprompt.store.journal import canonical_json
from bbprompt.store.ledger import Ledger
from bbprompt.store.rundir import CURVE, JOURNAL, LOCK, MANIFEST, PROMPT, RESULT, RunDirectory

# --- creating and opening ---------------------------------------------------------------------------------


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def made(path: Path, manifest: Mapping[str, Any] = SETTINGS) -> Path:
    RunDirectory.create(path, manifest).close()
    return path


def test_a_manifest_comes_back_and_is_in_the_order_given(tmp_path: Path) -> None:
    path = made(tmp_path / "run", {"b": (1, 2), "a": "\udc80ü"})
    with RunDirectory.open(path) as run:
        assert run.manifest == {"b": [1, 2], "a": "\udc80ü"}
        assert list(json.loads(run.read_bytes(MANIFEST))) == ["run_id", "b", "a"]
        assert run.path == path
        assert not run.finished
    assert run.run_id != RunDirectory.open(made(tmp_path / "other")).run_id


def test_a_run_that_was_begun_points_at_resume(tmp_path: Path) -> None:
    path = made(tmp_path / "run")
    before = names(path)
    with pytest.raises(UsageError, match=f"bbprompt resume {path}"):
        RunDirectory.create(path, SETTINGS)
    assert names(path) == before


def test_a_directory_in_other_use_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"not empty \(thesis.tex\)"):
        RunDirectory.create(tmp_path, SETTINGS)
    with pytest.raises(UsageError, match=r"no manifest\.json"):
        RunDirectory.open(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]
    with pytest.raises(DiskError, match=r"thesis\.tex"):
        RunDirectory.create(tmp_path / "thesis.tex", SETTINGS)
    with pytest.raises(DiskError, match=r"thesis\.tex"):
        RunDirectory.open(tmp_path / "thesis.tex")
    with pytest.raises(UsageError, match="no such run directory"):
        RunDirectory.open(tmp_path / "missing")
    with pytest.raises(UsageError, match="NUL"):
        RunDirectory.create("a\0b", SETTINGS)
    with pytest.raises(ValueError, match="run_id"):
        RunDirectory.create(tmp_path / "run", {"run_id": "mine"})


def test_an_empty_directory_and_the_rest_of_a_start_that_died_can_be_used(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("1\n")
    (tmp_path / ".manifest.json.tmp").write_text('{"ta')
    made(tmp_path)
    assert names(tmp_path) == [MANIFEST, LOCK]


def test_a_run_made_by_another_process_just_before_the_lock_is_not_overwritten() -> None:
    class Racing(FaultDisk):
        def lock(self, path: Path) -> File:
            self.put(RUN / MANIFEST, b"theirs", durable=True)
            return super().lock(path)

    disk = Racing()
    with pytest.raises(UsageError, match="begun already"):
        RunDirectory.create(RUN, SETTINGS, disk)
    assert disk.files() == {str(RUN / MANIFEST): b"theirs"}


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_is_not_started_on_a_disk_that_is_nearly_full(exists: bool) -> None:
    disk = FaultDisk()
    if exists:
        disk.make_folder(Path("/runs"))
        disk.make_folder(RUN)
    disk.space = 16 * 2**20 - 1
    before = disk.files()
    with pytest.raises(DiskError, match=r"16\.0 MB are free and it takes 16"):
        RunDirectory.create(RUN, SETTINGS, disk)
    assert disk.files() == before
    disk.space += 1
    RunDirectory.create(RUN, SETTINGS, disk).close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-10],
        lambda data: b"[]",
        lambda data: b"{}",
        lambda data: data.replace(b'"seed": 42', b'"seed": 43'),
        lambda data: data.replace(b'"run_id": "', b'"run_id": "0'),
        lambda data: data.replace(b"lcqmc", b"lc\xffmc"),
        lambda data: b"[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_noticed(tmp_path: Path, damage: Any) -> None:
    path = made(tmp_path / "run")
    data = (path / MANIFEST).read_bytes()
    (path / MANIFEST).write_bytes(damage(data))
    with pytest.raises(DiskError, match=r"manifest\.json: damaged or edited"):
        RunDirectory.open(path)
    (path / MANIFEST).write_bytes(data)
    RunDirectory.open(path).close()  # the failed attempt left no lock


def test_every_bit_flip_in_a_manifest_is_noticed_or_means_nothing() -> None:
    disk = FaultDisk()
    RunDirectory.create(RUN, SETTINGS, disk).close()
    data = FILES[str(RUN / MANIFEST)]
    manifest = json.loads(canonical_json(SETTINGS))
    noticed = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        disk.put(RUN / MANIFEST, bytes(damaged), durable=True)
        try:
            assert RunDirectory.open(RUN, disk, writable=False).manifest == manifest
        except DiskError:
            noticed += 1
    assert noticed > 4 * len(data)


def test_a_journal_of_another_run_is_noticed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        with RunDirectory.create(tmp_path / name, {"seed": seed}) as run:
            Ledger(run.journal(), 4).reserve(["x"], "train")
    (tmp_path / "a" / JOURNAL).replace(tmp_path / "b" / JOURNAL)
    with RunDirectory.open(tmp_path / "b") as run, pytest.raises(JournalCorrupt, match="belongs to run"):
        run.journal()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 43}, "seed was 42 when the run began and is 43 now"),
        ({"seed": 42.0}, r"seed was 42 .* is 42\.0 now"),
        ({"task": "lcqmc", "seed": True}, "seed was 42 .* is true"),
        ({"labels": ["相同", "不同"]}, r"labels\.0 was "),
        ({"labels": ["不同"]}, r"labels\.1 was .* is absent now"),
        ({"labels": []}, r"labels\.0 was .* is absent now"),
        ({"digests": {"data": "cd" * 32, "backbone": None}}, f'digests.data was "{"ab" * 32}"'),
        ({"digests": {"data": "ab" * 32, "backbone": "x"}}, 'digests.backbone was null .* is "x"'),
        ({"optimizer": SETTINGS["optimizer"] | {"sigma": 0.6}}, r"optimizer\.sigma was 0\.5 .* is 0\.6"),
        ({"optimizer": SETTINGS["optimizer"] | {"extra": []}}, r"optimizer\.extra was \{\} .* is \[\]"),
        ({"new": {"key": 1}}, r"new\.key was absent .* is 1"),
        ({"task": "x" * 500}, r"task was .* is \"x{96}\.\.\. now"),
        ({"a\nb\x85\u2028": 1}, r"a\\nb\\u0085\\u2028 was absent"),
        ({"x" * 500: 1}, r" x{97}\.\.\. was absent"),
    ],
)
def test_a_mismatch_names_the_key_and_both_values(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with RunDirectory.open(made(tmp_path / "run")) as run:
        run.check_manifest(dict(reversed(SETTINGS.items())))  # the order of keys does not matter
        with pytest.raises(ResumeMismatch, match=text) as caught:
            run.check_manifest(SETTINGS | change)
    assert len(str(caught.value).splitlines()) == 1


def test_the_first_key_that_differs_is_named_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    with (
        RunDirectory.open(made(tmp_path / "run")) as run,
        pytest.raises(ResumeMismatch, match="budget was 40"),
    ):
        run.check_manifest({"seed": 0, **SETTINGS, "digests": None, "budget": 41})


# --- links ------------------------------------------------------------------------------------------------


def test_a_link_to_a_run_beside_it_is_followed_and_one_that_leads_out_is_not(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    made(runs / "first")
    (runs / "latest").symlink_to("first")
    with RunDirectory.open(runs / "latest") as run:
        assert run.path == runs / "first"
    outside = made(tmp_path / "outside")
    (tmp_path / "empty").mkdir()
    for name, target in (("a", outside), ("b", tmp_path / "empty"), ("c", tmp_path / "new"), ("d", runs)):
        (runs / name).symlink_to(target)
        with pytest.raises(UsageError, match="leads out of its folder"):
            RunDirectory.open(runs / name)
        with pytest.raises(UsageError, match="leads out of its folder"):
            RunDirectory.create(runs / name, SETTINGS)
    assert names(tmp_path / "empty") == []
    assert not (tmp_path / "new").exists()


def test_the_current_folder_can_be_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made(tmp_path / "run") / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for name in (".", "../run", "sub/.."):
        with RunDirectory.open(name) as run:
            assert run.path == tmp_path / "run"


@pytest.mark.parametrize("name", [MANIFEST, JOURNAL, CURVE, LOCK, f".{PROMPT}.tmp"])
def test_a_link_inside_the_run_is_not_followed(tmp_path: Path, name: str) -> None:
    path = made(tmp_path / "run")
    victim = tmp_path / "victim"
    victim.write_bytes((path / MANIFEST).read_bytes())
    before = victim.read_bytes()
    (path / name).unlink(missing_ok=True)

    def use() -> None:
        with RunDirectory.open(path) as run:
            if name.endswith(".tmp"):
                (path / name).symlink_to(victim)
            run.journal()
            run.append_curve(1, "prompt", 0.5, 0.5, (1.0, 0.0))
            run.write_bytes(PROMPT, b"prompt")

    if not name.endswith(".tmp"):
        (path / name).symlink_to(victim)
    with pytest.raises(DiskError, match="symbolic link"):
        use()
    assert victim.read_bytes() == before


# --- files ------------------------------------------------------------------------------------------------


def test_files_are_replaced_whole_and_strays_are_removed(tmp_path: Path) -> None:
    path = made(tmp_path / "run")
    for stray in (f".{RESULT}.tmp", f".{PROMPT}.tmp"):
        (path / stray).write_bytes(b"half")
    with RunDirectory.open(path, writable=False) as run:
        assert not run.finished
    assert (path / f".{RESULT}.tmp").exists()  # a reader touches nothing
    with RunDirectory.open(path) as run:
        assert not run.finished
        assert not [name for name in names(path) if name.startswith(".")]
        run.write_bytes(PROMPT, b"long prompt")
        run.write_bytes(PROMPT, b"prompt")
        assert run.read_bytes(PROMPT) == b"prompt"
        run.write_bytes("notes.bin", b"notes")
        run.remove("notes.bin")
        run.remove("notes.bin")  # that it is gone is all that was asked for
        assert "notes.bin" not in names(path)
        run.write_json(RESULT, {"accuracy": 0.5, "task": "情感"})
        assert run.finished
        with pytest.raises(ValueError, match=r"finite|JSON compliant"):
            run.write_json("more.json", {"x": float("nan")})
        with pytest.raises(DiskError, match="nothing of that name"):
            run.read_bytes("more.json")
    assert json.loads((path / RESULT).read_text("utf-8")) == {"accuracy": 0.5, "task": "情感"}


@pytest.mark.parametrize(
    "name", [MANIFEST, JOURNAL, CURVE, LOCK, "", ".x", "../x", "a/b", "a\\b", "/etc/x", "A", "x\n", "x" * 65]
)
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with RunDirectory.open(made(tmp_path / "run")) as run:
        with pytest.raises(ValueError, match="is not a name"):
            run.write_bytes(name, b"")
        with pytest.raises(ValueError, match="is not a name"):
            run.remove(name)
        if name not in (MANIFEST, JOURNAL, CURVE, LOCK):
            with pytest.raises(ValueError, match="is not a name"):
                run.read_bytes(name)


def test_the_curve_begins_anew_each_time_and_is_durable_with_the_result() -> None:
    disk = FaultDisk()
    with RunDirectory.create(RUN, SETTINGS, disk) as run:
        run.append_curve(20, 'a "quoted", stage', 0.5, None, (1.23456, 0.0))
    with RunDirectory.open(RUN, disk) as run:
        run.append_curve(20, "router", 0.25, 0.75, (0.5, 0.0))
        assert disk.durable(RUN / CURVE) == b""
        run.write_json(RESULT, {})
        run.append_curve(40, "router", 0.125, 1.0, (1.0, 0.0))
    with RunDirectory.open(RUN, disk):
        pass  # opening alone leaves the curve as it is
    rows = disk.files()[str(RUN / CURVE)].decode().splitlines()
    assert rows == ["calls,stage,train_loss,best_dev,seconds,oracle_seconds", "40,router,0.125,1.0,1.0,0.0"]
    assert disk.durable(RUN / CURVE).endswith(b"20,router,0.25,0.75,0.5,0.0\n")


def test_a_reader_takes_no_lock_and_cannot_write(tmp_path: Path) -> None:
    path = made(tmp_path / "run")
    with RunDirectory.open(path) as run, RunDirectory.open(path, writable=False) as reader:
        assert reader.manifest == run.manifest
        for write in (
            reader.journal,
            lambda: reader.write_bytes(PROMPT, b""),
            lambda: reader.append_curve(1, "prompt", 0.5, None, (0.0, 0.0)),
        ):
            with pytest.raises(ValueError, match="for reading only"):
                write()
        assert run.journal() is run.journal()
    run.close()
    with pytest.raises(ValueError, match="is closed"):
        run.journal()


# --- other processes and a real limit ----------------------------------------------------------------------

HOLD = """
import sys, time
from bbprompt.store.rundir import RunDirectory
run = RunDirectory.open(sys.argv[1]) if sys.argv[2] == "open" else RunDirectory.create(sys.argv[1], {"config": {}})
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("begun", ["open", "create"])
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, None])
def test_a_second_process_is_locked_out_until_the_first_is_gone(
    ending: signal.Signals | None, begun: str, tmp_path: Path
) -> None:
    path = made(tmp_path / "run") if begun == "open" else tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), begun], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunLocked, match=rf"{path}: another process \(pid {holder.pid}\)") as caught:
            RunDirectory.open(path)
        assert caught.value.exit_code == 75
        if ending is not None:
            holder.send_signal(ending)
        else:
            assert holder.stdin is not None
            holder.stdin.close()
        holder.wait()
        RunDirectory.open(path).close()


LIMITED = """
import resource, sys
from bbprompt.errors import DiskError
from bbprompt.store.ledger import Ledger
from bbprompt.store.rundir import RunDirectory
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
with RunDirectory.open(sys.argv[1]) as run:
    ledger = Ledger(run.journal(), 400)
    for step in range(40):
        ids = [f"{step}-{index}" for index in range(10)]
        try:
            ledger.reserve(ids, "train")
            ledger.settle(ids, [{"loss": 1 / (step + 1)}] * 10)
        except DiskError as error:
            print(step, len(ledger.in_doubt), error)
            break
"""


def test_a_real_file_size_limit_stops_the_run_and_leaves_it_resumable(tmp_path: Path) -> None:
    path = made(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    step, doubt, message = done.stdout.split(" ", 2)
    assert "journal.log: cannot write to it" in message
    assert (path / JOURNAL).stat().st_size == 3000  # it wrote what it could, and the rest is a torn line
    with RunDirectory.open(path) as run:
        ledger = Ledger(run.journal(), 400)
        assert (path / JOURNAL).stat().st_size < 3000
        assert ledger.reserved == 10 * int(step) + int(doubt)
        assert len(ledger.in_doubt) == int(doubt)
        assert ledger.settled("0-0") == {"loss": 1.0}
        ledger.reserve(["more"], "train")
