"""`bbprompt.tune`: a whole run in one call, for Python users."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from bbprompt.config import TuneConfig
from bbprompt.errors import UsageError
from bbprompt.result import Result
from bbprompt.run import Watcher, default_directory, prepare
from bbprompt.run import tune as tune_in
from bbprompt.store.rundir import RunDirectory
from bbprompt.yamlfile import validate

__all__ = ["tune"]


def tune(
    config: TuneConfig | None = None,
    *,
    run_dir: Path | str | None = None,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Result:
    """Tune a prompt.

    Args:
        config: The settings; or give them by name, such as `tune(task="lcqmc", budget=8000)`.
        run_dir: Where the run is kept; None for `runs/<task>-<method>-<seed>-<digest>`.
        watcher: Hears of the progress, and may stop the run by raising `Interrupted`.
        settings: Fields of `TuneConfig`.

    Returns:
        What was found; the same is in `result.json` of the run directory.

    Raises:
        UsageError: A setting is wrong, or the directory holds another run.
        DataError: Data or artifacts are wrong.
        DiskError: The run directory cannot be written.
        Interrupted: The run was stopped; `bbprompt resume` goes on with it.
    """
    if config is not None and settings:
        raise UsageError(f"tune: give a TuneConfig or settings by name, not both ({', '.join(settings)})")
    run = prepare(config if config is not None else validate(TuneConfig, settings, "tune"))
    with (
        closing(run),
        RunDirectory.create(run_dir or default_directory(run), run.manifest()) as directory,
    ):
        return tune_in(run, directory, watcher)
