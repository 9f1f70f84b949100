"""Runs at a server that knows no repeated request and charges for each, with both answers to what is in doubt.

A run is killed before or after a request is carried out, again and again, and answers are lost or spoiled on the way.
`charge` must never be charged for more candidates than the budget; `resend` must end as if nothing had happened, and
pay twice for no more requests than were under way at a death or whose answer did not come whole.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import crashes
import toyruns
from audit import Execution, audit, batches, settled
from faultdisk import IMAGES, FaultDisk
from faults import FAULTS, Request
from httpfaults import Site, live

from bbprompt.oracle import Scores, TextBatch
from bbprompt.run import Prepared
from bbprompt.store.rundir import JOURNAL

Choice = Literal["charge", "resend"]
CHOICES: tuple[Choice, ...] = ("charge", "resend")
_PLACE = crashes.RUN / JOURNAL
#: Between two deaths: what may pass, so that the run goes on where it is allowed to.
_LOST = [name for name, fault in FAULTS.items() if fault.course in ("transient", "malformed")]


class Death(BaseException):
    """The process is gone."""


class Till(Site):
    """A server that counts the candidates that it charges for, and looks whether the run has counted them, too."""

    charged = 0

    def score(self, batch: TextBatch, points: Any, *more: Any) -> Scores:
        kind = self.kinds[batch][0]
        self.charged += len(points) if kind != "test" else 0
        if self.run.config.on_doubt == "resend":
            return super().score(batch, points, *more)
        counted = sum(len(ids) for kind, ids in batches(self.disk.durable(_PLACE)) if kind != "test")
        assert self.charged <= counted <= self.run.config.budget, f"{self.charged} charged, {counted} counted"
        self.log.append(Execution(kind, (), (), self.life))
        return self.oracle.score(batch, points, *more)


class Trials:
    """Runs of one method and budget, and how they end when nothing happens to them."""

    def __init__(self, method: str = "joint", budget: int = 40) -> None:
        run = crashes.small(method, budget)
        # As the runs that are to end as if nothing had happened: they are compared with their manifests.
        self.run = replace(run, config=run.config.model_copy(update={"on_doubt": "resend"}))
        self.expected: dict[int, dict[str, bytes]] = {}
        journal = self.calm(1)[JOURNAL]
        self.largest = max(len(ids) for _, ids in batches(journal))

    def calm(self, points: int) -> dict[str, bytes]:
        """What a run leaves that is sent in pieces of so many."""
        if points not in self.expected:
            site = Site(self.run, self.run.oracle, "http", FaultDisk(), points=points)
            assert live(site) is None
            self.expected[points] = crashes.left(site.disk)
        return self.expected[points]

    def one(self, choice: Choice, seed: str) -> Counter[str]:
        """One run from its beginning to its end; what happened to it."""
        random_ = random.Random(seed)
        workers, deadly, rate = random_.choice([1, 2, 4]), random_.randint(1, 6), random_.choice([0.0, 0.05, 0.2])
        due = random_.randint(1, 8)

        def script(site: Site, request: Request) -> str | None:
            nonlocal due
            asked = request.read()
            if not site.sends[asked] or site.life >= deadly:
                return None
            due -= 1
            if due == 0:
                if random_.random() < 0.7:
                    site.good(request, asked)
                raise Death
            return random_.choice(_LOST) if random_.random() < rate else None

        run = replace(self.run, config=self.run.config.model_copy(update={"on_doubt": choice}))
        points = -(-self.largest // workers)  # no batch has more pieces than there are workers
        site, kept = Till(run, run.oracle, "http", FaultDisk(), script, remembers=False, points=points), []
        while not self._ends(site, workers):
            kept.append(settled(site.disk.durable(_PLACE)))
            site.disk = site.disk.rebooted(random_.choice(IMAGES), random_.random())
            site.life, due = site.life + 1, random_.randint(1, 8)
        extra = 0
        if choice == "resend":
            self._same(run, crashes.left(site.disk), points)
            journal = site.disk.durable(_PLACE)
            found = audit(journal, run.config.budget, site.log, kept, doubts=site.doubts + workers * len(kept))
            extra = found.repeated
        over = site.charged > run.config.budget
        return Counter(trials=1, deaths=len(kept), lost=site.doubts, **{"charged twice": extra, "over budget": over})

    @staticmethod
    def _ends(site: Site, workers: int) -> bool:
        try:
            return live(site, workers) is None
        except Death:
            return False

    def _same(self, run: Prepared, files: dict[str, bytes], points: int) -> None:
        found, whole = toyruns.outcome(files), toyruns.outcome(self.calm(points))
        for name, data in whole.items():
            assert found[name] == data, f"{name} differs from that of the run left alone"


def trials(count: int, seed: int) -> dict[str, Any]:
    """So many runs with each choice; the counts of both."""
    stages = [Trials("joint", 40), Trials("all-time", 50)]
    total: dict[str, Counter[str]] = {choice: Counter() for choice in CHOICES}
    for choice in CHOICES:
        for number in range(count):
            name = f"{seed} {choice} {number}"
            try:
                total[choice] += stages[number % len(stages)].one(choice, name)
            except Exception as error:
                raise AssertionError(f"trial {name}: {type(error).__name__}: {error}") from error
    assert not total["charge"]["over budget"]
    return {"seed": seed, **{choice: dict(counts) for choice, counts in total.items()}}
