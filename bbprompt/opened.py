"""A run with everything open, whatever its method is, and who hears of its progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from bbprompt.config import MethodConfig, TuneConfig
    from bbprompt.oracle import OracleInfo
    from bbprompt.result import Result
    from bbprompt.search.tuner import Status
    from bbprompt.store.rundir import RunDirectory
    from bbprompt.tasks.data import DataSource
    from bbprompt.tasks.example import Example
    from bbprompt.tasks.fewshot import FewShot
    from bbprompt.tasks.task import Task

__all__ = ["Opened", "Watcher"]


class Opened(Protocol):
    """A search, a baseline or a descent by gradients before its first call."""

    @property
    def config(self) -> TuneConfig:
        """The settings of the run, threads and precision decided."""

    @property
    def method(self) -> MethodConfig:
        """Its method, with the changes of `--set`."""

    @property
    def task(self) -> Task:
        """Its task."""

    @property
    def data(self) -> DataSource:
        """Where the data are from."""

    @property
    def few(self) -> FewShot:
        """The few-shot split."""

    @property
    def test(self) -> tuple[Example, ...]:
        """What is scored at the end."""

    @property
    def model(self) -> OracleInfo:
        """What the model says of itself."""

    @property
    def reader(self) -> object:
        """What reads the texts, see `bbprompt.readable.can_check`; None where nothing is read."""

    @property
    def threads(self) -> int:
        """CPU threads."""

    @property
    def load_seconds(self) -> float:
        """How long it took to open everything."""

    def manifest(self) -> dict[str, Any]:
        """Everything that decides the result: settings, digests, versions, threads."""

    def tune(self, directory: RunDirectory, watcher: Watcher) -> Result:
        """Run, or go on, in a directory and write the result; see `bbprompt.run.tune`."""

    def close(self) -> None:
        """Let go of the model."""


class Watcher:
    """Hears of a run's progress; the base class is silent. The terminal display overrides what it shows."""

    def prepared(self, run: Opened) -> None:
        """Everything is open; the search begins."""

    def status(self, status: Status) -> None:
        """A batch of calls is settled. Raising here stops the run, which can then be resumed."""

    def testing(self, done: int, total: int) -> None:
        """So many test examples are scored. Raising here stops the run."""

    def comparing(self, done: int, total: int) -> None:
        """So many texts are read for the baselines that the result is shown with. Raising here stops the run."""
