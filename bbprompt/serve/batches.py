"""The texts that clients registered, by digest: a bounded number, each on a lease that use renews."""

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
        clock: Seconds, never going back.
    """

    def __init__(self, most: int, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._lease, self._clock = most, lease, clock
        self._kept: OrderedDict[str, tuple[TextBatch, float]] = OrderedDict()

    def __len__(self) -> int:
        self._expire()
        return len(self._kept)

    def put(self, digest: str, batch: TextBatch) -> None:
        """Keep a batch, or renew its lease."""
        self._expire()
        self._kept[digest] = (batch, self._clock() + self._lease)
        self._kept.move_to_end(digest)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def get(self, digest: str) -> TextBatch | None:
        """A batch, whose lease is renewed; None if it is not there."""
        self._expire()
        found = self._kept.get(digest)
        if found is None:
            return None
        self.put(digest, found[0])
        return found[0]

    def _expire(self) -> None:
        """Drop what has not been used for a lease; the order of use is the order of expiry."""
        now = self._clock()
        while self._kept and next(iter(self._kept.values()))[1] <= now:
            self._kept.popitem(last=False)
