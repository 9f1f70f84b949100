"""Whole runs by every preset that starts from modular prompts: their stages, and the same result again."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_prompt
from tiny_run import begin, config

from bbprompt.backends.backbone import Backbone
from bbprompt.prompts import Pooling
from bbprompt.run import prepare

PROTOTYPE = {"readout": "prototype", "pooling": Pooling(scale=10.0, prefix="")}
PRESETS: dict[str, tuple[str, ...]] = {
    "mp2-deep": ("upstream", "router", "prompt", "calibration"),
    "mp2-deep-code": ("router", "prompt"),
    "mp2-deep-paper": ("router", "prompt"),
    "mp2-shallow": ("upstream", "router", "prompt", "calibration"),
    "mp2-shallow-code": ("router", "prompt"),
    "mp2-shallow-paper": ("router", "prompt"),
    "mp2-proto": ("upstream", "router", "prompt"),
    "router-only": ("upstream", "router"),
}


@pytest.mark.parametrize("method", PRESETS)
def test_the_stages_of_a_preset(method: str, tiny_pair_data: Path, backbone: Backbone, tmp_path: Path) -> None:
    kind = "mp2-shallow" if "shallow" in method else "mp2-deep"
    keys = PROTOTYPE if method == "mp2-proto" else {}
    tiny_prompt.artifact(Path(backbone.id), backbone.digest, kind=kind, **keys).save(tmp_path / "prompts")
    changes = {"router.calls": 8, "router.random": 4} | ({"prompt.popsize": 8} if method != "router-only" else {})
    run = prepare(config(tiny_pair_data, tmp_path / "prompts", method=method, set=changes, budget=50))
    result = begin(run, tmp_path / "run")
    assert tuple(stage.name for stage in result.stages) == PRESETS[method]
    optimizers = [stage.optimizer for stage in result.stages if stage.name in ("router", "prompt")]
    assert optimizers == ["bo-ucb", "cmaes"][: len(optimizers)]
    assert result.calls.test <= 4
    assert begin(run, tmp_path / "again").digest == result.digest
