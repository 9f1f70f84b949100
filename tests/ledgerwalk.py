"""A long random walk over a ledger beside a model of two dicts.

`test_ledger` lets Hypothesis look for a short failing sequence; this walks by the hundred thousand. Every step is
checked at once, and after each crash the ledger that a new process finds is compared with the model.
"""

from __future__ import annotations

import errno
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

from faultdisk import IMAGES, Crash, FaultDisk

from bbprompt.errors import DiskError
from bbprompt.store.journal import Journal
from bbprompt.store.ledger import BudgetExhausted, Ledger, LedgerError

PATH = Path("/journal.log")
LOSSES = (0.1, 1 / 3, -0.0, 5e-324, float("nan"), float("inf"))
STEPS = 50


class Walk:
    """One run's ledger and what it must hold."""

    def __init__(self, random_: random.Random) -> None:
        self.random = random_
        self.limit = random_.choice([0, 1, 3, 8, 20])
        self.names = [f"c{number}" for number in range(24)]
        self.kinds: dict[str, str] = {}
        self.values: dict[str, float] = {}
        self.disk = FaultDisk()
        self.ledger = Ledger(Journal(PATH, "walk", self.disk), self.limit)

    def batch(self) -> list[str]:
        return self.random.choices(self.names, k=self.random.randint(0, 5))

    def reserve(self) -> None:
        batch, kind = self.batch(), self.random.choice(["train", "train", "dev", "test"])
        new = set(batch) - self.kinds.keys()
        allowed = all(self.kinds.get(name, kind) == kind for name in batch)
        fits = kind == "test" or self.counted() + len(new) <= self.limit
        try:
            self.ledger.reserve(batch, kind)  # type: ignore[arg-type]
        except (LedgerError, BudgetExhausted) as error:
            assert not (allowed and fits), f"refused: {error}"  # noqa: PT017
        else:
            assert allowed, "one id under two kinds"
            assert fits, "more than the limit"
            self.kinds |= dict.fromkeys(new, kind)

    def settle(self) -> None:
        batch, loss = self.batch(), self.random.choice(LOSSES)
        allowed = not batch or (
            abs(loss) < float("inf")
            and all(name in self.kinds for name in batch)
            and all(self.values.get(name, loss).hex() == loss.hex() for name in batch)
        )
        try:
            self.ledger.settle(batch, [{"loss": loss}] * len(batch))
        except LedgerError as error:
            assert not allowed, f"refused: {error}"  # noqa: PT017
        else:
            assert allowed, f"{loss} was settled for {batch}"
            self.values |= dict.fromkeys(batch, loss)

    def crash(self) -> None:
        """Die in the middle of an operation, or between two; what was acknowledged must be there."""
        before = dict(self.kinds), dict(self.values)
        if self.random.random() < 0.7:
            self.disk.fail_at = len(self.disk.operations) + self.random.randint(1, 2)
            self.disk.code = self.random.choice([None, errno.ENOSPC, errno.EIO])
            with suppress(Crash, DiskError):
                self.random.choice([self.reserve, self.settle])()
        self.disk = self.disk.rebooted(self.random.choice(IMAGES), self.random.random())
        self.ledger = ledger = Ledger(Journal(PATH, "walk", self.disk), self.limit)
        assert before[0].items() <= ledger._kinds.items(), "an acknowledged reservation is lost"
        found = {name: value["loss"] for name, value in ledger._values.items()}
        assert before[1].items() <= found.items(), "an acknowledged value is lost"
        self.kinds, self.values = dict(ledger._kinds), found  # a last line may be there that was not acknowledged

    def check(self) -> None:
        ledger = self.ledger
        assert ledger.reserved == self.counted() <= self.limit
        assert ledger.remaining == self.limit - ledger.reserved
        assert set(ledger.in_doubt) == self.kinds.keys() - self.values.keys()
        assert all(ledger.settled(name) == {"loss": value} for name, value in self.values.items())

    def counted(self) -> int:
        return sum(kind != "test" for kind in self.kinds.values())


def walks(operations: int, seed: int) -> dict[str, Any]:
    """Walk so many steps, in runs of `STEPS`; the counts."""
    crashes = done = 0
    for number in range(-(-operations // STEPS)):
        walk = Walk(random.Random(f"{seed} {number}"))
        for step in range(STEPS):
            action = walk.random.choices([walk.reserve, walk.settle, walk.crash], [5, 4, 1])[0]
            try:
                action()
                walk.check()
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, walk {number}, step {step}, {action.__name__}: {error}") from error
            crashes += action == walk.crash
            done += 1
    return {"seed": seed, "operations": done, "crashes": crashes}
