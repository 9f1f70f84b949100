"""Kill a whole run (SIGKILL) at random instants, again and again, and compare its end with a run left alone.

Called as ``python kills.py --kills 40 --seed 1``; the last line of standard output is a JSON object with the counts.
The oracle lives in this process, on the other side of a socket, and keeps its own log: no kill touches it, so it is
the truth that `audit` holds the journal against. The run is a forked child with nothing but its directory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import toyruns
from audit import Audit, Execution, audit, paid, settled

from bbprompt.oracle import Oracle, OracleInfo, Scores, TextBatch
from bbprompt.run import Prepared
from bbprompt.scoring import labelled
from bbprompt.store.rundir import JOURNAL, RESULT

_REQUEST = struct.Struct("<32sI")
_REPLY = struct.Struct("<IIIi")
MOST_KILLS = 5


class Remote:
    """The driver's side: sends points and receives scores, over a socket that the oracle's process holds the end of."""

    def __init__(self, connection: socket.socket, info: OracleInfo) -> None:
        self.connection, self.info = connection, info

    def score(self, batch: TextBatch, points: Any, *more: Any) -> Scores:
        rows = np.ascontiguousarray(points, "<f4")
        self.connection.sendall(_REQUEST.pack(bytes.fromhex(batch.digest()), len(rows)) + rows.tobytes())
        count, options, texts, cut = _REPLY.unpack(_received(self.connection, _REPLY.size))
        logits = np.frombuffer(_received(self.connection, 8 * count * options), "<f4").reshape(count, options, 2)
        normalizer = np.frombuffer(_received(self.connection, 8 * count * texts), "<f4").reshape(count, texts, 2)
        return Scores(logits, normalizer, None, cut)

    def close(self) -> None:
        self.connection.close()


@dataclass
class Server:
    """The oracle's side: answers requests and writes down what it did."""

    run: Prepared
    oracle: Oracle

    def __post_init__(self) -> None:
        self.log: list[Execution] = []
        self.batches: dict[bytes, tuple[str, Any]] = {}
        few = self.run.few
        for kind, examples in (("train", few.train), ("dev", few.dev), ("test", self.run.test)):
            data = labelled(self.run.task, examples, for_loss=kind != "test")
            self.batches[bytes.fromhex(data.batch.digest())] = kind, data

    def serve(self, connection: socket.socket, folder: Path, life: int, before: bool, after: bool) -> bool:
        """Answer one request; return False if the run is to die, before it is carried out or before it is answered."""
        try:
            head = _received(connection, _REQUEST.size)
            digest, count = _REQUEST.unpack(head)
            shape = (count, self.run.oracle.info.layers, self.run.oracle.info.dim)
            rows = np.frombuffer(_received(connection, 4 * int(np.prod(shape))), "<f4").reshape(shape)
        except EOFError:
            return True
        if before:
            return False
        kind, data = self.batches[digest]
        scores = self.oracle.score(data.batch, rows, self.run.readout.support, None)
        losses = self.run.readout.losses(scores, data.batch, data.gold).mean(axis=1)
        entry = Execution(kind, tuple(row.tobytes() for row in rows), tuple(losses.tolist()), life)
        assert paid((folder / JOURNAL).read_bytes(), entry), f"{count} {kind} calls were sent before they were paid for"
        self.log.append(entry)
        if after:
            return False
        texts, options = scores.normalizer.shape[1], scores.logits.shape[1]
        head = _REPLY.pack(count, options, texts, scores.cut)
        with suppress(BrokenPipeError):
            connection.sendall(head + scores.logits.tobytes() + scores.normalizer.tobytes())
        return True


def _received(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


@dataclass(frozen=True)
class Death:
    """When a life ends: after some seconds, or at the n-th request, before or after it is carried out."""

    kind: str = "never"
    at: float = 0.0


def live(server: Server, folder: Path, life: int, death: Death) -> bool:
    """One process of the run, to its end or its death; whether it was killed."""
    ours, theirs = socket.socketpair()
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        ours.close()
        _child(server.run, folder, theirs)
    theirs.close()
    requests = 0
    with ours:
        while True:
            wait = None if death.kind != "instant" else max(began + death.at - time.monotonic(), 0.0)
            ready, _, _ = select.select([ours], [], [], wait)
            if not ready:
                break
            if not ours.recv(1, socket.MSG_PEEK):
                return _ended(pid)
            requests += 1
            due = death.at == requests
            if not server.serve(ours, folder, life, due and death.kind == "sent", due and death.kind == "carried out"):
                break
        os.kill(pid, signal.SIGKILL)
        return _ended(pid)


def _ended(pid: int) -> bool:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the run ended with exit code {code}"
    return code == -signal.SIGKILL


def _child(run: Prepared, folder: Path, connection: socket.socket) -> None:
    try:
        toyruns.tuned(replace(run, oracle=Remote(connection, run.oracle.info)), folder)
    except BaseException as error:
        print(f"{folder.name}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def story(server: Server, folder: Path, expected: dict[str, bytes], random_: random.Random, span: float) -> list[str]:
    """One run with up to `MOST_KILLS` deaths; returns the kinds of those that struck."""
    server.log = []
    kept: list[frozenset[str]] = []
    deaths: list[str] = []
    for life in range(random_.randint(1, MOST_KILLS)):
        kind = random_.choice(["instant", "instant", "sent", "carried out"])
        death = Death(kind, random_.uniform(0, span) if kind == "instant" else random_.randint(1, 8))
        if not live(server, folder, life, death):
            break
        deaths.append(kind)
        journal = folder / JOURNAL
        kept.append(settled(journal.read_bytes()) if journal.exists() else frozenset())
        assert not (folder / RESULT).exists() or json.loads((folder / RESULT).read_bytes())
    live(server, folder, len(kept), Death())
    found = toyruns.outcome({path.name: path.read_bytes() for path in folder.iterdir()})
    whole = toyruns.outcome(expected)
    for name, data in whole.items():
        assert found[name] == data, f"{name} differs from that of the run left alone after {deaths}"
    check(server, folder, kept)
    return deaths


def check(server: Server, folder: Path, kept: list[frozenset[str]]) -> Audit:
    """Hold the journal against the oracle's log."""
    return audit((folder / JOURNAL).read_bytes(), server.run.config.budget, server.log, kept)


def campaign(kills: int, seed: int, method: str = "all-time", budget: int = 60) -> dict[str, Any]:
    """Run stories until so many kills have struck; the counts."""
    run = toyruns.prepared(toyruns.METHODS[method], budget)
    server = Server(run, run.oracle)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        toyruns.tuned(run, root / "warm")  # here, so that every child is born with its libraries loaded
        began = time.monotonic()
        live(server, root / "whole", 0, Death())
        span = time.monotonic() - began
        expected = {path.name: path.read_bytes() for path in (root / "whole").iterdir()}
        for number in range(10 * kills):
            if counts["kills"] >= kills:
                break
            random_ = random.Random(f"{seed} {number}")
            try:
                deaths = story(server, root / f"run-{number}", expected, random_, 1.1 * span)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, run {number}: {error}") from error
            counts.update({"runs": 1, "kills": len(deaths), **Counter(deaths)})
    return {"seed": seed, "method": method, "budget": budget, "seconds of a run": round(span, 3), **counts}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--method", default="all-time")
    parser.add_argument("--budget", type=int, default=60)
    given = parser.parse_args()
    print(json.dumps(campaign(given.kills, given.seed, given.method, given.budget)))


if __name__ == "__main__":
    main()
