"""What a person sees of a sweep: a live table on a terminal, elsewhere a line whenever a run begins or ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bbprompt.oneline import one_line
from bbprompt.sweep.job import progress
from bbprompt.sweep.runner import Sweep
from bbprompt.terminal import duration

__all__ = ["SweepView", "counts_line"]

_EVERY = 1.0  # seconds between two looks at the curves
_SHOWN = 12  # failed runs listed while others run


class SweepView:
    """Shows a sweep; use it in a ``with`` block.

    Args:
        console: Where to.
        clock: Seconds, for tests.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._states: dict[str, str] = {}
        self._next = clock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.quiet:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, sweep: Sweep) -> None:
        """Show how the runs stand."""
        states = {name: sweep.state(name) for name in sweep.cells}
        changed, self._states = states != self._states, states if self._live is not None else self._states
        if self._live is not None:
            now = self._clock()
            if changed or now >= self._next:
                self._live.update(_screen(sweep, now), refresh=True)
                self._next = now + _EVERY
            return
        for name, state in states.items():
            if state != self._states.get(name, "waiting"):
                said = f": {sweep.failed[name].error}" if state == "failed" else ""
                self._console.print(Text(one_line(f"{name}: {state}{said} ({counts_line(sweep)})")), soft_wrap=True)
        self._states = states


def counts_line(sweep: Sweep) -> str:
    """How many runs are in which state, as words."""
    counts = sweep.counts()
    parts = [f"{count} {state}" for state, count in counts.items() if count or state == "done"]
    return f"{len(sweep.cells)} runs: {', '.join(parts)}"


def _screen(sweep: Sweep, now: float) -> Group:
    table = Table(box=box.SIMPLE_HEAD, title=counts_line(sweep), title_justify="left")
    table.add_column("running")
    for name in ("stage", "calls", "dev", "for"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, began in sweep.running.items():
        where = progress(sweep.out / name)
        calls = f"{where.calls}/{sweep.cells[name].config.budget}"
        dev = f"{float(where.dev):.3f}" if where.dev else ""
        table.add_row(Text(name), where.stage or "loading", calls, dev, duration(now - began))
    lines = [Text(one_line(f"failed: {name}: {failure.error}"), style="red") for name, failure in sweep.failed.items()]
    return Group(table, *lines[-_SHOWN:])
