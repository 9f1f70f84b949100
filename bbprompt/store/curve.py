"""The seconds of a run's curve, across resumes."""

from __future__ import annotations

import math
import time

from bbprompt.store.rundir import CURVE, RunDirectory

__all__ = ["CurveClock"]


class CurveClock:
    """Seconds of the curve's rows: replayed rows keep what they had, new rows count on from the last of them.

    Args:
        directory: The run; its curve of an earlier part, if there is one, is read before it is written anew.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._old, self._row = _seconds(directory), 0
        self._began = time.monotonic()

    @property
    def total(self) -> float:
        """Seconds of all parts of the run until now."""
        return (self._old[-1] if self._old else 0.0) + time.monotonic() - self._began

    def row(self, replayed: bool) -> float:
        """Seconds for the next row."""
        self._row += 1
        if replayed and self._row <= len(self._old):
            return self._old[self._row - 1]
        return self.total


def _seconds(directory: RunDirectory) -> list[float]:
    if not directory.holds(CURVE):
        return []
    seconds: list[float] = []
    for line in directory.read_bytes(CURVE).decode("utf-8", errors="replace").split("\n")[1:]:
        try:
            second = float(line.rsplit(",", 1)[1])
        except (IndexError, ValueError):
            break  # the curve is not durable row by row: its last row may be torn
        if not (seconds[-1] if seconds else 0.0) <= second < math.inf:
            break  # a clock does not run backwards: what is left of this row is not what was written
        seconds.append(second)
    return seconds
