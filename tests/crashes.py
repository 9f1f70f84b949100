"""Whole runs on the toy oracle, stopped at chosen operations of a simulated disk, or with their journal cut.

Each function repeats one scenario and returns what it counted; an ``AssertionError`` names the first that did not end
as the run that was left alone. `FaultDisk` keeps cached and durable bytes apart, which a killed process cannot show:
the page cache survives it.
"""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import toyruns
from audit import Execution, audit, doubtful, paid, settled
from faultdisk import IMAGES, Crash, FaultDisk, Image
from safetensors import SafetensorError

from bbprompt.errors import DiskError, JournalCorrupt, ResumeMismatch
from bbprompt.oracle import OracleInfo, Scores, TextBatch
from bbprompt.run import Prepared
from bbprompt.scoring import labelled
from bbprompt.store.journal import Journal
from bbprompt.store.rundir import CURVE, JOURNAL, MANIFEST, PROMPT, RunDirectory
from bbprompt.tensorfile import unpack

RUN = Path("/runs/run")
CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class Witness:
    """An oracle that looks at the disk when it is asked: this call is paid for and all before are settled, durably."""

    def __init__(self, run: Prepared, disk: FaultDisk, log: list[Execution], life: int) -> None:
        self.inner, self.disk, self.readout = run.oracle, disk, run.readout
        self.log, self.life = log, life
        self.kinds: dict[TextBatch, tuple[str, Any]] = {}
        for kind, examples in (("train", run.few.train), ("dev", run.few.dev), ("test", run.test)):
            data = labelled(run.task, examples, for_loss=kind != "test")
            self.kinds[data.batch] = kind, data.gold

    @property
    def info(self) -> OracleInfo:
        return self.inner.info

    def score(self, batch: TextBatch, points: Any, *more: Any) -> Scores:
        journal = self.disk.durable(RUN / JOURNAL)
        kind, gold = self.kinds[batch]
        asked = Execution(kind, tuple(row.tobytes() for row in points), (), self.life)
        assert paid(journal, asked), "a call was sent before it was durably paid for"
        assert doubtful(journal) <= (0 if asked.kind == "test" else len(points)), (
            "a call was sent while an earlier answer, used already, was not durable"
        )
        scores = self.inner.score(batch, points, *more)
        if kind != "test":
            losses = self.readout.losses(scores, batch, gold).mean(axis=1)
            self.log.append(replace(asked, losses=tuple(losses.tolist())))
        return scores

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class Lives:
    """A run from its beginning to its end, in one life or several.

    Attributes:
        run: What is tuned.
        log: What the oracle carried out, over all lives.
        kept: What was settled on the disk that each life but the last left.
        doubts: See `audit.audit`.
    """

    run: Prepared
    log: list[Execution] = field(default_factory=list)
    kept: list[frozenset[str]] = field(default_factory=list)
    doubts: int | None = None

    def going(self, disk: FaultDisk) -> None:
        """Begin or go on, under the eyes of a witness."""
        oracle = Witness(self.run, disk, self.log, len(self.kept))
        toyruns.tuned(replace(self.run, oracle=oracle), RUN, disk)

    def ended(self, disk: FaultDisk) -> Lives:
        """The same after one more death, from which the next life finds this disk."""
        journal = disk.files().get(str(RUN / JOURNAL), b"")
        return replace(self, log=[*self.log], kept=[*self.kept, settled(journal)])

    def finished(self, disk: FaultDisk, expected: dict[str, bytes], where: str) -> None:
        """Go on to the end; compare all that a run leaves but the seconds it took, and let the checker judge."""
        self.going(disk)
        found, whole = toyruns.outcome(left(disk)), toyruns.outcome(expected)
        for name, data in whole.items():
            assert found[name] == data, f"{where}: {name} differs from that of the run left alone"
        assert found.keys() == whole.keys(), where
        try:
            audit(found[JOURNAL], self.run.config.budget, self.log, self.kept, doubts=self.doubts)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error


def small(name: str = "joint", budget: int = 40) -> Prepared:
    """A run of a few generations that takes milliseconds once its oracle has answered everything."""
    return toyruns.prepared(toyruns.METHODS[name], budget)


