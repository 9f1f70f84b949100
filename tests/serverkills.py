"""Kill a real server (SIGKILL), and now and then its client, at random instants, and compare the end of the run.

Called as ``python serverkills.py --kills 100 --seed 1``; the last line of standard output is a JSON object with the
counts. The server appends what it carries out to a log of its own before it answers; that log is what `audit` holds
the journal of the client against. Both are forked children, so that a new one is there in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import toyruns
from audit import Execution, audit, settled
from servers import free_port

from bbprompt.backends.calls import Policy
from bbprompt.backends.http import HttpOracle
from bbprompt.errors import OracleError
from bbprompt.oracle import Scores, TextBatch
from bbprompt.run import Prepared
from bbprompt.scoring import labelled
from bbprompt.serve.server import build_server, listen
from bbprompt.serve.settings import ServeSettings
from bbprompt.store.rundir import JOURNAL
from bbprompt.testing import ToyOracle

POINTS = 3  # candidates a request
MOST_DEATHS = 5
GONE = 69  # exit code of a client whose server does not come back in time


class Diary(ToyOracle):
    """Writes every request and its answer down, in one append, before it answers."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def score(self, batch: TextBatch, points: Any, *more: Any) -> Scores:
        scores = super().score(batch, points, *more)
        entry = {
            "batch": batch.digest(),
            "points": [row.tobytes().hex() for row in np.asarray(points, "<f4")],
            "logits": scores.logits.tobytes().hex(),
            "normalizer": scores.normalizer.tobytes().hex(),
        }
        os.write(self._file, json.dumps(entry).encode() + b"\n")
        return scores


@dataclass
class Stage:
    """A run, where its server listens, and what the server wrote down."""

    run: Prepared
    port: int = field(default_factory=free_port)
    url: str = ""

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"
        self.kinds = {}
        for kind, examples in (("train", self.run.few.train), ("dev", self.run.few.dev), ("test", self.run.test)):
            data = labelled(self.run.task, examples, for_loss=kind != "test")
            self.kinds[data.batch.digest()] = kind, data

    def server(self, diary: Path) -> int:
        """Process id of a server that is ready."""
        out, into = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(out)
            _born(lambda: self._serve(diary, into))
        os.close(into)
        assert os.read(out, 1) == b"+", "the server does not start"
        os.close(out)
        return pid

    def _serve(self, diary: Path, into: int) -> None:
        settings = ServeSettings(points=POINTS, drain=1.0)
        with listen("127.0.0.1", self.port, None) as listening:

            def ready() -> None:
                os.write(into, b"+")

            server = build_server(Diary(diary), settings, ready=ready)
            server.run(sockets=[listening])

    def client(self, folder: Path) -> int:
        """Process id of a client that begins the run or goes on with it."""
        pid = os.fork()
        if not pid:
            _born(lambda: self._tune(folder))
        return pid

    def _tune(self, folder: Path) -> None:
        policy = Policy(pause=0.02, longest=0.1, deadline=5.0)
        oracle = HttpOracle(self.url, workers=2, policy=policy)
        toyruns.tuned(replace(self.run, oracle=oracle), folder)

    def log(self, diary: Path) -> list[Execution]:
        """What the server carried out, judged by the readout."""
        found = []
        for line in diary.read_bytes().splitlines():
            entry = json.loads(line)
            kind, data = self.kinds[entry["batch"]]
            count, texts = len(entry["points"]), len(data.batch.forms)
            logits = np.frombuffer(bytes.fromhex(entry["logits"]), "<f4").reshape(count, -1, 2)
            normalizer = np.frombuffer(bytes.fromhex(entry["normalizer"]), "<f4").reshape(count, texts, 2)
            rows, losses = tuple(bytes.fromhex(row) for row in entry["points"]), np.zeros(count)
            if kind != "test":
                scores = Scores(logits, normalizer, None, 0)
                losses = self.run.readout.losses(scores, data.batch, data.gold).mean(axis=1)
            found.append(Execution(kind, rows, tuple(losses.tolist()), 0))
        return found


