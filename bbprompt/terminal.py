"""What a person at a terminal sees: what runs, how far it is, how long it takes; all on standard error.

On a terminal that is a panel and a progress bar; elsewhere, plain log lines now and then.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from bbprompt.oneline import one_line
from bbprompt.opened import Opened, Watcher
from bbprompt.prompts import ModularPrompt
from bbprompt.search.tuner import Status

__all__ = ["Meter", "Terminal", "duration", "facts", "logging_to", "open_console"]

_LINE_EVERY = 30.0  # seconds between two log lines where there is no terminal
_WINDOW = 60.0  # seconds that the speed is measured over


def open_console(quiet: bool = False) -> Console:
    """A console on standard error; a quiet one writes nothing."""
    return Console(stderr=True, quiet=quiet, highlight=False)


@contextmanager
def logging_to(console: Console) -> Iterator[None]:
    """Show the log of bbprompt on a console, one line each; warnings only where the console is quiet."""
    log = logging.getLogger("bbprompt")
    handler = _Handler(console)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING if console.quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _Handler(logging.Handler):
    """Writes through the console, so that a line and the progress bar do not overwrite each other."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console if not console.quiet else Console(stderr=True, highlight=False)

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        _line(self._console, prefix + one_line(record.getMessage()))


class Meter:
    """One line of progress: a bar on a terminal, elsewhere a log line every 30 seconds and at each new label.

    Args:
        console: Where to.
        total: Steps in all; None where that is not known.
        clock: Seconds, for tests.
    """

    def __init__(self, console: Console, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._total, self._clock = console, total, clock
        self._label: str | None = None
        self._next = self._began = clock()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal and not console.quiet:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=8),
                TextColumn("{task.fields[text]}", markup=False),
            )
            # Twice a second: the refreshing thread takes its time from the search.
            self._bar = Progress(*columns, console=console, refresh_per_second=2, transient=True)
            self._task = self._bar.add_task("", total=total, text="")
            self._bar.start()

    def update(self, label: str, done: int, text: str) -> None:
        """Show that `done` steps are done; `text` says the rest."""
        amount = f"{done}/{self._total}" if self._total is not None else str(done)
        if self._bar is not None:
            self._bar.update(self._task, description=label, completed=done, text=f"{amount} {text}")
            return
        now = self._clock()
        if label != self._label or now >= self._next or done == self._total:
            _line(self._console, f"[{now - self._began:6.0f} s] {label}: {amount} {text}")
            self._label, self._next = label, now + _LINE_EVERY

    def close(self) -> None:
        """Take the bar away; closing twice is harmless."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Terminal(Watcher):
    """Shows a run to a person; use it in a ``with`` block.

    Args:
        console: Where to.
        check: Called at every safe point; what it raises stops the run.
        clock: Seconds, for tests.

    Attributes:
        directory: The run directory, for the panel.
        replayed: Calls that a resumed run has in its journal; they say nothing about speed.
    """

    def __init__(
        self,
        console: Console,
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._check, self._clock = console, check, clock
        self.directory: Path | None = None
        self.replayed = 0
        self._budget = 0
        self._marks: deque[tuple[float, int]] = deque()
        self._search: Meter | None = None
        self._test: Meter | None = None
        self._other: Meter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for meter in (self._search, self._test, self._other):
            if meter is not None:
                meter.close()

    def loading(self) -> None:
        """Say that something goes on, before there is anything to measure."""
        _line(self._console, "loading the model and the data ...")

    def prepared(self, run: Opened) -> None:
        """Show what runs."""
        rows = [(name, one_line(value)) for name, value in facts(run, self.directory)]
        if self._console.is_terminal:
            grid = Table.grid(padding=(0, 2))
            for name, value in rows:
                grid.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
            self._console.print(Panel(grid, title="bbprompt tune", title_align="left", expand=False))
        else:
            for name, value in rows:
                _line(self._console, f"{name}: {value}")
        descent = run.method.gradient
        self._budget = min(run.config.budget, descent.calls) if descent is not None else run.config.budget
        self._marks.append((self._clock(), 0))
        self._search = Meter(self._console, self._budget, self._clock)

    def status(self, status: Status) -> None:
        """Show where the search stands, or stop it."""
        if self._search is not None:
            self._search.update(status.stage, status.calls, self._describe(status))
        self._check()

    def testing(self, done: int, total: int) -> None:
        """Show how much of the test split is scored, or stop."""
        if self._search is not None:
            self._search.close()
        if self._test is None:
            self._test = Meter(self._console, total, self._clock)
        self._test.update("test", min(done, total), "examples")
        self._check()

    def comparing(self, done: int, total: int) -> None:
        """Show how many texts are read for the baselines, or stop."""
        for meter in (self._search, self._test):
            if meter is not None:
                meter.close()
        if self._other is None:
            self._other = Meter(self._console, total, self._clock)
        self._other.update("baselines", min(done, total), "texts")
        self._check()

    def _describe(self, status: Status) -> str:
        # The bar and its text have to fit 80 columns. A stage may end before its calls do, so what is left is a bound.
        bar = self._console.is_terminal
        loss, unit, most = ("train", "/s", "≤ ") if bar else ("best train loss", " calls/s", "at most ")
        parts = [f"calls, {loss} {status.train_loss:.4f}, {'' if bar else 'best '}dev {status.dev_metric:.3f}"]
        speed = self._speed(status.calls)
        if speed:
            parts.append(f"{speed:.1f}{unit}, {most}{duration((self._budget - status.calls) / speed)} left")
        return ", ".join(parts)

    def _speed(self, calls: int) -> float:
        """Calls a second over the last minute; 0 while that is not known."""
        mark = (self._clock(), calls)
        if calls <= self.replayed:
            self._marks.clear()
        self._marks.append(mark)
        while len(self._marks) > 2 and mark[0] - self._marks[1][0] >= _WINDOW:
            self._marks.popleft()
        began, first = self._marks[0]
        return (calls - first) / (mark[0] - began) if mark[0] > began else 0.0


def facts(run: Opened, directory: Path | None) -> list[tuple[str, str]]:
    """What a person wants to know of a run before it begins, as pairs of name and value."""
    info, config = run.model, run.config
    data = f"{run.data.id}" if run.data.source != "sample" else "bundled SAMPLE, only for trying things out"
    amounts = f"{len(run.few.train)} train, {len(run.few.dev)} dev, {len(run.test)} test"
    labels = f", {len(run.task.options)} labels" if run.task.labelled else ""
    return [
        ("model", f"{info.backbone}, {info.precision}, at most {info.max_tokens} tokens"),
        ("prompts", f"{config.prompts or run.method.prompts}{_shape(run)}"),
        ("task", f"{run.task.name} ({run.task.type}{labels}, {run.task.metric})"),
        ("data", f"{data}: {amounts}" if run.data.source != "hub" else f"hub {data}: {amounts}"),
        ("method", f"{run.method.name}: {run.method.summary}"),
        ("budget", f"{config.budget} calls, seed {config.seed}"),
        ("device", info.device),
        ("directory", str(directory) if directory is not None else "none"),
    ]


def _shape(run: Opened) -> str:
    """The sizes of the prompts, in brackets."""
    artifact = getattr(run, "prompt", None)
    if not isinstance(artifact, ModularPrompt):
        return ""
    prompt = artifact.config
    if not prompt.prompt_length:
        return ""
    sizes = {"K": prompt.modules, "d": prompt.intrinsic_dim, "P": prompt.prompt_length}
    return f" ({', '.join([f'{prompt.layers} layers', *(f'{key} = {size}' for key, size in sizes.items())])})"


def duration(seconds: float) -> str:
    """Seconds for people: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _line(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)
