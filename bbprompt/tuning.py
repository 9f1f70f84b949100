"""`bbprompt.tune`: a whole run in one call, for Python users."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

from bbprompt.config import TuneConfig
from bbprompt.errors import UsageError
from bbprompt.opened import Opened
from bbprompt.result import Result
from bbprompt.run import Watcher, default_directory, prepare, reopen
from bbprompt.run import tune as tune_in
from bbprompt.store.rundir import MANIFEST, RunDirectory
from bbprompt.yamlfile import validate

__all__ = ["tune"]

_log = logging.getLogger("bbprompt")


def tune(
    config: TuneConfig | None = None,
    *,
    run_dir: Path | str | None = None,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Result:
    """Tune a prompt, or go on with the same run where it was begun before; a finished one is not repeated.

    Args:
        config: The settings; or give them by name, such as `tune(task="lcqmc", budget=8000)`.
        run_dir: Where the run is kept, or was begun; None for `runs/<task>-<method>-<seed>-<digest>`.
        watcher: Hears of the progress, and may stop the run by raising `Interrupted`.
        settings: Fields of `TuneConfig`.

    Returns:
        What was found; the same is in `result.json` of the run directory.

    Raises:
        UsageError: A setting is wrong, or the directory holds something that is no run.
        ResumeMismatch: The run in the directory began with other settings, data, model or code.
        RunLocked: Another process works on it.
        DataError: Data or artifacts are wrong.
        DiskError: The run directory cannot be written.
        Interrupted: The run was stopped; the same call, or `bbprompt resume`, goes on with it.
    """
    if config is not None and settings:
        raise UsageError(f"tune: give a TuneConfig or settings by name, not both ({', '.join(settings)})")
    asked = config if config is not None else validate(TuneConfig, settings, "tune")
    run = prepare(asked if run_dir is None else _as_begun(asked, Path(run_dir)))
    with (
        closing(run),
        _claimed(run, Path(run_dir) if run_dir is not None else default_directory(run)) as directory,
    ):
        return tune_in(run, directory, watcher)


def _as_begun(config: TuneConfig, path: Path) -> TuneConfig:
    """With what the run in a directory chose for itself where nothing is said: another machine chooses otherwise."""
    if not (path / MANIFEST).is_file():
        return config
    directory, begun = reopen(path, writable=False)
    directory.close()
    open_ones = [key for key in ("dtype", "batch_tokens", "threads") if getattr(config, key) in (None, "auto")]
    return config.model_copy(update={key: getattr(begun, key) for key in open_ones})


def _claimed(run: Opened, path: Path) -> RunDirectory:
    """The run's directory, new or begun before; whether the run there is this one is checked as it goes on."""
    if (path / MANIFEST).is_file():
        _log.info("%s: begun before; going on with it", path)
        return RunDirectory.open(path)
    return RunDirectory.create(path, run.manifest())