def _born(life: Any) -> None:
    """Live as a forked child, and end with an exit code."""
    try:
        life()
    except OracleError as error:
        os._exit(error.exit_code)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


@contextmanager
def watching(pid: int) -> Iterator[int]:
    """A descriptor that can be read once a process has ended."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _ended(pid: int, within: float | None = None) -> int | None:
    """Exit code of a child once it has ended; None if it goes on after so many seconds."""
    with watching(pid) as descriptor:
        if not select.select([descriptor], [], [], within)[0]:
            return None
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def story(stage: Stage, root: Path, random_: random.Random, span: float) -> tuple[Counter[str], list[frozenset[str]]]:
    """A run in which server and client die up to `MOST_DEATHS` times; what happened, and what each client left."""
    counts: Counter[str] = Counter()
    kept: list[frozenset[str]] = []
    folder, diary = root / "run", root / "diary"
    server, client = stage.server(diary), stage.client(folder)
    deaths = random_.randint(1, MOST_DEATHS)
    try:
        while True:
            code = _ended(client, random_.uniform(0, 0.7 * span) if deaths else None)
            if code == 0:
                break
            if code is None:
                deaths -= 1
                victim = random_.choice(["server", "server", "client", "both"])
                counts["deaths"] += 1
                if victim != "client":
                    counts["servers"] += 1
                    _kill(server)
                    if random_.random() < 0.5:
                        time.sleep(random_.uniform(0, 0.3))
                    if victim == "both":
                        _kill(client)
                    server = stage.server(diary)
                else:
                    _kill(client)
                if victim == "server":
                    continue
                counts["clients"] += 1
            else:
                assert code == GONE, f"the client ended with {code}"
                counts["gave up"] += 1
            journal = folder / JOURNAL
            kept.append(settled(journal.read_bytes()) if journal.exists() else frozenset())
            client = stage.client(folder)
    finally:
        _kill(server)
    return counts, kept


def campaign(kills: int, seed: int, method: str = "all-time", budget: int = 60) -> dict[str, Any]:
    """Stories until so many servers were killed; the counts."""
    run = toyruns.prepared(toyruns.METHODS[method], budget)
    stage, total = Stage(run), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        toyruns.tuned(run, root / "warm")  # here, so that every child is born with its libraries loaded
        (root / "whole").mkdir()
        server = stage.server(root / "whole" / "diary")
        began = time.monotonic()
        assert _ended(stage.client(root / "whole" / "run")) == 0
        span = time.monotonic() - began
        _kill(server)
        whole = toyruns.outcome({path.name: path.read_bytes() for path in (root / "whole" / "run").iterdir()})
        number = 0
        while total["servers"] < kills:
            number += 1
            (folder := root / f"story-{number}").mkdir()
            counts, kept = story(stage, folder, random.Random(f"{seed} {number}"), span)
            where = f"seed {seed}, story {number}, {dict(counts)}"
            found = toyruns.outcome({path.name: path.read_bytes() for path in (folder / "run").iterdir()})
            for file, data in whole.items():
                assert found[file] == data, f"{where}: {file} differs from that of the run left alone"
            # A server that died had two requests at most in doubt; a client that died, a whole generation.
            doubts = 2 * counts["servers"] + (-(-20 // POINTS)) * len(kept)
            try:
                audit((folder / "run" / JOURNAL).read_bytes(), budget, stage.log(folder / "diary"), kept, doubts=doubts)
            except AssertionError as error:
                raise AssertionError(f"{where}: {error}") from error
            total.update({"runs": 1, **counts})
    killed = total["servers"] + total["clients"]
    return {"seed": seed, "seconds of a run": round(span, 3), "killed": killed, **total}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100, help="of servers")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(json.dumps(campaign(given.kills, given.seed)))


if __name__ == "__main__":
    main()
