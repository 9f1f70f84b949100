"""Whole runs on a model server that fails in every way a server can, as the client sees it.

The server is `Site`: it answers through the HTTP library's mock transport, keeps a log of what it carried out, and
plays `FAULTS` where a script says so. `matrix` tries every fault at the first, a middle and the last call, once, twice
and for ever; `schedules` draws them at random. Each run is resumed until it ends, and `audit` holds its journal
against the log of the server. Clock and pauses are not real.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, Literal

import crashes
import httpx2
import numpy as np
import oipdouble
import toyruns
from audit import Execution, audit, paid, settled
from faultdisk import FaultDisk
from faults import BEFORE, FAULTS, Request, Response, again

from bbprompt import wire
from bbprompt.backends.calls import Policy
from bbprompt.backends.http import HttpOracle
from bbprompt.backends.oip import OipOracle
from bbprompt.errors import OracleError
from bbprompt.oracle import Oracle, Scores, TextBatch
from bbprompt.run import Prepared
from bbprompt.scoring import labelled
from bbprompt.store.rundir import JOURNAL

RUN = crashes.RUN
POINTS = 4  # candidates a request, so that a generation is several
PROTOCOLS = ("http", "kserve")
Protocol = Literal["http", "kserve"]


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Site:
    """A server on a toy model, with a memory of its replies or without, and a fault where the script says.

    Attributes:
        run: What is tuned.
        script: The fault for the exchange with this number (from 1, scores only), or None.
        remembers: Whether a repeated request is answered from memory.
        log: What was carried out.
        faults: How often each fault was played.
        sends: How often each request arrived in this life of the run.
        doubts: Answers that were carried out and spoiled or lost.
        points: Most candidates in a request.
    """

    run: Prepared
    oracle: Oracle
    protocol: Protocol
    disk: FaultDisk
    script: Callable[[Site, Request], str | None] = lambda site, request: None
    remembers: bool = True
    log: list[Execution] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    sends: Counter[bytes] = field(default_factory=Counter)
    life: int = 0
    scored: int = 0
    doubts: int = 0
    lying: float = 0.0
    points: int = POINTS

    def __post_init__(self) -> None:
        few, self.kinds = self.run.few, dict[TextBatch, tuple[str, Any]]()
        for kind, examples in (("train", few.train), ("dev", few.dev), ("test", self.run.test)):
            data = labelled(self.run.task, examples, for_loss=kind != "test")
            self.kinds[data.batch] = kind, data
        self.lock = threading.Lock()  # like a server that remembers, it carries out one request at a time
        self.batches: dict[str, TextBatch] = {}
        self.replies: dict[str, bytes] = {}
        self.answers: list[tuple[Any, Response]] = []  # to the last two requests that differ, each with its request
        kept = 2**20 if self.remembers else 0
        self.double = oipdouble.Double(self, points=self.points, replies=kept).transport()  # type: ignore[arg-type]

    # The oracle that both protocols ask: what is asked here was carried out.

    @property
    def info(self) -> Any:
        return self.oracle.info

    def close(self) -> None:
        """Nothing is held."""

    def score(self, batch: TextBatch, points: Any, *more: Any) -> Scores:
        kind, data = self.kinds[batch]
        scores = self.oracle.score(batch, points, *more)
        if self.lying:
            scores = replace(scores, logits=scores.logits - np.float32(self.lying) * np.arange(2, dtype="f4"))
        losses = self.run.readout.losses(scores, data.batch, data.gold).mean(axis=1) if kind != "test" else np.zeros(1)
        entry = Execution(kind, tuple(row.tobytes() for row in points), tuple(losses.tolist()), self.life)
        assert paid(self.disk.durable(RUN / JOURNAL), entry), f"{len(points)} {kind} calls were sent unpaid"
        self.log.append(entry)
        return scores

    # The server.

    def __call__(self, request: Request) -> Response:
        asked = request.read()
        if request.url.path == "/v1/score" or (request.url.path.endswith("/infer") and b'"points"' in asked[:1000]):
            self.scored += 1
            self.sends[asked] += 1
        name = self.script(self, request)
        if name is None:
            return self.good(request, asked)
        fault = FAULTS[name]
        self.faults[name] += 1
        before = len(self.log)
        good = self.good(request, asked) if fault.executed else None
        self.doubts += len(self.log) > before
        if fault.course == "lie":
            self.lying += 0.125
        return fault.play(request, good)

    def good(self, request: Request, asked: bytes) -> Response:
        with self.lock:
            answer = self._good(request, asked)
            if not self.answers or self.answers[-1][0] != (request.url, asked):  # a repeated request is the same one
                self.answers = [*self.answers[-1:], ((request.url, asked), again(answer))]
            answer.extensions[BEFORE] = self.answers[0][1]
            return answer

    def _good(self, request: Request, asked: bytes) -> Response:
        if self.protocol == "kserve":
            return self.double.handle_request(request)
        if request.url.path == "/v1/info":
            limits = {"points": self.points, "texts": 100, "body": 10**6}
            return Response(200, json={"protocol": 1, "version": "0", "model": asdict(self.info), "limits": limits})
        if request.method == "PUT":
            batch = wire.decode_batch(asked, most=100)
            self.batches[batch.digest()] = batch
            return Response(201)
        wanted = wire.decode_request(asked, layers=self.info.layers, dim=self.info.dim, most=self.points)
        if not self.remembers or wanted.call_id not in self.replies:
            scores = self.score(self.batches[wanted.batch], wanted.points, wanted.support, wanted.longest_answer)
            self.replies[wanted.call_id] = wire.encode_reply(wanted.call_id, scores)
        return Response(200, content=self.replies[wanted.call_id])


#: Under a clock that stands still but for pauses; the quota is tested by itself.
def patient(clock: Clock, *, resend: bool = True) -> Policy:
    return Policy(sleep=clock.sleep, clock=clock, quota=10_000, resend=resend)


def live(site: Site, workers: int = 1, clock: Clock | None = None) -> OracleError | None:
    """One life of the run, to its end or to the error that ends it."""
    opener, url = {"http": (HttpOracle, "http://site"), "kserve": (OipOracle, "kserve://site:1/oracle")}[site.protocol]
    site.sends.clear()
    oracle = None
    try:
        policy = patient(clock or Clock(), resend=site.run.config.resends)
        oracle = opener(url, workers=workers, policy=policy, transport=httpx2.MockTransport(site))
        toyruns.tuned(replace(site.run, oracle=oracle), RUN, site.disk)
    except OracleError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert error.exit_code == 69, error  # noqa: PT017
        return error
    finally:
        if oracle is not None:
            oracle.close()
    return None


class Stage:
    """What all runs of a campaign share: the run, its model, and what it finds when nothing goes wrong."""

    def __init__(self, protocol: Protocol = "http", method: str = "joint", budget: int = 40) -> None:
        self.protocol, self.run = protocol, crashes.small(method, budget)
        self.expected, self.calls = self.alone()
        assert self.calls > 8

    def site(self, script: Any = lambda site, request: None, *, remembers: bool = True) -> Site:
        return Site(self.run, self.run.oracle, self.protocol, FaultDisk(), script, remembers)

    def alone(self) -> tuple[dict[str, bytes], int]:
        site = self.site()
        assert live(site) is None
        return crashes.left(site.disk), site.scored

    def end(self, site: Site, kept: list[frozenset[str]], where: str, *, identical: bool = True) -> None:
        """The checker, and the comparison with the run that nothing happened to."""
        found, whole = toyruns.outcome(crashes.left(site.disk)), toyruns.outcome(self.expected)
        for name, data in whole.items() if identical else ():
            assert found[name] == data, f"{where}: {name} differs from that of the run left alone"
        pieces = -(-40 // POINTS)  # of a generation that was cut short by a death, all of which are sent again
        doubts = 0 if site.remembers else site.doubts + pieces * len(kept)
        journal = site.disk.durable(RUN / JOURNAL)
        try:
            audit(journal, self.run.config.budget, site.log, kept, doubts=doubts, fickle=not identical)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error

    def kept(self, site: Site) -> frozenset[str]:
        return settled(site.disk.durable(RUN / JOURNAL))


def matrix(protocol: Protocol, names: Iterable[str] = FAULTS, method: str = "joint") -> dict[str, int]:
    """Each fault at the first, a middle and the last call, once, twice, for ever; the counts."""
    stage, counts = Stage(protocol, method, budget=24), Counter[str]()
    for name in names:
        counts += cases(stage, name)
    return dict(counts)


def cases(stage: Stage, name: str) -> Counter[str]:
    """The nine cases of one fault; the counts."""
    fault, counts = FAULTS[name], Counter[str]()
    for at, times in product((1, stage.calls // 2, stage.calls), (1, 2, 10**9)):
        where = f"{stage.protocol}, {name} at call {at} of {stage.calls}, {times} times"

        def script(site: Site, request: Request, at: int = at, times: int = times) -> str | None:
            due = site.scored >= at and site.faults[name] < times and site.sends[request.read()]
            return name if due else None

        remembers = fault.course != "lie" and bool(at % 2)
        site, kept = stage.site(script, remembers=remembers), list[frozenset[str]]()
        error = live(site)
        most = {"transient": 4, "malformed": 2, "final": 1, "lie": 4}[fault.course]
        assert (error is not None) == (times >= most), f"{where}: {error}"
        asked = max(site.sends.values())
        assert asked == (most if error else times + 1), f"{where}: a request was sent {asked} times"
        while error is not None:
            kept.append(stage.kept(site))
            site.life += 1
            if times > 2:
                site.script = lambda site, request: None  # somebody has mended the server
            error = live(site)
        assert len(kept) == (0 if times < most else times if times <= 2 else 1) or fault.course == "malformed", where
        stage.end(site, kept, where, identical=fault.course != "lie")
        counts.update({"cases": 1, "faults": site.faults.total(), "deaths": len(kept)})
    return counts


def schedules(count: int, seed: int, stage: Stage, first: int = 0) -> dict[str, Any]:
    """Runs in which any exchange goes wrong by chance, each with a rate of its own; the counts.

    Args:
        count: How many.
        seed: Of all of them.
        stage: What they share.
        first: Number of the first, so that several processes can share the work.
    """
    total: Counter[str] = Counter()
    names = [name for name, fault in FAULTS.items() if fault.course != "lie"]
    passing = [name for name in names if FAULTS[name].course == "transient"]
    for number in range(first, first + count):
        random_ = random.Random(f"{seed} {number}")
        rate, deadly = random_.uniform(0.01, 0.5), random_.choice([0.0, 0.1, 0.5])

        def script(
            site: Site, request: Request, random_: random.Random = random_, rate: float = rate, deadly: float = deadly
        ) -> str | None:
            if site.life >= 8 or random_.random() >= rate:
                return None
            name = random_.choice(names if random_.random() < deadly else passing)
            # Only an answer with scores can be spoiled in its numbers.
            return name if site.sends[request.read()] or FAULTS[name].course != "malformed" else "503"

        site, kept = stage.site(script, remembers=random_.random() < 0.5), list[frozenset[str]]()
        workers = random_.choice([1, 1, 1, 3])
        while (error := live(site, workers, clock := Clock())) is not None:
            assert max(site.sends.values(), default=0) <= 4, f"seed {seed}, schedule {number}: {error}"
            kept.append(stage.kept(site))
            site.life += 1
        assert max(site.sends.values(), default=0) <= 4
        assert clock.now <= 60.0 * 3 * len(site.sends) + 300
        stage.end(site, kept, f"seed {seed}, schedule {number}")
        total.update({"schedules": 1, "faults": site.faults.total(), "deaths": len(kept), "requests": len(site.log)})
    return {"seed": seed, "protocol": stage.protocol, **total}
