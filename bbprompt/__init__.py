"""Tune the prompt of a frozen language model that you can only call forward.

The public names are imported when they are first used, so that `import bbprompt` is quick.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bbprompt.config import TuneConfig
    from bbprompt.connect import open_oracle
    from bbprompt.errors import (
        ArtifactError,
        BBPromptError,
        DataError,
        DiskError,
        Interrupted,
        JournalCorrupt,
        OracleError,
        ResumeMismatch,
        RunLocked,
        TextError,
        UsageError,
    )
    from bbprompt.oracle import Oracle
    from bbprompt.predict import load_prompt
    from bbprompt.prompts import ModularPrompt, PromptSpace
    from bbprompt.result import Result
    from bbprompt.tasks.task import Task
    from bbprompt.tuning import tune

__all__ = [
    "ArtifactError",
    "BBPromptError",
    "DataError",
    "DiskError",
    "Interrupted",
    "JournalCorrupt",
    "ModularPrompt",
    "Oracle",
    "OracleError",
    "PromptSpace",
    "Result",
    "ResumeMismatch",
    "RunLocked",
    "Task",
    "TextError",
    "TuneConfig",
    "UsageError",
    "__version__",
    "load_prompt",
    "open_oracle",
    "tune",
]

__version__ = "0.1.0"

_HOMES = {
    "ModularPrompt": "prompts",
    "Oracle": "oracle",
    "PromptSpace": "prompts",
    "Result": "result",
    "Task": "tasks.task",
    "TuneConfig": "config",
    "load_prompt": "predict",
    "open_oracle": "connect",
    "tune": "tuning",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module, once."""
    if name not in __all__:
        raise AttributeError(f"module 'bbprompt' has no attribute {name!r}")
    value: object = getattr(_import_module(f"bbprompt.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
