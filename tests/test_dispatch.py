"""Sending, waiting, giving up and sending again, with workers that are made up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bbprompt.backends.dispatch import Dispatcher, Limits, WorkerLost
from bbprompt.errors import DataError, OracleError

NEVER = float("inf")


class FakeCarrier:
    """Workers that answer a task with its square, one after the other, on a clock of their own.

    Args:
        seconds: What a task takes.
        start: What starting takes.
        dies: Numbers of sends (from 1) in which the worker dies.
        hangs: Numbers of sends that are never answered.
        stillborn: Numbers of starts that never greet.
        refuses: A task that fails wherever it is sent.
        poison: A task that kills every worker.
    """

    def __init__(
        self,
        *,
        seconds: float = 1.0,
        start: float = 2.0,
        dies: Sequence[int] = (),
        hangs: Sequence[int] = (),
        stillborn: Sequence[int] = (),
        refuses: int | None = None,
        poison: int | None = None,
    ) -> None:
        self.now = 0.0
        self.seconds, self.start_seconds, self.dies, self.hangs = seconds, start, set(dies), set(hangs)
        self.stillborn, self.refuses, self.poison = set(stillborn), refuses, poison
        self.numbers = itertools.count(1)
        self.starts = itertools.count(1)
        self.ready: dict[str, float] = {}  # ticket -> when settled
        self.values: dict[str, Any] = {}
        self.free: dict[str, float] = {}  # worker -> when it has done all it holds
        self.dead: set[str] = set()
        self.stopped: list[str] = []
        self.sent: list[tuple[str, Any]] = []
        self.busy = 0.0
        self.messages = 0

    def clock(self) -> float:
        return self.now

    def start(self) -> tuple[str, str]:
        number = next(self.starts)
        worker = f"w{number}"
        self.ready[f"hello {worker}"] = NEVER if number in self.stillborn else self.now + self.start_seconds
        self.values[f"hello {worker}"] = worker
        return worker, f"hello {worker}"

    def greet(self, worker: str, greeting: str) -> None:
        assert worker == greeting
        self.free[worker] = self.now

    def send(self, worker: str, tasks: Sequence[int]) -> str:
        number = next(self.numbers)
        ticket = f"{number} {worker}"
        self.messages += 1
        self.sent += [(worker, task) for task in tasks]
        if worker in self.dead:
            self.ready[ticket], self.values[ticket] = self.now, WorkerLost("dead")
            return ticket
        seconds = self.seconds * len(tasks)
        done = max(self.free[worker], self.now) + seconds
        if number in self.hangs:
            done = NEVER
        elif number in self.dies or self.poison in tasks:
            self.dead.add(worker)
            self.values[ticket] = WorkerLost("died")
        elif self.refuses in tasks:
            self.values[ticket] = DataError("no such text")
        else:
            self.values[ticket] = [task * task for task in tasks]
            self.busy += seconds
        self.ready[ticket] = self.free[worker] = done
        return ticket

    def wait(self, tickets: Sequence[str], seconds: float) -> Sequence[str]:
        first = min((self.ready[ticket] for ticket in tickets), default=NEVER)
        if first > self.now + seconds:
            assert seconds < NEVER, "would wait for ever"
            self.now += seconds
            return []
        self.now = max(first, self.now)
        # Those that settled last first: the order of arrival must not matter.
        return [ticket for ticket in reversed(tickets) if self.ready[ticket] <= self.now]

    def result(self, ticket: str) -> Any:
        value = self.values[ticket]
        if isinstance(value, Exception):
            raise value
        return value

    def stop(self, worker: str) -> None:
        self.stopped.append(worker)


def opened(carrier: FakeCarrier, size: int, limits: Limits | None = None) -> Dispatcher[int, int]:
    dispatcher = Dispatcher[int, int](carrier, size, limits, carrier.clock)
    dispatcher.open()
    return dispatcher


def test_results_come_in_order_and_every_task_is_sent_once() -> None:
    carrier = FakeCarrier()
    dispatcher = opened(carrier, 3)
    for _ in range(2):
        assert dispatcher.run(range(10)) == [i * i for i in range(10)]
    assert sorted(task for _, task in carrier.sent) == sorted([*range(10), *range(10)])
    assert (dispatcher.lost, dispatcher.ready) == (0, 3)
    assert dispatcher.run([]) == []
    dispatcher.close()
    dispatcher.close()
    assert sorted(carrier.stopped) == ["w1", "w2", "w3"]


def test_workers_are_kept_busy() -> None:
    carrier = FakeCarrier()
    dispatcher = opened(carrier, 64)
    dispatcher.run(range(64))
    began, busy = carrier.now, carrier.busy
    dispatcher.run(range(640))
    assert carrier.busy - busy == 640
    assert carrier.now - began == 10.0, "64 workers take ten rounds"


def test_short_tasks_travel_together() -> None:
    carrier = FakeCarrier(seconds=0.05)
    dispatcher = opened(carrier, 64)
    dispatcher.run(range(64))
    began, messages = carrier.now, carrier.messages
    assert dispatcher.run(range(640)) == [i * i for i in range(640)]
    assert carrier.messages - messages == 128
    assert carrier.now - began == pytest.approx(0.5)
    # Those that kill are found out although they travel in company.
    carrier.poison = 100
    with pytest.raises(OracleError, match="over the same work"):
        dispatcher.run(range(640))
    assert [task for _, task in carrier.sent[-3:]] != [99, 100, 101]


def test_a_few_tasks_are_not_piled_up_on_one_worker() -> None:
    carrier = FakeCarrier()
    dispatcher = opened(carrier, 4)
    dispatcher.run(range(4))
    began = carrier.now
    dispatcher.run(range(4))
    assert carrier.now - began == 1.0
    assert len({worker for worker, _ in carrier.sent[-4:]}) == 4


def test_a_run_begins_with_the_first_worker_and_others_join() -> None:
    carrier = FakeCarrier(stillborn=[1])
    dispatcher = opened(carrier, 2)
    assert dispatcher.ready == 1
    assert dispatcher.run(range(6)) == [i * i for i in range(6)]
    assert {worker for worker, _ in carrier.sent} == {"w2"}


@pytest.mark.parametrize("dies", [[1], [2], [5], [1, 2], [3, 4, 5], list(range(1, 9))])
def test_a_lost_worker_is_replaced_and_its_work_sent_again(dies: list[int]) -> None:
    carrier = FakeCarrier(dies=dies)
    dispatcher = opened(carrier, 3)
    assert dispatcher.run(range(12)) == [i * i for i in range(12)]
    # Of two sends to die in, both may have gone to one worker.
    assert 0 < dispatcher.lost == len(carrier.dead) <= len(dies)
    assert set(carrier.stopped) == carrier.dead
    # Again is sent what the dead held, and nothing else.
    assert dispatcher.lost <= len(carrier.sent) - 12 <= 2 * dispatcher.lost


def test_a_worker_that_hangs_is_given_up_at_its_deadline() -> None:
    carrier = FakeCarrier(hangs=[1])
    dispatcher = opened(carrier, 2, Limits(answer=5.0))
    began = carrier.now
    assert dispatcher.run(range(8)) == [i * i for i in range(8)]
    assert dispatcher.lost == 1
    assert 5.0 <= carrier.now - began <= 5.0 + 3.0


def test_slow_is_not_late() -> None:
    # Each task is within its deadline although two of them, held at once, are not.
    carrier = FakeCarrier(seconds=4.0)
    dispatcher = opened(carrier, 1, Limits(answer=5.0))
    assert dispatcher.run(range(5)) == [0, 1, 4, 9, 16]
    assert dispatcher.lost == 0


def test_what_was_given_up_gets_twice_the_time_when_it_is_sent_again() -> None:
    carrier = FakeCarrier(seconds=15.0)
    dispatcher = opened(carrier, 1, Limits(answer=5.0))
    assert dispatcher.run(range(1)) == [0]
    assert dispatcher.lost == 2, "5 and 10 seconds were too few, 20 are not"
    carrier = FakeCarrier(seconds=50.0)
    with pytest.raises(OracleError, match=r"4 workers in a row .*: no answer within 40 s; .* a smaller --batch-tokens"):
        opened(carrier, 1, Limits(answer=5.0)).run(range(1))


def test_work_that_kills_its_workers_is_given_up() -> None:
    carrier = FakeCarrier(poison=5)
    dispatcher = opened(carrier, 2)
    with pytest.raises(OracleError, match="4 workers in a row were lost over the same work: died"):
        dispatcher.run(range(8))
    assert [task for _, task in carrier.sent].count(5) == 4


def test_work_that_cannot_be_done_says_so_and_the_next_batch_is_clean() -> None:
    carrier = FakeCarrier(refuses=2)
    dispatcher = opened(carrier, 2)
    with pytest.raises(DataError, match="no such text"):
        dispatcher.run(range(8))
    assert [task for _, task in carrier.sent].count(2) == 1
    assert dispatcher.run([7, 8, 9]) == [49, 64, 81]


def test_no_worker_in_time_is_an_error() -> None:
    carrier = FakeCarrier(stillborn=range(1, 9))
    with pytest.raises(OracleError, match="no worker has started within 30 s; is there room"):
        opened(carrier, 2, Limits(start=30.0))
    assert carrier.now == 30.0


def test_all_workers_gone_for_good_is_an_error() -> None:
    carrier = FakeCarrier(dies=[1, 2], stillborn=range(3, 99))
    dispatcher = opened(carrier, 2, Limits(start=30.0))
    with pytest.raises(OracleError, match=r"no worker has started within 30 s \(last loss: (died|dead)\)"):
        dispatcher.run(range(6))


def test_a_replacement_that_never_comes_does_not_stop_the_rest() -> None:
    carrier = FakeCarrier(dies=[2], stillborn=range(3, 99))
    dispatcher = opened(carrier, 2, Limits(start=3.0))
    assert dispatcher.run(range(30)) == [i * i for i in range(30)]
    assert dispatcher.ready == 1


@given(
    st.integers(1, 5),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.sets(st.integers(1, 30), max_size=3),
    st.sets(st.integers(1, 30), max_size=3),
)
@settings(deadline=None)
def test_whatever_happens_results_are_right_or_there_is_an_error(
    size: int, batches: list[int], dies: set[int], hangs: set[int]
) -> None:
    carrier = FakeCarrier(dies=sorted(dies), hangs=sorted(hangs))
    dispatcher = opened(carrier, size, Limits(answer=7.0, tries=8))
    for count in batches:
        assert dispatcher.run(np.arange(count).tolist()) == [i * i for i in range(count)]
    assert len(carrier.sent) - sum(batches) <= 2 * dispatcher.lost
    assert dispatcher.lost <= len(dies | hangs) + len(carrier.dead)
