"""The ledger: never more than the limit, nothing lost, in step with its journal through crashes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from depth import deep
from faultdisk import IMAGES, FaultDisk
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bbprompt.errors import DiskError, JournalCorrupt, ResumeMismatch
from bbprompt.store.journal import Journal
from bbprompt.store.ledger import BudgetExhausted, Kind, Ledger, LedgerError

PATH = Path("/journal.log")
RUN = "0123456789abcdef"


def ledger_on(disk: FaultDisk, limit: int) -> Ledger:
    return Ledger(Journal(PATH, RUN, disk), limit)


def ids(count: int, start: int = 0) -> list[str]:
    return [f"call-{number}" for number in range(start, start + count)]


def lines(disk: FaultDisk) -> int:
    return disk.durable(PATH).count(b"\n")


@pytest.fixture
def disk() -> FaultDisk:
    return FaultDisk()


@pytest.mark.parametrize("limit", [0, 1, 19, 20, 21, 39, 40])
def test_the_limit_is_exact(disk: FaultDisk, limit: int) -> None:
    ledger = ledger_on(disk, limit)
    size, start = 20, 0
    while size and start < 100:
        size = min(size, ledger.remaining)
        if size < 20:
            before = disk.files()
            with pytest.raises(BudgetExhausted, match=rf"20 more train calls .* {size} of --budget {limit} left"):
                ledger.reserve(ids(20, start), "train")
            assert disk.files() == before
        ledger.reserve(ids(size, start), "train")
        start += size
    assert ledger.reserved == min(limit, 100)
    assert ledger.remaining == limit - ledger.reserved
    if not ledger.remaining:
        with pytest.raises(BudgetExhausted):
            ledger.reserve(["one more"], "dev")


def refused(ledger: Ledger, disk: FaultDisk, count: int) -> None:
    """So many more calls are refused, as train and as dev calls, and nothing is written of them."""
    before, left = disk.files(), ledger.remaining
    for kind in ("train", "dev"):
        with pytest.raises(
            BudgetExhausted, match=rf"{count} more {kind} calls .* {left} of --budget {ledger.limit} left"
        ):
            ledger.reserve([f"beyond-{number}" for number in range(count)], kind)
    assert disk.files() == before
    assert ledger.remaining == left


@pytest.mark.parametrize("size", [7, 20, 8000])
def test_a_limit_of_8000_is_reached_and_not_passed(disk: FaultDisk, size: int) -> None:
    ledger = ledger_on(disk, 8000)
    refused(ledger, disk, 8001)
    for start in range(0, 8000, size):
        kind: Kind = "dev" if start % 3 else "train"
        if ledger.remaining <= size:
            refused(ledger, disk, ledger.remaining + 1)
        ledger.reserve(ids(min(size, ledger.remaining), start), kind)
    for found in (ledger, ledger_on(disk.rebooted("nothing"), 8000)):
        assert (found.reserved, found.remaining, len(found.in_doubt)) == (8000, 0, 8000)
    refused(ledger, disk, 1)
    ledger.reserve(ids(size), "train")  # paid for already
    assert (ledger.reserved, disk.durable(PATH).count(b"call-")) == (8000, 8000)


def test_a_limit_of_two_to_the_31_is_reached_and_not_passed(disk: FaultDisk) -> None:
    limit = 2**31  # calls: their names alone would take 300 GB, so all but the last 8000 are only counted here
    ledger = ledger_on(disk, limit)
    ledger._counts["train"] = limit - 8000
    ledger.reserve(ids(7999), "train")
    refused(ledger, disk, 2)
    ledger.reserve(["the last"], "dev")
    assert (ledger.reserved, ledger.remaining) == (limit, 0)
    refused(ledger, disk, 1)
    ledger.reserve(["a test call"], "test")
    assert ledger.reserved == limit


def test_train_and_dev_share_the_limit_and_test_is_outside(disk: FaultDisk) -> None:
    ledger = ledger_on(disk, 3)
    ledger.reserve(["a", "b"], "train")
    ledger.reserve(["c"], "dev")
    ledger.reserve(["t1", "t2"], "test")
    assert ledger.by_kind == {"train": 2, "dev": 1, "test": 2}
    assert (ledger.reserved, ledger.remaining) == (3, 0)
    assert ledger.in_doubt == ("a", "b", "c", "t1", "t2")
    ledger.reserve(["b", "a"], "train")  # paid for already: no charge, and no BudgetExhausted


def test_a_batch_is_one_durable_line_each(disk: FaultDisk) -> None:
    ledger = ledger_on(disk, 20)
    ledger.reserve(ids(20), "train")
    assert lines(disk) == 1
    ledger.settle(ids(20), [{"loss": number / 7, "metric": 0.75} for number in range(20)])
    assert lines(disk) == 2
    assert disk.operations.count(f"write {PATH.name}") == 2
    assert disk.operations.count(f"sync {PATH.name}") == 3  # one when it was opened
    assert ledger.settled("call-3") == {"loss": 3 / 7, "metric": 0.75}
    assert ledger.in_doubt == ()


def test_reserving_again_is_free_and_changes_nothing(disk: FaultDisk) -> None:
    ledger = ledger_on(disk, 4)
    ledger.reserve(["a", "b", "a"], "train")
    ledger.settle(["a"], [{"loss": 0.5}])
    before = disk.files()
    ledger.reserve(["b", "a"], "train")
    ledger.reserve([], "dev")
    assert disk.files() == before
    ledger.reserve(["b", "c"], "train")
    assert ledger.reserved == 3
    for kind in ("dev", "test"):
        with pytest.raises(LedgerError, match=f"call a is reserved as train and cannot become {kind}"):
            ledger.reserve(["d", "a"], kind)
    with pytest.raises(LedgerError, match="unknown kind 'canary'"):
        ledger.reserve(["d"], "canary")  # type: ignore[arg-type]
    assert ledger.reserved == 3


def test_settling_twice_is_free_for_the_same_value_only(disk: FaultDisk) -> None:
    ledger = ledger_on(disk, 2)
    ledger.reserve(["a", "b"], "train")
    ledger.settle(["a"], [{"loss": 0.1}])
    before = disk.files()
    ledger.settle(["a", "a"], [{"loss": 0.1}, {"loss": 0.1}])
    ledger.settle([], [])
    assert disk.files() == before
    for other in ({"loss": 0.1 + 2**-54}, {"loss": 0.2}, {"metric": 0.1}, {"loss": 0.1, "metric": 1.0}):
        with pytest.raises(LedgerError, match=r"call a is settled as .* and cannot become"):
            ledger.settle(["b", "a"], [{"loss": 1.0}, other])
    with pytest.raises(LedgerError, match="call b is settled as"):
        ledger.settle(["b", "b"], [{"loss": 0.0}, {"loss": -0.0}])
    assert disk.files() == before
    assert ledger.in_doubt == ("b",)


def test_what_is_not_a_value_of_a_reserved_call_is_refused(disk: FaultDisk) -> None:
    ledger = ledger_on(disk, 2)
    ledger.reserve(["a", "b"], "train")
    before = disk.files()
    for value in ({"loss": float("nan")}, {"loss": 1.0, "metric": float("inf")}, {"loss": -float("inf")}, {}):
        with pytest.raises(LedgerError, match=r"call b has the value .* finite"):
            ledger.settle(["a", "b"], [{"loss": 1.0}, value])
    with pytest.raises(LedgerError, match="call z was never reserved"):
        ledger.settle(["a", "z"], [{"loss": 1.0}, {"loss": 1.0}])
    with pytest.raises(LedgerError, match="2 call ids came with 1 values"):
        ledger.settle(["a", "b"], [{"loss": 1.0}])
    assert disk.files() == before
    assert ledger.in_doubt == ("a", "b")


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("code", [5, 28])
def test_a_value_that_may_not_be_durable_is_not_there(after: int, code: int) -> None:
    disk = FaultDisk()
    ledger = ledger_on(disk, 2)
    ledger.reserve(["a", "b"], "train")
    disk.fail_at, disk.code = len(disk.operations) + after, code
    with pytest.raises(DiskError):
        ledger.settle(["a", "b"], [{"loss": 0.1}, {"loss": 0.2}])
    assert ledger.settled("a") is None
    assert ledger.in_doubt == ("a", "b")


def test_settled_values_cannot_be_changed(disk: FaultDisk) -> None:
    ledger = ledger_on(disk, 1)
    ledger.reserve(["a"], "train")
    given = {"loss": 0.5}
    ledger.settle(["a"], [given])
    given["loss"] = 0.0
    value = ledger.settled("a")
    assert value == {"loss": 0.5}
    with pytest.raises(TypeError):
        value["loss"] = 0.0  # type: ignore[index]
    assert ledger.settled("b") is None


def test_a_resumed_ledger_knows_what_has_not_been_asked_for_again(disk: FaultDisk) -> None:
    ledger = ledger_on(disk, 4)
    ledger.reserve(["a", "b"], "train")
    ledger.reserve(["c"], "dev")
    ledger.reserve(["t"], "test")
    assert (ledger.asked, len(ledger.unclaimed)) == (3, 0)
    ledger = ledger_on(disk.rebooted("nothing"), 4)
    assert (ledger.asked, len(ledger.unclaimed), ledger.reserved) == (0, 4, 3)
    ledger.reserve(["a", "b"], "train")
    ledger.reserve(["b", "a"], "train")
    assert (ledger.asked, len(ledger.unclaimed), ledger.reserved) == (2, 2, 3)
    ledger.reserve(["c"], "dev")
    ledger.reserve(["t"], "test")
    assert (ledger.asked, len(ledger.unclaimed)) == (3, 0)
    ledger.reserve(["d"], "dev")
    assert (ledger.asked, len(ledger.unclaimed), ledger.reserved) == (4, 0, 4)


def test_a_smaller_limit_than_the_journal_holds_is_a_mismatch(disk: FaultDisk) -> None:
    ledger_on(disk, 4).reserve(ids(4), "train")
    with pytest.raises(ResumeMismatch, match="4 calls are reserved, more than --budget 3"):
        ledger_on(disk.rebooted("nothing"), 3)
    with pytest.raises(ValueError, match="negative"):
        ledger_on(disk, -1)


@pytest.mark.parametrize(
    "record",
    [
        {"op": "refund", "ids": ["a"]},
        {"op": "reserve", "kind": "train", "ids": ["a"]},
        {"op": "reserve", "kind": "canary", "ids": ["b"]},
        {"op": "reserve", "kind": "train"},
        {"op": "settle", "ids": ["z"], "values": [{"loss": 1.0}]},
        {"op": "settle", "ids": ["a"], "values": []},
        {"op": "settle", "ids": ["a"], "values": [{"loss": "high"}]},
        {"op": "settle", "ids": ["a"], "values": [{"loss": "nan"}]},
        {"op": "settle", "ids": ["a"], "values": [{"loss": "0x1p9999"}]},
        {"op": "settle", "ids": ["a"], "values": [{"loss": 1}]},
        {"op": "settle", "ids": ["a"], "values": [[]]},
        {"op": "settle", "ids": ["a", "a"], "values": [{"loss": 1.0}, {"loss": 1.0}]},
        {"ids": ["a"]},
    ],
)
def test_a_line_that_makes_no_sense_is_named(disk: FaultDisk, record: dict[str, object]) -> None:
    journal = Journal(PATH, RUN, disk)
    journal.append({"op": "reserve", "kind": "train", "ids": ["a"]})
    journal.append(record)
    with pytest.raises(JournalCorrupt, match=r"/journal\.log:2: this line makes no sense"):
        ledger_on(disk.rebooted("nothing"), 9)


def test_what_a_message_repeats_of_a_line_is_short_and_one_line(disk: FaultDisk) -> None:
    Journal(PATH, RUN, disk).append({"op": "a\n" + 300 * "b"})
    with pytest.raises(JournalCorrupt) as raised:
        ledger_on(disk.rebooted("nothing"), 9)
    assert len(str(raised.value).partition("(")[2].partition(")")[0]) == 200
    assert "\n" not in str(raised.value)


NAMES = ids(12)
_DRAWN = random.Random(1)
#: Up to five calls, repeated ones among them, the short batches first: drawn as one, where drawing name after name
#: would take most of the time, so there can be more steps.
BATCHES = [[], *([name] for name in NAMES)] + [_DRAWN.choices(NAMES, k=size) for size in range(2, 6) for _ in range(60)]


class LedgerMachine(RuleBasedStateMachine):
    """Reserve, settle, crash and reopen in any order, beside a model of two dicts."""

    @initialize(limit=st.sampled_from([0, 1, 5, 8, 12]))
    def begin(self, limit: int) -> None:
        self.limit, self.disk = limit, FaultDisk()
        self.kinds: dict[str, str] = {}
        self.values: dict[str, dict[str, float]] = {}
        self.ledger = ledger_on(self.disk, limit)

    @rule(batch=st.sampled_from(BATCHES), kind=st.sampled_from(["train", "dev", "test"]))
    def reserve(self, batch: list[str], kind: Kind) -> None:
        new = {name for name in batch if name not in self.kinds}
        if any(self.kinds.get(name, kind) != kind for name in batch):
            with pytest.raises(LedgerError):
                self.ledger.reserve(batch, kind)
        elif kind != "test" and self.counted() + len(new) > self.limit:
            with pytest.raises(BudgetExhausted):
                self.ledger.reserve(batch, kind)
        else:
            self.ledger.reserve(batch, kind)
            self.kinds |= dict.fromkeys(new, kind)

    @rule(batch=st.sampled_from(BATCHES), loss=st.sampled_from([0.1, 1 / 3, float("nan")]))
    def settle(self, batch: list[str], loss: float) -> None:
        values = [{"loss": loss}] * len(batch)
        if batch and (
            loss != loss
            or any(name not in self.kinds for name in batch)
            or any(self.values.get(name, values[0]) != values[0] for name in batch)
        ):
            with pytest.raises(LedgerError):
                self.ledger.settle(batch, values)
        else:
            self.ledger.settle(batch, values)
            self.values |= dict(zip(batch, values, strict=True))

    @rule(image=st.sampled_from(IMAGES))
    def crash_and_reopen(self, image: str) -> None:
        self.disk = self.disk.rebooted(image)  # type: ignore[arg-type]
        self.ledger = ledger_on(self.disk, self.limit)
        assert len(self.ledger.unclaimed) == len(self.kinds)

    @rule(image=st.sampled_from(IMAGES), after=st.integers(1, 2), name=st.sampled_from(NAMES))
    def fail_while_reserving_and_reopen(self, image: str, after: int, name: str) -> None:
        if self.kinds.get(name, "train") != "train" or self.counted() >= self.limit:
            return
        self.disk.fail_at, self.disk.code = len(self.disk.operations) + after, 28
        if name not in self.kinds:
            with pytest.raises(DiskError):
                self.ledger.reserve([name], "train")
            assert name not in self.ledger.in_doubt  # not acknowledged, so not there
        self.crash_and_reopen(image)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.ledger.reserved == self.counted() <= self.limit
        assert self.ledger.remaining == self.limit - self.counted()
        assert sum(self.ledger.by_kind.values()) == len(self.kinds)
        assert set(self.ledger.in_doubt) == self.kinds.keys() - self.values.keys()
        assert {name: self.ledger.settled(name) for name in self.values} == self.values

    def counted(self) -> int:
        return sum(kind != "test" for kind in self.kinds.values())


LedgerMachine.TestCase.settings = settings(max_examples=deep(650), stateful_step_count=50, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
