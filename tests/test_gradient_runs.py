"""Methods that descend gradients, as whole runs on tiny models: results, resumes, use, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from bbprompt.config import TuneConfig, load_method
from bbprompt.errors import UsageError
from bbprompt.predict import load_prompt
from bbprompt.result import Result
from bbprompt.run import prepare, tune
from bbprompt.store.rundir import RunDirectory

SCRATCH = {"gradient.soft.prompt_length": 3, "gradient.prompt.epochs": 6, "gradient.prompt.dev_every": 3}
STAGES = {
    "gradient.router.epochs": 4,
    "gradient.router.dev_every": 2,
    "gradient.prompt.epochs": 4,
    "gradient.prompt.dev_every": 2,
    "gradient.prompt.rate": 0.05,
}


def settings(data: Path, method: str, changes: dict[str, Any], **keys: Any) -> TuneConfig:
    values = {"task": str(data / "task.yaml"), "data": str(data), "method": method, "threads": 1}
    return TuneConfig.model_validate(values | {"set": changes} | keys)


def begin(config: TuneConfig, folder: Path) -> Result:
    run = prepare(config)
    with RunDirectory.create(folder, run.manifest()) as directory:
        return tune(run, directory)


@pytest.mark.parametrize("name", ["prompt-tuning", "p-tuning-v2"])
def test_from_scratch(name: str, tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    changes = SCRATCH | {"gradient.soft.head": str(tiny_prompts)}
    result = begin(settings(tiny_pair_data, name, changes), tmp_path / "run")
    assert (result.calls.train, result.calls.dev) == (1 + 6 + 2, 1 + 2)
    tensors = load_file(tmp_path / "run" / "prompt.safetensors")
    assert tensors["prompt"].shape == (1 if name == "prompt-tuning" else tiny.LAYERS, 3, tiny.HIDDEN)
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


@pytest.mark.parametrize("name", ["mp2-gradient-deep", "mp2-gradient-shallow"])
def test_two_stages(
    name: str, tiny_pair_data: Path, tiny_prompts: Path, tiny_shallow_prompts: Path, tmp_path: Path
) -> None:
    prompts = tiny_prompts if name.endswith("deep") else tiny_shallow_prompts
    result = begin(settings(tiny_pair_data, name, STAGES, prompts=str(prompts)), tmp_path / "run")
    assert [stage.name for stage in result.stages] == ["router", "prompt"]
    print(result)
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value
