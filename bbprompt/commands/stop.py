"""Stopping in good order: a signal asks, the run stops at its next safe point."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from bbprompt.errors import Interrupted

__all__ = ["Stop"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HINT = b"\nstopping after this batch; once more stops at once\n"


class Stop:
    """While it is entered, SIGINT and SIGTERM end the work with `Interrupted` instead of a traceback.

    Before `advice` is set there is nothing to keep, and a signal ends the work at once. Afterwards the first signal
    is only noted, for `check` to act upon; a second one ends the work at once. That is safe too, for a run writes
    nothing that a kill could spoil, but the calls in flight are asked for again when it is resumed.

    Attributes:
        advice: How to go on, once there is something to go on with.
    """

    def __init__(self) -> None:
        self.advice: str | None = None
        self._noted: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._noted is not None:
            raise self._interrupted()

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt):
            raise self._interrupted() from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._noted = self._noted is None, signal.Signals(number).name
        if self.advice is None or not first:
            # Whatever library is running now may swallow an Exception, but not this.
            raise KeyboardInterrupt
        os.write(2, _HINT)  # a handler must not enter buffered streams, which may be in use

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped by {self._noted or 'SIGINT'}; {self.advice or 'nothing was begun: start again'}")
