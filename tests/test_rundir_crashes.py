"""A run of 40 calls, stopped at every operation of its disk, ends the same as one that was left alone."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
from faultdisk import IMAGES, Crash, FaultDisk, Image
from smallrun import (
    FILES,
    OPERATIONS,
    RUN,
    SETTINGS,
    Model,
    check_rest,
    finish,
    work,
)

from bbprompt.errors import DiskError, UsageError
from bbprompt.store.disk import RealDisk
from bbprompt.store.ledger import Ledger
from bbprompt.store.rundir import CURVE, JOURNAL, LOCK, MANIFEST, PROMPT, RESULT, RunDirectory


def test_the_run_left_alone_is_what_it_should_be() -> None:
    names = {MANIFEST, JOURNAL, CURVE, PROMPT, RESULT}
    assert {Path(path).name for path in FILES} == names
    assert OPERATIONS > 80
    assert json.loads(FILES[str(RUN / RESULT)])["calls"] == {"train": 30, "dev": 10, "test": 1}
    assert FILES[str(RUN / CURVE)].startswith(
        b"calls,stage,train_loss,best_dev,seconds,oracle_seconds\n8,prompt,8.462480959181562e-05,,0.0,0.0\n"
    )
    assert FILES[str(RUN / CURVE)].count(b"\n") == 6
    disk = FaultDisk()
    work(disk, Model())
    assert disk.rebooted("nothing").files() == FILES  # finished means finished, also after a power cut


@pytest.mark.parametrize("image", IMAGES)
def test_a_crash_at_every_operation_changes_nothing(image: Image) -> None:
    for point in range(1, OPERATIONS + 1):
        disk, model = FaultDisk(point), Model()
        with pytest.raises(Crash):
            work(disk, model)
        disk = disk.rebooted(image)
        check_rest(disk, model)
        finish(disk, model, stops=1)


def test_two_crashes_change_nothing() -> None:
    random_ = random.Random(7)
    for _ in range(150):
        disk, model = FaultDisk(random_.randint(1, OPERATIONS)), Model()
        with pytest.raises(Crash):
            work(disk, model)
        disk = disk.rebooted(random_.choice(IMAGES))
        disk.fail_at, stops = random_.randint(1, OPERATIONS // 2), 1
        try:
            work(disk, model)
        except Crash:
            stops = 2
        disk = disk.rebooted(random_.choice(IMAGES))
        check_rest(disk, model)
        finish(disk, model, stops)


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistent"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_failing_disk_at_every_operation_stops_the_run_and_it_can_be_resumed(code: int, persistent: bool) -> None:
    for point in range(1, OPERATIONS + 1):
        disk, model = FaultDisk(point, code, persistent), Model()
        with pytest.raises(DiskError, match=r"/.*: cannot .*; ") as caught:
            work(disk, model)
        assert caught.value.exit_code == 74
        assert "\n" not in str(caught.value)
        assert len(disk.operations) == point  # nothing was tried after it, neither again nor otherwise
        disk.fail_at = None  # space returns; the next process finds what this one saw
        finish(disk, model, stops=1)


def test_the_real_disk_agrees_with_the_simulated_one(tmp_path: Path) -> None:
    work(RealDisk(), Model(), tmp_path / "runs" / "run")
    found = {path.name: path.read_bytes() for path in (tmp_path / "runs" / "run").iterdir()}
    assert found.pop(LOCK) == b"%d\n" % os.getpid()
    assert found == {Path(path).name: data for path, data in FILES.items()}


# --- a run that came to nothing -----------------------------------------------------------------------------


def _withdrawn(disk: FaultDisk, calls: int = 2) -> None:
    """A run that asked for so many calls and found that it can never end."""
    with RunDirectory.create(RUN, SETTINGS, disk) as run:
        if calls:
            Ledger(run.journal(), 40).reserve([str(number) * 64 for number in range(calls)], "train")
        run.withdraw()


@pytest.mark.parametrize("calls", [0, 2])
def test_a_run_that_came_to_nothing_leaves_a_free_directory(calls: int) -> None:
    disk = FaultDisk()
    _withdrawn(disk, calls)
    disk = disk.rebooted("nothing")
    assert {Path(path).name for path in disk.files()} <= {LOCK}
    finish(disk, Model(), stops=0)


@pytest.mark.parametrize("image", IMAGES)
def test_a_crash_while_a_run_is_withdrawn_leaves_a_run_or_a_free_directory(image: Image) -> None:
    whole = FaultDisk()
    _withdrawn(whole)
    for point in range(1, len(whole.operations) + 1):
        disk = FaultDisk(point)
        with pytest.raises(Crash):
            _withdrawn(disk)
        disk = disk.rebooted(image)
        try:
            RunDirectory.open(RUN, disk).close()
        except UsageError:
            RunDirectory.create(RUN, SETTINGS, disk).close()


@pytest.mark.parametrize("why", ["resumed", "has a curve", "had a curve"])
def test_a_run_that_may_have_bought_something_is_not_withdrawn(why: str) -> None:
    disk = FaultDisk()
    with RunDirectory.create(RUN, SETTINGS, disk) as run:
        run.journal()
        if why == "has a curve":
            run.append_curve(20, "router", 0.25, 0.75, (0.5, 0.0))
            run.withdraw()
        if why == "had a curve":
            disk.put(RUN / CURVE, b"calls\n", durable=True)
            run.withdraw()
    with RunDirectory.open(RUN, disk) as run:
        run.withdraw()
    assert {str(RUN / MANIFEST), str(RUN / JOURNAL)} <= set(disk.files())


def test_withdrawing_stops_at_a_disk_that_fails() -> None:
    whole = FaultDisk()
    _withdrawn(whole)
    disk = FaultDisk(len(whole.operations), errno.EROFS, persistent=True)
    with pytest.raises(DiskError):
        _withdrawn(disk)
