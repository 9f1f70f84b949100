"""A training that goes on from the prompts of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinytrain

from bbprompt.errors import ArtifactError, UsageError
from bbprompt.pretrain.run import pretrain
from bbprompt.prompts import ModularPrompt

pytestmark = pytest.mark.usefixtures("token_cache")

STILL: dict[str, Any] = {
    "steps": 1,
    "valid_every": 1,
    "save_every": 1,
    # So small that nothing moves.
    **dict.fromkeys(("module_rate", "projection_rate", "router_rate", "head_rate"), 1e-12),
}


def trained(data: Path, backbone: Path, out: Path, **changes: Any) -> ModularPrompt:
    pretrain(tinytrain.make_recipe(data, backbone, **changes), out, data, lambda progress, steps: None)
    return ModularPrompt.load(out / "artifact")


@pytest.mark.parametrize("readout", ["span", "prototype"])
def test_a_training_goes_on_from_an_artifact(readout: str, tmp_path: Path, tiny_bert_dir: Path) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    tasks = [str(data / name / "task.yaml") for name in ("tiny-pair", "tiny-choice")]
    own = {"readout": readout, "tasks": tasks}
    first = trained(data, tiny_bert_dir, tmp_path / "first", **own)
    begun = {**own, **STILL, "start": str(tmp_path / "first" / "artifact"), "tasks": tasks[::-1]}
    second = trained(data, tiny_bert_dir, tmp_path / "second", **begun)

    points = np.random.default_rng(0).normal(size=(5, *first.space.shape)).astype(np.float32)
    # float16 in the artifact.
    np.testing.assert_allclose(second.prompts(points), first.prompts(points), atol=2e-3)
    np.testing.assert_allclose(second.head_weight, first.head_weight, atol=1e-4)
    assert second.config.tasks == first.config.tasks[::-1]
    np.testing.assert_allclose(second.routers, first.routers[::-1], atol=1e-3)
    if readout == "prototype":
        assert second.config.pooling == first.config.pooling
    assert second.config.training["recipe"]["start"] == f"artifact ({first.digest[:12]})"
    assert "Begun with the prompts artifact" in (tmp_path / "second" / "artifact" / "README.md").read_text()
    other = trained(data, tiny_bert_dir, tmp_path / "other", **own, seed=7, **STILL)
    assert np.abs(other.prompts(points) - first.prompts(points)).max() > 0.01, "another training, another prompt"


def test_a_new_task_gets_a_router_and_the_old_sources_stay(tmp_path: Path, tiny_bert_dir: Path) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    pair, choice = (str(data / name / "task.yaml") for name in ("tiny-pair", "tiny-choice"))
    first = trained(data, tiny_bert_dir, tmp_path / "first", tasks=[pair])
    begun = {**STILL, "start": str(tmp_path / "first" / "artifact"), "tasks": [choice]}
    second = trained(data, tiny_bert_dir, tmp_path / "second", **begun)
    assert second.config.tasks == ("tiny-choice",)
    assert np.abs(second.routers).max() < 2e-3, "untrained"
    assert set(first.config.sources) < set(second.config.sources)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": 4}, "modules 3, but the recipe asks for 4"),
        ({"kind": "mp2-shallow"}, "kind mp2-deep, but the recipe asks for mp2-shallow"),
        ({"intrinsic_dim": 5}, "intrinsic_dim 4, but the recipe asks for 5"),
        ({"first_placeholder": 301}, "placeholders"),
        ({"start": "nowhere-to-be-found"}, "nowhere-to-be-found"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, tiny_bert_dir: Path
) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    trained(data, tiny_bert_dir, tmp_path / "first", steps=1)
    with pytest.raises((ArtifactError, UsageError), match=message):
        trained(data, tiny_bert_dir, tmp_path / "second", **{"start": str(tmp_path / "first" / "artifact"), **changes})
