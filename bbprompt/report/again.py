"""How to do it again: the commands that make a run or a sweep anew, without anything that lies in its directory."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bbprompt.config import TuneConfig
from bbprompt.sweep.experiment import Experiment

__all__ = ["SWEEP_FLAGS", "reproduce", "reproduce_sweep"]

#: Settings of `tune` that `bbprompt sweep` has flags for; others, and variants, only a file can say.
SWEEP_FLAGS = (
    "data",
    "backbone",
    "prompts",
    "budget",
    "shots",
    "backend",
    "on_doubt",
    "device",
    "dtype",
    "batch_tokens",
    "max_tokens",
    "threads",
    "test_limit",
    "allow_overlap",
    "baselines",
)


def reproduce(config: TuneConfig, manifest: Mapping[str, Any]) -> str:
    """The command that makes a run again, and what it has to meet."""
    values = {**config.model_dump(mode="json", exclude={"set"}), "threads": manifest.get("threads") or config.threads}
    said = {
        key: value
        for key, value in values.items()
        if value != TuneConfig.model_fields[key].default or key in ("method", "budget", "seed")
    }
    versions = manifest.get("versions", {})
    pins = "\n".join(f"#   {name} {version}" for name, version in versions.items())
    return f"{_command('tune', said, config.set)}\n\n# found with\n{pins}"


def reproduce_sweep(experiment: Experiment, folder: Path) -> str:
    """The command that makes a sweep again; before it the file that it reads, where flags cannot say everything."""
    settings = dict(experiment.settings)
    changes = settings.pop("set", None) or {}
    commas = any("," in name for name in (*experiment.tasks, *experiment.methods))
    if experiment.variants or commas or not settings.keys() <= set(SWEEP_FLAGS):
        values = experiment.model_dump(mode="json", exclude={"settings"}, exclude_defaults=True)
        text = yaml.safe_dump({**values, **experiment.settings}, allow_unicode=True, sort_keys=False)
        command = _command("sweep", {"config": "experiment.yaml", "out": folder}, {})
        return f"cat > experiment.yaml <<'END'\n{text}END\n{command}"
    grid = {key: ",".join(map(str, getattr(experiment, key))) for key in ("tasks", "methods", "seeds")}
    return _command("sweep", {**grid, **settings, "out": folder}, changes)


def _command(name: str, values: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """A command line; values that are None stay unsaid."""
    words = ["bbprompt", name]
    for key, value in values.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    for key, value in changes.items():
        words += ["--set", f"{key}={_yaml(value)}"]
    return shlex.join(words)


def _yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")
