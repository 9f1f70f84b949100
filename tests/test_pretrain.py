"""Pre-training: gates, mixture, loss, a short training, its death, and what it must not see."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinytrain
import torch

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.errors import ArtifactError, DataError, ResumeMismatch, UsageError
from bbprompt.metrics import accuracy
from bbprompt.pretrain.mixture import Mixture, Upstream, thin_options
from bbprompt.pretrain.model import ModularPrompts, Phase, span_loss
from bbprompt.pretrain.mp2 import Progress
from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.run import pretrain
from bbprompt.pretrain.upstream import load_upstream, upstream_tasks
from bbprompt.prompts import ModularPrompt
from bbprompt.readout import Readout
from bbprompt.router import CODE
from bbprompt.scoring import labelled
from bbprompt.tasks.data import open_data
from bbprompt.tasks.fewshot import pool_uids
from bbprompt.tasks.task import load_task

pytestmark = pytest.mark.usefixtures("token_cache")

# --------------------------------------------------------------------------------------- the tiny setup


@pytest.fixture(scope="module")
def upstream_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of three task directories, with the task's YAML in each."""
    return tinytrain.data_root(tmp_path_factory.mktemp("upstream"))


@pytest.fixture(scope="module")
def recipe(upstream_data: Path, tiny_bert_dir: Path) -> PretrainConfig:
    """Six steps of mp2-deep."""
    return tinytrain.make_recipe(upstream_data, tiny_bert_dir)


def silent(progress: Progress, steps: int) -> None:
    """Nothing is shown."""


def loaded(recipe: PretrainConfig, data: Path, **changes: Any) -> tuple[list[Upstream], Any]:
    tokenizer = load_backbone(recipe.backbone).tokenizer
    frame = frame_for(tokenizer, (300, 301), recipe.max_tokens)
    settings: dict[str, Any] = {
        "tokenize": tokenize_with(tokenizer),
        "frame": frame,
        "option_limit": 6,
        "option_characters": 40,
        "spare_seeds": [1, 2],
        "cap": 1000,
        "valid": 8,
        "seed": 42,
    }
    return load_upstream(upstream_tasks(recipe.tasks), data, **(settings | changes)), settings


# --------------------------------------------------------------------------------------------- mixture


@pytest.fixture(scope="module")
def make_mixture(recipe: PretrainConfig, upstream_data: Path) -> Callable[..., Mixture]:
    tasks, settings = loaded(recipe, upstream_data)

    def make(**changes: Any) -> Mixture:
        defaults: dict[str, Any] = {
            "seed": 3,
            "tasks_per_step": 2,
            "per_task": 3,
            "option_limit": 3,
            "option_characters": 40,
            "shuffle_options": True,
        }
        return Mixture(tasks, settings["tokenize"], settings["frame"], **(defaults | changes))

    return make


def test_a_batch_depends_on_seed_and_step_alone(make_mixture: Callable[..., Mixture]) -> None:
    one, other = make_mixture(), make_mixture()
    for _ in range(3):
        one.batch(7)
    assert one.batch(5).ids == other.batch(5).ids
    assert torch.equal(one.batch(5).gold, other.batch(5).gold)
    assert one.batch(5).ids != one.batch(6).ids
    assert one.batch(5).ids != make_mixture(seed=4).batch(5).ids


def test_every_task_has_its_turn(make_mixture: Callable[..., Mixture]) -> None:
    mixture = make_mixture()
    turns = [index for step in range(6) for index in mixture.batch(step).tasks.tolist()[::3]]
    assert [Counter(turns[i : i + 3]) for i in range(0, 12, 3)] == [Counter(range(3))] * 4
    assert turns[:3] != turns[3:6] or turns[3:6] != turns[6:9], "in random order"
    assert all(mixture.batch(step).tasks.bincount(minlength=3).max() <= 6 for step in range(6))


def test_a_weight_is_visits_a_round(make_mixture: Callable[..., Mixture]) -> None:
    mixture = make_mixture(weights={"tiny-choice": 3}, tasks_per_step=5)
    for step in range(4):
        assert mixture.batch(step).tasks.bincount(minlength=3).tolist() == [3, 9, 3]


