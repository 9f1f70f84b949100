"""The texts that clients registered, by digest: a bounded number of bounded size, each on a lease that use renews."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from bbprompt.oracle import TextBatch

__all__ = ["Batches"]


class Batches:
    """Kept batches; one that is gone must be registered again.

    Args:
        most: How many are kept.
        lease: Seconds that one is kept after its last use.
        room: Bytes that all of them may have had as they were sent; the last one is kept in any case.
        clock: Seconds, never going back.
    """

    def __init__(self, most: int, lease: float, room: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._lease, self._room, self._clock = most, lease, room, clock
        self._kept: OrderedDict[str, tuple[TextBatch, int, float]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        self._expire()
        return len(self._kept)

    def put(self, digest: str, batch: TextBatch, size: int) -> None:
        """Keep a batch of so many bytes, or renew its lease."""
        self._expire()
        if digest in self._kept:
            self._drop(digest)
        self._kept[digest] = (batch, size, self._clock() + self._lease)
        self._size += size
        while len(self._kept) > self._most or (self._size > self._room and len(self._kept) > 1):
            self._drop(next(iter(self._kept)))

    def get(self, digest: str) -> TextBatch | None:
        """A batch, whose lease is renewed; None if it is not there."""
        self._expire()
        found = self._kept.get(digest)
        if found is None:
            return None
        self.put(digest, found[0], found[1])
        return found[0]

    def _drop(self, digest: str) -> None:
        self._size -= self._kept.pop(digest)[1]

    def _expire(self) -> None:
        """Drop what has not been used for a lease; the order of use is the order of expiry."""
        now = self._clock()
        while self._kept and next(iter(self._kept.values()))[2] <= now:
            self._drop(next(iter(self._kept)))
