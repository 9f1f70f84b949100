"""Tasks to workers: the one place that sends, waits, gives up and sends again.

The workers may be anywhere and may die; what carries messages to them is a `Carrier`, which never retries by
itself. Every task has one result whoever computes it, so sending it again changes nothing but time: what a call
costs is booked before and elsewhere, by candidate.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from bbprompt.errors import OracleError

__all__ = ["Carrier", "Dispatcher", "Limits", "WorkerLost"]

_log = logging.getLogger("bbprompt")

Task_ = TypeVar("Task_")
Reply = TypeVar("Reply")


class WorkerLost(Exception):
    """A worker is gone, or cannot be reached: what was sent to it must be sent to another."""


class Carrier(Protocol):
    """Starts workers and carries tasks to them. Workers and tickets are whatever it likes; both are hashable."""

    def start(self) -> tuple[Any, Any]:
        """Begin to start a worker; it and the ticket of its greeting."""

    def greet(self, worker: Any, greeting: Any) -> None:
        """Accept a started worker, or raise if it does not fit the others."""

    def send(self, worker: Any, tasks: Sequence[Any]) -> Any:
        """Send tasks in one message; its ticket."""

    def wait(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Tickets that are settled, after at most so many seconds; none if time ran out."""

    def result(self, ticket: Any) -> Any:
        """What a settled ticket brought: for tasks a list, a result for each.

        Raises:
            WorkerLost: Nothing; the worker is gone.
            BBPromptError: The task cannot be done by any worker.
        """

    def stop(self, worker: Any) -> None:
        """End a worker, whatever it does now; it may be dead already."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up.

    Attributes:
        answer: Seconds that a worker may take for one task; twice as long each time that it is sent again, for a worker
            that was given up may have been healthy and slow.
        start: Seconds until a worker must have started, where no other works.
        tries: How often one task is sent before it is held to be what kills the workers.
        ahead: Messages that a worker holds, so that it need not wait for the next.
        message: Seconds of work that go into one message where tasks are short, so that sending costs little of them.
    """

    answer: float = 300.0
    start: float = 600.0
    tries: int = 4
    ahead: int = 2
    message: float = 0.25


@dataclass(slots=True)
class _Worker:
    """One worker.

    Attributes:
        handle: As the carrier knows it.
        greeting: Ticket of its greeting while it starts, then None.
        since: When it started, or began with the oldest message it holds.
        held: Its messages, oldest first: ticket and numbers of the tasks.
    """

    handle: Any
    greeting: Any
    since: float
    held: deque[tuple[Any, list[int]]] = field(default_factory=deque)


