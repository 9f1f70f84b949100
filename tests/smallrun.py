"""A run of 40 calls on any disk, and what must hold wherever it is stopped."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from faultdisk import FaultDisk

from bbprompt.store.disk import Disk
from bbprompt.store.ledger import Kind, Ledger
from bbprompt.store.rundir import JOURNAL, MANIFEST, PROMPT, RESULT, RunDirectory

RUN = Path("/runs/run")
BUDGET = 40
SETTINGS: dict[str, Any] = {
    "task": "lcqmc",
    "budget": BUDGET,
    "seed": 42,
    "labels": ["不同", "相同"],
    "optimizer": {"sigma": 0.5, "stages": [{"name": "router"}, {"name": "prompt"}], "extra": {}},
    "digests": {"data": "ab" * 32, "backbone": None},
}


class Model:
    """A model that logs what it was asked and checks that each call was paid for, durably, before."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.told: dict[str, float] = {}

    def score(self, call_id: str, disk: Disk) -> float:
        if isinstance(disk, FaultDisk):
            assert not disk.failed or disk.code is None, "a call was sent after the disk had failed"
            assert f'"{call_id}"'.encode() in disk.durable(RUN / JOURNAL), "sent before it was paid"
        self.sent.append(call_id)
        return int.from_bytes(hashlib.sha256(call_id.encode()).digest()[:6], "big") / 2**48

    def tell(self, call_id: str, loss: float, disk: Disk) -> None:
        if isinstance(disk, FaultDisk):
            assert loss.hex().encode() in disk.durable(RUN / JOURNAL), "used before it was durable"
        self.told[call_id] = loss


def work(disk: Disk, model: Model, path: Path = RUN) -> None:
    """Start the run, or go on with it, to its end."""
    begun = disk.exists(path) and MANIFEST in disk.names(path)
    with RunDirectory.open(path, disk) if begun else RunDirectory.create(path, SETTINGS, disk) as run:
        run.check_manifest(SETTINGS)
        if run.finished:
            return
        ledger = Ledger(run.journal(), BUDGET)
        best = 1.0
        for step in range(5):
            for kind, size in _BATCHES:
                ids = [f"{kind}-{step}-{index}" for index in range(size)]
                ledger.reserve(ids, kind)
                doubt = [call_id for call_id in ids if ledger.settled(call_id) is None]
                ledger.settle(doubt, [{"loss": model.score(call_id, disk)} for call_id in doubt])
                for call_id in ids:
                    value = ledger.settled(call_id)
                    assert value is not None
                    model.tell(call_id, value["loss"], disk)
                    best = min(best, value["loss"])
            run.append_curve(ledger.asked, "prompt", best, None, (0.0, 0.0))
        ledger.reserve(["test"], "test")
        ledger.settle(["test"], [{"loss": model.score("test", disk)}])
        assert not ledger.unclaimed
        assert ledger.in_doubt == ()
        run.write_bytes(PROMPT, best.hex().encode() * 10)
        run.write_json(RESULT, {"dev": best, "calls": ledger.by_kind})


_BATCHES: tuple[tuple[Kind, int], ...] = (("train", 6), ("dev", 2))


def undisturbed() -> tuple[dict[str, bytes], int]:
    disk = FaultDisk()
    work(disk, Model())
    return disk.files(), len(disk.operations)


FILES, OPERATIONS = undisturbed()


def check_journal(data: bytes, model: Model) -> None:
    """Judge a journal: never over the limit, settled only what is reserved, told only what stands in it."""
    reserved: dict[str, str] = {}
    settled: dict[str, float] = {}
    for line in data.splitlines():
        record = json.loads(line.rpartition(b" ")[0])["record"]
        if record["op"] == "reserve":
            assert not reserved.keys() & set(record["ids"])
            reserved |= dict.fromkeys(record["ids"], record["kind"])
        else:
            values = [float.fromhex(value["loss"]) for value in record["values"]]
            assert not settled.keys() & set(record["ids"])
            settled |= dict(zip(record["ids"], values, strict=True))
        assert sum(kind != "test" for kind in reserved.values()) <= BUDGET
        assert settled.keys() <= reserved.keys()
    assert model.told.items() <= settled.items()
    assert set(model.sent) <= reserved.keys()


def check_rest(disk: FaultDisk, model: Model) -> None:
    """Judge what a stopped run left: each file whole or absent, the journal a prefix of the full one."""
    files = disk.files()
    for name in (MANIFEST, PROMPT, RESULT):
        assert files.get(str(RUN / name)) in (None, FILES[str(RUN / name)])
    journal = files.get(str(RUN / JOURNAL), b"")
    assert FILES[str(RUN / JOURNAL)].startswith(journal)
    check_journal(journal[: journal.rfind(b"\n") + 1], model)


def finish(disk: FaultDisk, model: Model, stops: int) -> None:
    """Go on to the end and compare with the run that was left alone."""
    work(disk, model)
    assert disk.files() == FILES
    check_journal(FILES[str(RUN / JOURNAL)], model)
    sent = Counter(model.sent)
    assert len(sent) == BUDGET + 1
    assert max(sent.values()) <= 1 + stops
    assert sum(sent.values()) <= BUDGET + 1 + stops * 6  # only what was in doubt was sent again