@pytest.mark.parametrize("weight", [1, 3])
def test_an_epoch_sees_every_example_once(weight: int, make_mixture: Callable[..., Mixture]) -> None:
    mixture = make_mixture(
        weights={"tiny-pair": weight}, shuffle_options=False, tasks_per_step=1, per_task=4, option_limit=2
    )
    count = len(mixture.tasks[0].train)
    assert count == 92
    visits = 3 * count // 4  # three epochs, which are whole rounds under both weights
    seen: list[tuple[int, ...]] = []
    for step in range(visits // weight * (2 + weight)):
        batch = mixture.batch(step)
        seen += [ids for ids, task in zip(batch.ids, batch.tasks.tolist(), strict=True) if task == 0]
    assert len(seen) == 3 * count
    assert set(Counter(seen).values()) == {3}
    if weight == 1:
        epochs = [seen[:count], seen[count : 2 * count], seen[2 * count :]]
        assert [len(set(epoch)) for epoch in epochs] == [count] * 3
        assert epochs[0] != epochs[1]


def test_validation_is_the_same_every_time(make_mixture: Callable[..., Mixture]) -> None:
    first, second = make_mixture().valid(1, 8, 3), make_mixture(seed=9).valid(1, 8, 3)
    assert [len(batch.ids) for batch in first] == [3, 3, 2]
    assert [batch.ids for batch in first] == [batch.ids for batch in second]


# -------------------------------------------------------------------------------- what may be trained on


def test_tasks_of_the_evaluation_side_are_refused() -> None:
    with pytest.raises(UsageError, match="'lcqmc' is of track unseen and must not be trained on"):
        upstream_tasks(["afqmc", "lcqmc"])
    tracks = {task.track for task in upstream_tasks("upstream")}
    assert tracks == {"upstream", "seen"}
    assert len(upstream_tasks("upstream")) == 38
    assert not {task.name for task in upstream_tasks("upstream")} & {"lcqmc", "ocnli", "tnews", "c3", "cote_bd"}


def test_few_shot_pools_of_seen_tasks_are_left_out(recipe: PretrainConfig, upstream_data: Path) -> None:
    tasks, _ = loaded(recipe, upstream_data)
    by_name = {upstream.task.name: upstream for upstream in tasks}
    seen = by_name["tiny-extract"]
    all_train = [
        seen.task.example(json.loads(line))
        for line in (upstream_data / "tiny-extract" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    pool = pool_uids(seen.task, all_train, [1, 2])
    assert len(pool) > 64
    used = {example.uid for example in (*seen.train, *seen.valid)}
    assert not used & pool
    assert len(seen.train) + len(seen.valid) == len(all_train) - len(pool)
    # An upstream task keeps all of its examples, but for those that validate.
    pair = by_name["tiny-pair"]
    assert len(pair.train) + len(pair.valid) == 100
    assert not {e.uid for e in pair.train} & {e.uid for e in pair.valid}


def test_what_does_not_fit_is_left_out(recipe: PretrainConfig, upstream_data: Path, tmp_path: Path) -> None:
    tokenizer = load_backbone(recipe.backbone).tokenizer
    shorter = frame_for(tokenizer, (300, 301), 40)
    whole = {u.task.name: u for u in loaded(recipe, upstream_data)[0]}
    less = {u.task.name: u for u in loaded(recipe, upstream_data, frame=shorter)[0]}
    assert 0 < len(less["tiny-choice"].train) < len(whole["tiny-choice"].train)
    with pytest.raises(DataError, match="no example fits 20 tokens; raise max_tokens"):
        loaded(recipe, upstream_data, frame=replace(shorter, limit=20))
    capped = loaded(recipe, upstream_data, cap=5)[0]
    assert [len(upstream.train) for upstream in capped] == [5, 5, 5]


def test_what_is_tested_on_is_not_validated_on(recipe: PretrainConfig, upstream_data: Path) -> None:
    """A `seen` task without a test split is tested on its dev split: a fifth of train is validated on instead."""
    tasks, _ = loaded(recipe, upstream_data)
    drawn = {task.task.name: {example.uid for example in task.valid} for task in tasks}
    for name, spent in (("tiny-choice", False), ("tiny-extract", True)):
        task = load_task(str(upstream_data / name / "task.yaml"))
        dev = {example.uid for example in open_data(task, upstream_data / name).split("dev")}
        assert drawn[name]
        assert drawn[name].isdisjoint(dev) if spent else drawn[name] <= dev


def test_a_single_validation_example_is_enough(recipe: PretrainConfig, upstream_data: Path, tmp_path: Path) -> None:
    few = recipe.model_copy(update={"valid_size": 1, "keep": "last", "steps": 4})
    assert len(pretrain(few, tmp_path / "out", upstream_data, silent)) == 3


def test_a_sample_is_no_upstream_data(monkeypatch: pytest.MonkeyPatch, recipe: PretrainConfig) -> None:
    monkeypatch.delenv("BBPROMPT_DATA", raising=False)
    tokenizer = load_backbone(recipe.backbone).tokenizer
    lcqmc = load_task("lcqmc").model_copy(update={"track": "upstream", "hub": None})
    with pytest.raises(DataError, match="pre-training needs the real data"):
        load_upstream(
            [lcqmc],
            None,
            tokenize=tokenize_with(tokenizer),
            frame=frame_for(tokenizer, (300, 301), 60),
            option_limit=6,
            option_characters=40,
            spare_seeds=[1],
            cap=10,
            valid=4,
            seed=1,
        )


def test_the_tuning_side_never_imports_pre_training() -> None:
    code = (
        "import sys, bbprompt, bbprompt.run, bbprompt.tuning, bbprompt.predict, bbprompt.backends.local, "
        "bbprompt.backends.backbone, bbprompt.optimizers.gp, bbprompt.optimizers.cmaes, bbprompt.testing;"
        "print(*[name for name in sys.modules if name.startswith('bbprompt.pretrain')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# -------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(recipe: PretrainConfig, upstream_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished training of six steps."""
    out = tmp_path_factory.mktemp("pretrain") / "out"
    steps: list[Progress] = []
    scores = pretrain(recipe, out, upstream_data, lambda progress, _: steps.append(progress))
    assert [progress.step for progress in steps] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(progress.loss) and progress.tokens_per_second > 0 for progress in steps)
    assert steps[-1].seconds_left == 0
    assert set(scores) == {"tiny-pair", "tiny-choice", "tiny-extract"}
    return out


def test_the_artifact_of_a_training(trained: Path, recipe: PretrainConfig, upstream_data: Path) -> None:
    prompt = ModularPrompt.load(trained / "artifact")
    config = prompt.config
    assert (config.kind, config.layers, config.modules, config.intrinsic_dim) == ("mp2-deep", 3, 3, 4)
    assert config.tasks == ("tiny-pair", "tiny-choice", "tiny-extract")
    assert config.placeholders == (300, 301)
    assert config.training["recipe"] == recipe.model_dump(mode="json")
    assert config.sources[0] == "tiny-pair: made up (none)"
    assert config.license == recipe.license
    # Modules have unit size in every layer; A takes the factor up.
    np.testing.assert_allclose(np.sqrt((prompt.modules**2).mean((1, 2))), 1.0, rtol=1e-3)
    lines = [json.loads(line) for line in (trained / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "valid" in line] == [0, 4, 6]
    card = (trained / "artifact" / "README.md").read_text(encoding="utf-8")
    assert "tiny-choice" in card
    assert recipe.license in card
    assert config.backbone_digest in card
    curve = [[line["step"], line["loss"], line["right"]] for line in lines if "loss" in line]
    assert [step for step, _, _ in curve] == [2, 4, 6]
    assert config.training["curve"] == curve
    assert all(f"| {step} | {loss:.3f} | {right:.3f} |" in card for step, loss, right in curve)
    assert "bbprompt pretrain mp2 --config RECIPE.yaml" in card


def test_the_tuning_side_scores_as_the_training_did(trained: Path, recipe: PretrainConfig, upstream_data: Path) -> None:
    prompt = ModularPrompt.load(trained / "artifact")
    oracle = LocalOracle(load_backbone(recipe.backbone), prompt, max_tokens=recipe.max_tokens)
    tasks, _ = loaded(recipe, upstream_data, cap=recipe.train_cap, valid=recipe.valid_size)
    scores = prompt.config.training["validation"]
    points = prompt.space.mix(prompt.space.routers, CODE)
    for index, upstream in enumerate(tasks[:2]):
        limited = [
            thin_options(e, recipe.option_limit, recipe.option_characters, False, np.random.default_rng(int(e.uid, 16)))
            for e in upstream.valid
        ]
        data = labelled(upstream.task, limited, for_loss=True)
        reply = oracle.score(data.batch, points[index : index + 1])
        right = accuracy(Readout().choices(reply, data.batch)[0], data.gold).mean()
        assert right == pytest.approx(scores[upstream.task.name], abs=1e-3)


def test_the_model_learns(recipe: PretrainConfig, upstream_data: Path, tmp_path: Path) -> None:
    quick = {"prompt_scale": 1.0, "head_rate": 0.05, "module_rate": 0.1, "projection_rate": 0.05, "noise_from": 1.0}
    one = {"steps": 60, "tasks": recipe.tasks[:1], "tasks_per_step": 1, "per_task": 8, "train_cap": 8}
    longer = recipe.model_copy(update=one | quick)
    losses: list[float] = []
    pretrain(longer, tmp_path / "out", upstream_data, lambda progress, _: losses.append(progress.loss))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def final(out: Path) -> dict[str, bytes]:
    files = ("checkpoint.safetensors", "artifact/model.safetensors", "artifact/config.json")
    return {name: (out / name).read_bytes() for name in files}


class KilledError(Exception):
    """Stands for the death of the process: nothing is saved on the way out."""


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_a_killed_training_ends_the_same(
    at: int, trained: Path, recipe: PretrainConfig, upstream_data: Path, tmp_path: Path
) -> None:
    def killer(progress: Progress, steps: int) -> None:
        if progress.step == at:
            raise KilledError

    out = tmp_path / "out"
    with pytest.raises(KilledError):
        pretrain(recipe, out, upstream_data, killer)
    seen: list[int] = []
    pretrain(recipe, out, upstream_data, lambda progress, _: seen.append(progress.step), resume=True)
    assert seen[0] == (at - 1) // 2 * 2 + 1, "from the last checkpoint, or from the start where there is none"
    assert final(out) == final(trained)


def test_a_finished_training_can_be_gone_on_with(trained: Path, recipe: PretrainConfig, upstream_data: Path) -> None:
    before = final(trained)
    steps: list[Progress] = []
    pretrain(recipe, trained, upstream_data, lambda progress, _: steps.append(progress), resume=True)
    assert not steps
    assert final(trained) == before


def test_directories_belong_to_one_recipe(
    trained: Path, recipe: PretrainConfig, upstream_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="holds a training already; go on with --resume"):
        pretrain(recipe, trained, upstream_data, silent)
    other = recipe.model_copy(update={"seed": 7})
    with pytest.raises(ResumeMismatch, match="another recipe"):
        pretrain(other, trained, upstream_data, silent, resume=True)
    with pytest.raises(UsageError, match="there is no training to go on with"):
        pretrain(recipe, tmp_path / "nothing", upstream_data, silent, resume=True)
    unknown = recipe.model_copy(update={"weights": {"tiny-par": 2}})
    with pytest.raises(UsageError, match="weights: 'tiny-par' is not among the tasks"):
        pretrain(unknown, tmp_path / "new", upstream_data, silent)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["torn", "empty", "renamed"])
def test_a_damaged_checkpoint(
    damage: str, trained: Path, recipe: PretrainConfig, upstream_data: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "recipe.json").write_bytes((trained / "recipe.json").read_bytes())
    file = tmp_path / "checkpoint.safetensors"
    content = (trained / "checkpoint.safetensors").read_bytes()
    if damage == "renamed":
        tensors = load_file(trained / "checkpoint.safetensors")
        tensors["rooter"] = tensors.pop("router")
        save_file(tensors, file, metadata={"step": "4"})
    else:
        file.write_bytes(content[: 300 if damage == "torn" else 0])
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors: damaged"):
        pretrain(recipe, tmp_path, upstream_data, silent, resume=True)


def test_a_loss_that_is_not_finite_stops_it(recipe: PretrainConfig, upstream_data: Path, tmp_path: Path) -> None:
    wild = recipe.model_copy(update={"head_rate": 1e30, "projection_rate": 1e30, "module_rate": 1e30, "warmup": 0.0})
    with pytest.raises(UsageError, match="begin again with lower learning rates"):
        pretrain(wild, tmp_path / "out", upstream_data, silent)


def test_shallow_prompts_and_bfloat16(recipe: PretrainConfig, upstream_data: Path, tmp_path: Path) -> None:
    shallow = recipe.model_copy(update={"kind": "mp2-shallow", "steps": 2, "dtype": "bfloat16", "normalized": False})
    pretrain(shallow, tmp_path / "out", upstream_data, silent)
    prompt = ModularPrompt.load(tmp_path / "out" / "artifact")
    assert (prompt.config.layers, prompt.config.mixing) == (1, "mean")
    LocalOracle(load_backbone(recipe.backbone), prompt)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_takes_the_precision_that_is_fast_and_writes_it_down(
    fast: bool, recipe: PretrainConfig, upstream_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    auto = recipe.model_copy(update={"steps": 1, "dtype": "auto"})
    pretrain(auto, tmp_path / "out", upstream_data, silent)
    precision = "bfloat16" if fast else "float32"
    assert json.loads((tmp_path / "out" / "recipe.json").read_text(encoding="utf-8"))["dtype"] == precision
    assert ModularPrompt.load(tmp_path / "out" / "artifact").config.training["recipe"]["dtype"] == precision


def test_gradients_reach_every_parameter(recipe: PretrainConfig, make_mixture: Callable[..., Mixture]) -> None:
    backbone = load_backbone(recipe.backbone)
    encoder = Encoder(backbone.model)
    frame = frame_for(backbone.tokenizer, (300, 301), recipe.max_tokens)
    prompts = ModularPrompts(3, 3, 3, 4, frame, 32, 0.05, torch.Generator().manual_seed(0))
    batch = make_mixture(tasks_per_step=3).batch(0)
    each, _ = span_loss(prompts(encoder, batch, Phase(noise=True), torch.Generator().manual_seed(1)), batch)
    each.mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in prompts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert (prompts.router.grad.abs().sum((1, 2)) > 0).all()  # type: ignore[union-attr]