class Dispatcher(Generic[Task_, Reply]):
    """Keeps `size` workers busy.

    A worker that dies or is late is ended and replaced, and its tasks are sent to others. Results come back in the
    order of the tasks.

    Args:
        carrier: Reaches the workers.
        size: Workers wanted.
        limits: When to give up.
        clock: Seconds; for tests.
    """

    def __init__(
        self, carrier: Carrier, size: int, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._carrier, self._size, self._clock = carrier, size, clock
        self._limits = limits or Limits()
        self._workers: list[_Worker] = []
        self._last_loss = ""
        self._pace: float | None = None  # seconds a task, lately
        self.lost = 0

    @property
    def ready(self) -> int:
        """Workers that have started."""
        return sum(worker.greeting is None for worker in self._workers)

    def open(self) -> None:
        """Start the workers, and return when the first is ready.

        Raises:
            OracleError: None starts in time.
        """
        self._refill()
        while not self.ready:
            self._step([], {}, deque(), [])

    def run(self, tasks: Sequence[Task_]) -> list[Reply]:
        """Have all tasks done; their results in order.

        Raises:
            OracleError: A task is sent too often, or no worker is left and none starts in time.
            BBPromptError: What a worker says of a task that cannot be done.
        """
        todo, results, tries = deque(range(len(tasks))), dict[int, Reply](), [0] * len(tasks)
        try:
            while len(results) < len(tasks):
                self._refill()
                self._feed(tasks, todo, tries)
                self._step(tasks, results, todo, tries)
        except BaseException:
            # Whoever still works on this batch would answer into the next one.
            for worker in [worker for worker in self._workers if worker.held]:
                self._end(worker)
            raise
        return [results[number] for number in range(len(tasks))]

    def close(self) -> None:
        """End all workers; safe to call twice."""
        for worker in list(self._workers):
            self._end(worker)

    def _refill(self) -> None:
        while len(self._workers) < self._size:
            handle, greeting = self._carrier.start()
            self._workers.append(_Worker(handle, greeting, self._clock()))

    def _feed(self, tasks: Sequence[Task_], todo: deque[int], tries: list[int]) -> None:
        """Hand out tasks: a message for each worker first; one ahead only where enough is left for all."""
        ready = [worker for worker in self._workers if worker.greeting is None]
        for depth in range(self._limits.ahead):
            if depth and len(todo) < len(ready):
                return
            most = self._message(len(todo), len(ready) * (self._limits.ahead - depth))
            for worker in ready:
                if not todo or len(worker.held) > depth:
                    continue
                numbers = [todo.popleft()]
                # What was tried before goes alone, so that it is known who kills whom.
                while todo and len(numbers) < most and not tries[numbers[0]] and not tries[todo[0]]:
                    numbers.append(todo.popleft())
                if not worker.held:
                    worker.since = self._clock()
                ticket = self._carrier.send(worker.handle, [tasks[number] for number in numbers])
                worker.held.append((ticket, numbers))

    def _message(self, tasks: int, free: int) -> int:
        """How many tasks go into one message: never more than the even share of the `free` messages."""
        if not self._pace or not free:
            return 1
        return max(min(round(self._limits.message / self._pace), tasks // free), 1)

    def _step(self, tasks: Sequence[Task_], results: dict[int, Reply], todo: deque[int], tries: list[int]) -> None:
        """Wait until something happens, and deal with it."""
        now = self._clock()
        tickets: dict[Any, _Worker] = {}
        until = []
        for worker in self._workers:
            if worker.greeting is not None:
                tickets[worker.greeting] = worker
                until.append(worker.since + self._limits.start)
            elif worker.held:
                tickets.update((ticket, worker) for ticket, _ in worker.held)
                until.append(worker.since + self._patience(worker, tries))
        settled = self._carrier.wait(list(tickets), max(min(until, default=now) - now, 0.0))
        for ticket in settled:
            worker = tickets[ticket]
            if worker not in self._workers:
                continue  # ended by an earlier ticket of this round
            try:
                value = self._carrier.result(ticket)
            except WorkerLost as error:
                self._lose(worker, str(error), todo, tries)
                continue
            if ticket is worker.greeting or ticket == worker.greeting:
                self._carrier.greet(worker.handle, value)
                worker.greeting = None
                continue
            numbers = next(numbers for held, numbers in worker.held if held == ticket)
            worker.held.remove((ticket, numbers))
            now = self._clock()
            pace = (now - worker.since) / len(numbers)
            self._pace = pace if self._pace is None else 0.8 * self._pace + 0.2 * pace
            worker.since = now
            results.update(zip(numbers, value, strict=True))
        if not settled:
            self._overdue(todo, tries)

    def _overdue(self, todo: deque[int], tries: list[int]) -> None:
        now = self._clock()
        for worker in list(self._workers):
            if worker.held and now - worker.since >= (patience := self._patience(worker, tries)):
                self._lose(worker, f"no answer within {patience:g} s", todo, tries)
            elif worker.greeting is not None and now - worker.since >= self._limits.start:
                if not self.ready:
                    more = f" (last loss: {self._last_loss})" if self._last_loss else ""
                    raise OracleError(
                        f"no worker has started within {self._limits.start:g} s{more}; is there room for it in the "
                        "cluster, and can it reach the model?"
                    )
                # Others work, so this is no hurry: the cluster may have become smaller, or grow later.
                worker.since = now

    def _patience(self, worker: _Worker, tries: list[int]) -> float:
        """Seconds for the oldest message that a worker holds."""
        seconds: float = self._limits.answer * 2 ** max(tries[number] for number in worker.held[0][1])
        return seconds

    def _lose(self, worker: _Worker, reason: str, todo: deque[int], tries: list[int]) -> None:
        """Give a worker up and its tasks back, those of its oldest message counted as tried."""
        self.lost += 1
        self._last_loss = reason
        if worker.greeting is not None and self.lost > self._limits.tries * self._size:
            raise OracleError(f"workers die as they start: {reason}")
        first = worker.held[0][1] if worker.held else []
        numbers = [number for _, numbers in worker.held for number in numbers]
        self._end(worker)
        _log.warning("a worker was lost (%s); it is replaced and its work sent to another", reason)
        for number in first:
            tries[number] += 1
            if tries[number] >= self._limits.tries:
                raise OracleError(
                    f"{tries[number]} workers in a row were lost over the same work: {reason}; if they are only slow, "
                    "a smaller --batch-tokens makes smaller pieces of it"
                )
        todo.extendleft(reversed(numbers))

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._carrier.stop(worker.handle)
