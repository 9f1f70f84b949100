"""The seconds of a run's curve, across resumes."""

from __future__ import annotations

import math
import time

from bbprompt.store.rundir import CURVE, CURVE_COLUMNS, RunDirectory

__all__ = ["CurveClock"]


class CurveClock:
    """Seconds of the curve's rows: replayed rows keep what they had, new rows count on from the last of them.

    What a part of the run did between its last row and a kill is in no row, and so not counted.

    Args:
        directory: The run; its curve of an earlier part, if there is one, is read before it is written anew.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._old, self._row = _seconds(directory), 0
        self._before = self._old[-1] if self._old else (0.0, 0.0)
        self._began = time.monotonic()

    @property
    def total(self) -> float:
        """Seconds of all parts of the run until now."""
        return self._before[0] + time.monotonic() - self._began

    def oracle(self, part: float) -> float:
        """Seconds in the model of all parts of the run; `part` are those of this one."""
        return self._before[1] + part

    def row(self, replayed: bool, part: float) -> tuple[float, float]:
        """Seconds for the next row, and those of them in the model; `part` as in `oracle`."""
        self._row += 1
        if replayed and self._row <= len(self._old):
            return self._old[self._row - 1]
        return self.total, self.oracle(part)


def _seconds(directory: RunDirectory) -> list[tuple[float, float]]:
    if not directory.holds(CURVE):
        return []
    head, *lines = directory.read_bytes(CURVE).decode("utf-8", errors="replace").split("\n")
    if tuple(head.split(",")) == CURVE_COLUMNS[:-1]:  # of an earlier version, which did not tell what the model took
        lines = [f"{line},0" for line in lines]
    elif tuple(head.split(",")) != CURVE_COLUMNS:
        return []
    found = [(0.0, 0.0)]
    for line in lines[:-1]:  # the curve is not durable row by row: its last row may be torn
        try:
            second, oracle = map(float, line.rsplit(",", 2)[1:])
        except ValueError:
            break
        if not (found[-1][0] <= second < math.inf and found[-1][1] <= oracle < math.inf):
            break  # a clock does not run backwards: what is left of this row is not what was written
        found.append((second, oracle))
    return found[1:]
