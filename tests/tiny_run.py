"""Runs on tiny models, without the router stage, whose Gaussian process takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bbprompt
from bbprompt.config import TuneConfig
from bbprompt.result import Result
from bbprompt.run import Prepared, Watcher, reopen, tune
from bbprompt.store.rundir import RunDirectory

FAST: dict[str, Any] = {"router": None, "prompt.popsize": 8, "prompt.dev_every": 16}


def config(data: Path, prompts: Path, **changes: Any) -> TuneConfig:
    """Settings of a short run on data that hold their `task.yaml`."""
    settings = {
        "task": str(data / "task.yaml"),
        "data": str(data),
        "prompts": str(prompts),
        "budget": 60,
        "device": "cpu",
        "threads": 1,
        "set": FAST,
    }
    return TuneConfig.model_validate(settings | changes)


def begin(run: Prepared, folder: Path, watcher: Watcher | None = None) -> Result:
    """Tune in a new folder."""
    with RunDirectory.create(folder, run.manifest()) as directory:
        return tune(run, directory, watcher)


def go_on(run: Prepared, folder: Path, watcher: Watcher | None = None) -> Result:
    """Go on in a folder."""
    directory, _ = reopen(folder, writable=True)
    with directory:
        return tune(run, directory, watcher)


def finished(folder: Path, data: Path, prompts: Path, **settings: Any) -> Path:
    """Tune in `folder` on a data directory that holds its `task.yaml`."""
    values: dict[str, Any] = {
        "budget": 44,
        "seed": 7,
        "threads": 1,
        "dtype": "float32",
        "set": {"router": None, "prompt.patience": None},
    }
    bbprompt.tune(
        task=str(data / "task.yaml"), data=str(data), prompts=str(prompts), run_dir=folder, **(values | settings)
    )
    return folder