def alone(run: Prepared) -> tuple[dict[str, bytes], int]:
    """What the run leaves when nothing disturbs it, and the operations it takes."""
    disk = FaultDisk()
    Lives(run).going(disk)
    return left(disk), len(disk.operations)


def left(disk: FaultDisk) -> dict[str, bytes]:
    """Name and content of what is in the run directory."""
    return {Path(name).name: data for name, data in disk.files().items()}


def crash_points(run: Prepared, images: Iterable[Image] = IMAGES, points: Iterable[int] | None = None) -> int:
    """A power cut at every operation, with each image of what the disk kept; then resume."""
    expected, operations = alone(run)
    count = 0
    images = tuple(images)
    for point in points or range(1, operations + 1):
        disk, lives = FaultDisk(point), Lives(run)
        try:
            lives.going(disk)
        except Crash:
            pass
        else:
            raise AssertionError(f"operation {point} of {operations} was never reached")
        for image in images:
            found = disk.rebooted(image)
            lives.ended(found).finished(found, expected, f"power cut at operation {point}, {image} kept")
            count += 1
    return count


def crash_chains(run: Prepared, chains: int, seed: int, longest: int = 4) -> int:
    """Several power cuts in a row at random operations, the resumes included."""
    expected, operations = alone(run)
    random_ = random.Random(seed)
    count = 0
    for _ in range(chains):
        disk, lives, story = FaultDisk(), Lives(run), []
        for _ in range(random_.randint(2, longest)):
            disk.fail_at = random_.randint(1, operations)
            image = random_.choice(IMAGES)
            story.append((disk.fail_at, image))
            try:
                lives.going(disk)
            except Crash:
                count += 1
            disk = disk.rebooted(image, random_.random())
            lives = lives.ended(disk)
        lives.finished(disk, expected, f"power cuts {story}")
    return count


def failing_disk(run: Prepared, codes: Iterable[int] = CODES, points: Iterable[int] | None = None) -> int:
    """A disk that refuses an operation, once or from then on: a `DiskError`, no further operation, then resume."""
    expected, operations = alone(run)
    count = 0
    for code in codes:
        for persistent in (False, True):
            for point in points or range(1, operations + 1):
                disk, lives = FaultDisk(point, code, persistent), Lives(run)
                where = f"errno {code} at operation {point}, persistent={persistent}"
                try:
                    lives.going(disk)
                except DiskError as error:
                    said = error
                else:
                    raise AssertionError(f"{where}: the run went on as if nothing had happened")
                assert said.exit_code == 74, where
                assert "\n" not in str(said), where
                assert len(disk.operations) == point, f"{where}: the disk was used again"
                disk.fail_at = None
                lives.ended(disk).finished(disk, expected, where)
                count += 1
    return count


