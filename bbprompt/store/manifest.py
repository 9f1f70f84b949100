"""What decides the result of a run, as the manifest holds it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

from bbprompt import __version__
from bbprompt.tasks.data import data_digest

if TYPE_CHECKING:
    from bbprompt.opened import Opened

__all__ = ["manifest_of"]

#: Libraries whose version may change a result.
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "cma", "botorch", "gpytorch")


def manifest_of(run: Opened) -> dict[str, Any]:
    """Settings, digests, versions and threads of a run."""
    info = run.model
    return {
        "config": run.config.deciding(),
        "method": run.method.model_dump(mode="json"),
        "task": run.task.model_dump(mode="json"),
        "data": {
            "source": run.data.source,
            "id": run.data.id,
            "few_shot": run.few.digest,
            "test": data_digest(run.test),
        },
        "model": {
            "backbone": info.backbone,
            "backbone_digest": info.backbone_digest,
            "prompts_digest": info.prompts_digest,
            "precision": info.precision,
            "device": info.device,
            "max_tokens": info.max_tokens,
            "versions": info.versions,
            "batch_tokens": info.batch_tokens,
            "piece": info.piece,
        },
        "threads": run.threads,
        "versions": {
            "bbprompt": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
    }
