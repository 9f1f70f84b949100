"""A finished run on tiny models, without the router stage, whose Gaussian process takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bbprompt


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
