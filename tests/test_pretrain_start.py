"""A training that goes on from the prompts of an artifact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinytrain
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from bbprompt.errors import ArtifactError, ResumeMismatch, UsageError
from bbprompt.pretrain.mp2 import Progress
from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.run import pretrain
from bbprompt.pretrain.schedule import rate_factor
from bbprompt.prompts import ModularPrompt

pytestmark = pytest.mark.usefixtures("token_cache")

STILL: dict[str, Any] = {
    "steps": 1,
    "valid_every": 1,
    "save_every": 1,
    # So small that nothing moves.
    **dict.fromkeys(("module_rate", "projection_rate", "router_rate", "head_rate"), 1e-12),
}


def window(out: Path) -> float:
    """The loss of the only step."""
    lines = map(json.loads, (out / "train.jsonl").read_text(encoding="utf-8").splitlines())
    return next(float(line["loss"]) for line in lines if "loss" in line)


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


@pytest.mark.parametrize("readout", ["span", "prototype"])
@pytest.mark.parametrize("kind", ["mp2-shallow", "spot"])
def test_an_input_prompt_takes_over_from_prompts_before_every_layer(
    kind: str, readout: str, tmp_path: Path, tiny_bert_dir: Path
) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    tasks = [str(data / name / "task.yaml") for name in ("tiny-pair", "tiny-choice")]
    own = {"readout": readout, "tasks": tasks}
    first = trained(data, tiny_bert_dir, tmp_path / "first", **own, prompt_scale=1.0)
    modules = {"modules": 1} if kind == "spot" else {}
    fading = {**own, **modules, "kind": kind, "start": str(tmp_path / "first" / "artifact"), "fade": 1.0}
    second = trained(data, tiny_bert_dir, tmp_path / "second", **fading, **STILL)
    assert second.config.layers == 1
    even, held = first.space.even()[None], second.space.even()[None]
    np.testing.assert_allclose(second.prompts(held)[0, :1], first.prompts(even)[0, :1], atol=2e-3)
    if kind == "mp2-shallow":
        np.testing.assert_allclose(second.routers, first.routers[:, :1], atol=1e-3)

    # Its first step is one of the prompts before every layer, and one without them differs from it.
    whole = {**own, **STILL, "start": str(tmp_path / "first" / "artifact")}
    trained(data, tiny_bert_dir, tmp_path / "whole", **whole)
    alone = {**own, **modules, **STILL, "kind": kind, "start": str(tmp_path / "second" / "artifact")}
    trained(data, tiny_bert_dir, tmp_path / "alone", **alone)
    losses = {name: window(tmp_path / name) for name in ("second", "whole", "alone")}
    assert abs(losses["alone"] - losses["whole"]) > 1e-4
    if kind == "mp2-shallow":
        assert losses["second"] == pytest.approx(losses["whole"], abs=2e-6)
    else:  # the input's prompt is the same for all tasks, the others their own
        assert abs(losses["second"] - losses["alone"]) > 1e-4


@pytest.mark.parametrize("kind", ["spot", "ppt"])
def test_one_prompt_begins_with_the_mean_of_the_modules(kind: str, tmp_path: Path, tiny_bert_dir: Path) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    first = trained(data, tiny_bert_dir, tmp_path / "first")
    begun: dict[str, Any] = {"kind": kind, "depth": "all", "modules": 1, "start": str(tmp_path / "first" / "artifact")}
    if kind == "ppt":
        file = tinytrain.corpus(tmp_path / "corpus.txt", 60)
        begun |= {"ppt": {"corpus": [str(file)], "options": [2, 3]}, "tasks": [], "tasks_per_step": 1}
    second = trained(data, tiny_bert_dir, tmp_path / "second", **begun, **STILL)
    one, mean = (first.prompts(first.modules.mean(1)), second.prompts(second.modules[:, 0]))
    np.testing.assert_allclose(mean, one, atol=2e-3)
    np.testing.assert_allclose(second.head_weight, first.head_weight, atol=1e-4)


def test_a_fading_start_killed_and_gone_on_with_ends_the_same(tmp_path: Path, tiny_bert_dir: Path) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    trained(data, tiny_bert_dir, tmp_path / "first", steps=2, prompt_scale=1.0)
    start = {"kind": "mp2-shallow", "start": str(tmp_path / "first" / "artifact"), "fade": 0.7}
    whole = trained(data, tiny_bert_dir, tmp_path / "whole", **start)

    def stop(progress: Progress, steps: int) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    recipe = tinytrain.make_recipe(data, tiny_bert_dir, **start)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, tmp_path / "killed", data, stop)
    pretrain(recipe, tmp_path / "killed", data, lambda progress, steps: None, resume=True)
    assert ModularPrompt.load(tmp_path / "killed" / "artifact").digest == whole.digest
    trained(data, tiny_bert_dir, tmp_path / "other", steps=2, prompt_scale=1.0, seed=7)
    shutil.copytree(tmp_path / "other" / "artifact", tmp_path / "first" / "artifact", dirs_exist_ok=True)
    with pytest.raises(ResumeMismatch, match="was made with start "):
        pretrain(recipe, tmp_path / "killed", data, lambda progress, steps: None, resume=True)
    unlike = trained(data, tiny_bert_dir, tmp_path / "unlike", **start | {"fade": 0.2})
    assert unlike.digest != whole.digest


def test_deeper_prompts_fade_evenly() -> None:
    recipe = PretrainConfig(kind="spot", modules=1, start="x", fade=0.5, steps=8)
    assert [recipe.left_at(step) for step in range(8)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert PretrainConfig(kind="spot", modules=1).left_at(0) == 0.0


@pytest.mark.parametrize(
    "changes",
    [{"kind": "mp2-deep", "start": "x"}, {"kind": "spot", "modules": 1}, {"kind": "mp2-shallow", "fade": 1.1}],
)
def test_a_fade_that_nothing_fades_in_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="fade"):
        PretrainConfig.model_validate({"fade": 0.5, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": 4}, "modules 3, but the recipe asks for 4"),
        ({"kind": "mp2-shallow"}, "kind mp2-deep, but the recipe asks for mp2-shallow"),
        ({"intrinsic_dim": 5}, "intrinsic_dim 4, but the recipe asks for 5"),
        ({"first_placeholder": 301}, "placeholders"),
        ({"start": "nowhere-to-be-found"}, "nowhere-to-be-found"),
        ({"kind": "mp2-shallow", "fade": 0.5, "modules": 2}, "modules 3, but the recipe asks for 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, tiny_bert_dir: Path
) -> None:
    data = tinytrain.data_root(tmp_path / "data")
    trained(data, tiny_bert_dir, tmp_path / "first", steps=1)
    with pytest.raises((ArtifactError, UsageError), match=message):
        trained(data, tiny_bert_dir, tmp_path / "second", **{"start": str(tmp_path / "first" / "artifact"), **changes})


def test_without_fast_and_slow_learning_routers_learn_as_slowly_as_prompts(tiny_bert_dir: Path, tmp_path: Path) -> None:
    """Adam's first step is as long as the rate, whatever the gradient."""
    data = tinytrain.data_root(tmp_path / "data")
    moved = {}
    for fsl in (True, False):
        changes = {"steps": 1, "warmup": 0.0, "module_rate": 0.01, "router_rate": 0.05, "fsl": fsl, "noise_from": 1.0}
        recipe = tinytrain.make_recipe(data, tiny_bert_dir, kind="mp2-deep", **changes)
        pretrain(recipe, tmp_path / str(fsl), data, lambda progress, steps: None)
        moved[fsl] = load_file(tmp_path / str(fsl) / "checkpoint.safetensors")
    torch.testing.assert_close(moved[True]["bank"], moved[False]["bank"])
    further = (moved[True]["router"] - moved[False]["router"]).abs()
    factor = rate_factor(0, 1, 0.0)
    assert further.max() == pytest.approx((0.05 - 0.01) * factor, rel=1e-2)
