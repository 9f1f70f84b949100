"""Batches made ready while the step before them runs, so that the device never waits for a tokenizer."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

__all__ = ["Ahead", "Source"]

_Batch = TypeVar("_Batch", covariant=True)


class Source(Protocol[_Batch]):
    """What batches come from."""

    def batch(self, step: int, part: int = 0) -> _Batch:
        """Part `part` of the batch of `step` (both from 0), always the same."""


class Ahead(Generic[_Batch]):
    """Gives slices of steps in order, working on the next while one is used; what they hold is not changed by it.

    Args:
        batches: Where they come from.
        parts: The slices of each step that this process takes, in order.
        last: Number of steps.
    """

    def __init__(self, batches: Source[_Batch], parts: range, last: int) -> None:
        self._batches, self._parts, self._last = batches, parts, last
        self._worker = ThreadPoolExecutor(1, "batches")
        self._ready: dict[tuple[int, int], Future[_Batch]] = {}

    def get(self, step: int, part: int) -> _Batch:
        """The slice; begins the one after it."""
        held = self._ready.pop((step, part), None)
        batch = self._batches.batch(step, part) if held is None else held.result()
        following = (step, part + 1) if part + 1 in self._parts else (step + 1, self._parts.start)
        if following[0] < self._last:
            self._ready[following] = self._worker.submit(self._batches.batch, *following)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
