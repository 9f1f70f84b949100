"""Stopping in good order: a signal asks, the work stops at its next safe point or, where it has none, at once.

A process has one `Stop`. It is entered before anything heavy is imported, and every command finds it in its context.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from bbprompt.errors import Interrupted

if TYPE_CHECKING:
    import typer

__all__ = ["Stop", "stop_of"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HINT = b"\nstopping after this batch; once more stops at once\n"
_SAME_WISH = 1.0  # seconds; Ctrl-C and the SIGTERM of a supervisor come together and mean one thing


class Stop:
    """While it is entered, SIGINT and SIGTERM end the work with `Interrupted` instead of a traceback.

    Before `advice` is set there is nothing to go on with, and a signal ends the work at once. Afterwards the first
    signal is only noted, for `check` to act upon; a second one ends the work at once. That is safe too, for a run
    writes nothing that a kill could spoil, but the calls in flight are asked for again when it is resumed.

    Whatever ends the work at once is raised once: signals of the following second change nothing, or they would tear
    the clean-up that the first one set off. Later ones are raised anew, for a library may have swallowed the first.

    Attributes:
        advice: How to go on, once there is something to go on with.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.advice: str | None = None
        self._clock = clock
        self._noted: str | None = None
        self._raised_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def raised(self) -> bool:
        """Whether the work was told to end at once."""
        return self._raised_at is not None

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._noted is not None:
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """What the work ends with: the signal, and how to go on."""
        how = self.advice or "no half-written file is left: start again"
        return Interrupted(f"stopped by {self._noted or 'SIGINT'}; {how}")

    def ignore(self) -> None:
        """Take no signal any more: all is said, and the process is about to be gone."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other one may ask for signals, or gets any
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt):
            raise self.interrupted() from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._noted = self._noted is None, signal.Signals(number).name
        if self.advice is not None and first:
            os.write(2, _HINT)  # a handler must not enter buffered streams, which may be in use
            return
        now = self._clock()
        if self._raised_at is not None and now - self._raised_at < _SAME_WISH:
            return
        self._raised_at = now
        # Whatever library is running now may swallow an Exception, but not this.
        raise KeyboardInterrupt


def stop_of(context: typer.Context) -> Stop:
    """The `Stop` of the process that a command runs in.

    Raises:
        TypeError: The command was not started by `bbprompt.cli.run`.
    """
    stop = context.obj
    if not isinstance(stop, Stop):
        raise TypeError(f"the context of a command holds its Stop, not {stop!r}")
    return stop