def prefixes(run: Prepared) -> int:
    """The journal ends after every record, the last of them whole or torn in its middle; then resume."""
    expected, _ = alone(run)
    journal = expected[JOURNAL]
    ends = [0] + [at + 1 for at, byte in enumerate(journal) if byte == 10]
    torn = [(start + end) // 2 for start, end in pairwise(ends)]
    return _cuts(run, expected, [*ends, *torn])


def repairs(run: Prepared) -> int:
    """The journal ends after every single byte: opened again it holds its whole lines, durably, and no more."""
    expected, _ = alone(run)
    whole = expected[JOURNAL]
    for end in range(len(whole) + 1):
        disk = FaultDisk()
        disk.put(RUN / JOURNAL, whole[:end], durable=True)
        Journal(RUN / JOURNAL, json.loads(expected[MANIFEST])["run_id"], disk)
        assert disk.durable(RUN / JOURNAL) == whole[: whole.rfind(b"\n", 0, end) + 1], f"cut after byte {end}"
    return len(whole) + 1


def byte_cuts(run: Prepared) -> int:
    """The journal ends after every single byte; then resume."""
    expected, _ = alone(run)
    return _cuts(run, expected, range(len(expected[JOURNAL]) + 1))


def flips(run: Prepared, singles: int, doubles: int, seed: int) -> dict[str, int]:
    """One or two flipped bits in manifest, journal or prompt: an error that is documented, or what was there before."""
    expected, _ = alone(run)
    manifest = json.loads(expected[MANIFEST])
    truth = unpack(expected[PROMPT])
    records = _records(expected[JOURNAL], manifest["run_id"])
    random_, noticed = random.Random(seed), 0
    for number in range(singles + doubles):
        name = random_.choice((MANIFEST, JOURNAL, PROMPT))
        data = bytearray(expected[name])
        places = random_.sample(range(8 * len(data)), 1 if number < singles else 2)
        for place in places:
            data[place // 8] ^= 1 << place % 8
        where = f"{name}, seed {seed}, bits {places}"
        try:
            if name == JOURNAL:
                found = _records(bytes(data), manifest["run_id"])
                assert found == records[: len(found)], where
                assert len(found) >= len(records) - 1, f"{where}: more than a torn last line was cut"
            elif name == MANIFEST:
                disk = FaultDisk()
                for folder in (RUN.parent, RUN):
                    disk.make_folder(folder)
                disk.put(RUN / MANIFEST, bytes(data), durable=True)
                assert RunDirectory.open(RUN, disk).manifest == manifest, where
            else:
                found_ = unpack(bytes(data))
                assert found_.keys() == truth.keys(), where
                assert all(found_[key].tobytes() == array.tobytes() for key, array in truth.items()), where
        except (DiskError, ValueError, SafetensorError, ResumeMismatch):
            noticed += 1
    return {"files": singles + doubles, "noticed": noticed}


def shuffles(run: Prepared, count: int, seed: int) -> dict[str, int]:
    """Lines of a journal swapped, doubled, taken out or brought in from another run: named, or a torn end at most."""
    expected, _ = alone(run)
    run_id = json.loads(expected[MANIFEST])["run_id"]
    records = _records(expected[JOURNAL], run_id)
    lines = expected[JOURNAL].splitlines(keepends=True)
    disk = FaultDisk()
    disk.put(RUN / JOURNAL, b"", durable=True)
    other_run = Journal(RUN / JOURNAL, "f" * len(run_id), disk)
    for record in records:
        other_run.append(record)
    foreign = disk.files()[str(RUN / JOURNAL)].splitlines(keepends=True)
    random_, noticed = random.Random(seed), 0
    for number in range(count):
        changed, (one, other) = list(lines), random_.sample(range(len(lines)), 2)
        kind = random_.choice(("swapped", "doubled", "taken out", "foreign"))
        match kind:
            case "swapped":
                changed[one], changed[other] = changed[other], changed[one]
            case "doubled":
                changed.insert(other, changed[one])
            case "taken out":
                del changed[one]
            case "foreign":
                changed[one] = foreign[one]
        where = f"seed {seed}, number {number}: {kind} {one}, {other}"
        try:
            found = _records(b"".join(changed), run_id)
        except (JournalCorrupt, ResumeMismatch) as error:
            noticed += 1
            first = next(at for at, pair in enumerate(zip(changed, lines, strict=False), 1) if pair[0] != pair[1])
            said = str(error)
            assert f"journal.log:{first}: " in said, where
        else:
            assert found == records or (kind, one, found) == ("taken out", len(lines) - 1, records[:-1]), where
    return {"files": count, "noticed": noticed}


def _records(data: bytes, run_id: str) -> list[Any]:
    disk = FaultDisk()
    disk.put(RUN / JOURNAL, data, durable=True)
    return Journal(RUN / JOURNAL, run_id, disk).records


def _cuts(run: Prepared, expected: dict[str, bytes], ends: Iterable[int]) -> int:
    whole, count = Lives(run), 0
    whole.going(FaultDisk())
    # What the cut took away is asked for again, all of it.
    whole.doubts = len(whole.log)
    for end in ends:
        disk = FaultDisk()
        disk.make_folder(RUN.parent)
        disk.make_folder(RUN)
        for name in (MANIFEST, CURVE):
            disk.put(RUN / name, expected[name], durable=True)
        disk.put(RUN / JOURNAL, expected[JOURNAL][:end], durable=True)
        found = disk.rebooted("everything")
        whole.ended(found).finished(found, expected, f"journal cut after byte {end}")
        count += 1
    return count
