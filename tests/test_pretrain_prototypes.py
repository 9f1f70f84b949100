"""Pre-training under the prototype readout: the same scores as the tuning side gives, learning, resume, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_prompt
import tinytrain
import torch
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.encoder import Encoder
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.prototype_head import PrototypeHead
from bbprompt.backends.tokens import frame_for, tokenize_with
from bbprompt.errors import UsageError
from bbprompt.pretrain.checkpoint import load_checkpoint
from bbprompt.pretrain.mixture import Mixture
from bbprompt.pretrain.model import ModularPrompts, Phase
from bbprompt.pretrain.mp2 import Progress
from bbprompt.pretrain.prototypes import PrototypeMixture, collate_prototypes, prototype_loss
from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.run import pretrain
from bbprompt.pretrain.upstream import load_upstream, upstream_tasks
from bbprompt.prompts import ModularPrompt
from bbprompt.readout import Readout
from bbprompt.router import CODE
from bbprompt.scoring import labelled
from bbprompt.tasks.example import Example, Form, Part
from bbprompt.tasks.task import Task

pytestmark = pytest.mark.usefixtures("token_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tasks; pairs say the same or not."""
    root = tinytrain.data_root(tmp_path_factory.mktemp("prototypes"))
    file = root / "tiny-pair" / "task.yaml"
    file.write_text(yaml.safe_dump(tinytrain.PAIR | {"same": "1"}, allow_unicode=True), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def recipe(data: Path, tiny_bert_dir: Path) -> PretrainConfig:
    tasks = [str(data / name / "task.yaml") for name in ("tiny-pair", "tiny-choice")]
    return tinytrain.make_recipe(
        data, tiny_bert_dir, readout="prototype", prefix="问：", scale=10.0, repeat_placeholder=True, tasks=tasks
    )


def silent(progress: Progress, steps: int) -> None:
    """Nothing is shown."""


@pytest.fixture(scope="module")
def mixture(recipe: PretrainConfig, data: Path) -> PrototypeMixture:
    backbone = load_backbone(recipe.backbone)
    frame = frame_for(backbone.tokenizer, recipe.placeholders, recipe.max_tokens)
    tokenize = tokenize_with(backbone.tokenizer)
    tasks = load_upstream(
        upstream_tasks(recipe.tasks),
        data,
        tokenize=tokenize,
        frame=frame,
        option_limit=recipe.option_limit,
        option_characters=recipe.option_characters,
        spare_seeds=recipe.spare_seeds,
        cap=recipe.train_cap,
        valid=recipe.valid_size,
        seed=recipe.seed,
    )
    drawn = Mixture(
        tasks,
        tokenize,
        frame,
        seed=recipe.seed,
        tasks_per_step=2,
        per_task=3,
        option_limit=recipe.option_limit,
        option_characters=recipe.option_characters,
        shuffle_options=True,
    )
    head = PrototypeHead(1.0, recipe.prefix, False, 0.0, tokenize, frame, torch.device("cpu"))
    return PrototypeMixture(drawn, head)


def test_a_batch_has_each_text_once_and_the_right_option(mixture: PrototypeMixture) -> None:
    batch = mixture.batch(3)
    assert len(batch.gold) == len(batch.tasks) == len(batch.uids) == 6
    pairs = {(task, item.ids) for task, item in zip(batch.members.tolist(), batch.sequences, strict=True)}
    assert len(pairs) == len(batch.sequences), "a sequence stands twice"
    assert set(batch.right[batch.present].tolist()) | set(batch.left[batch.present].tolist()) == set(
        range(len(batch.sequences))
    )
    assert batch.rows_read == sum(len(ids) for ids in batch.ids)
    for row in range(6):
        grades = batch.grades[row, batch.present[row]]
        if batch.compared[row]:
            # "1" is the same; for two different labels one similarity and its opposite.
            assert grades.tolist() == [-1.0, 1.0]
            assert len(set(batch.right[row, batch.present[row]].tolist())) == 1
        else:
            assert (grades == 1).all()
        assert batch.members[batch.left[row, 0]] == batch.tasks[row]
    assert [item.ids for item in mixture.batch(3).sequences] == [item.ids for item in batch.sequences]


@pytest.fixture(scope="module")
def trained(recipe: PretrainConfig, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prototypes") / "out"
    pretrain(recipe.model_copy(update={"head_rate": 0.02}), out, data, silent)
    return out


def test_the_tuning_side_scores_as_the_training_did(trained: Path, recipe: PretrainConfig, data: Path) -> None:
    prompt = ModularPrompt.load(trained / "artifact")
    assert prompt.config.readout == "prototype"
    assert prompt.config.pooling is not None
    assert prompt.config.pooling.prefix == "问："
    assert prompt.config.pooling.scale != 10.0, "the scale is learned"
    assert prompt.config.pooling.threshold != 0.88, "the threshold is learned"
    assert prompt.config.placeholders == (300, 300)
    card = (trained / "artifact" / "README.md").read_text(encoding="utf-8")
    assert "scale and threshold" in card
    assert "span head" not in card
    oracle = LocalOracle(load_backbone(recipe.backbone), prompt, max_tokens=recipe.max_tokens)
    points = prompt.space.mix(prompt.space.routers, CODE)
    for index, task in enumerate(upstream_tasks(recipe.tasks)):
        make = tiny_prompt.choice_records if task.type == "choice" else tiny_prompt.pair_records
        examples = [task.example(record) for record in make(12, 5)]
        some = labelled(task, examples, for_loss=True, readout="prototype")
        scores = oracle.score(some.batch, points[index : index + 1])
        offsets = load_checkpoint(trained / "checkpoint.safetensors", torch.device("cpu"))[0]["offsets"]
        own = tuple(offsets[index].tolist()) if task.same else ()
        given = Readout(offsets=own).losses(scores, some.batch, some.gold)[0]
        expected = _training_losses(trained, recipe, index, examples)
        np.testing.assert_allclose(given, expected, atol=5e-3)  # artifacts are stored in float16


def _training_losses(trained: Path, recipe: PretrainConfig, index: int, examples: list[Example]) -> NDArray[np.float32]:
    """The losses that the training gives whole examples under the checkpoint's own weights."""
    backbone = load_backbone(recipe.backbone)
    frame = frame_for(backbone.tokenizer, recipe.placeholders, recipe.max_tokens)
    encoder = Encoder(backbone.model, torch.float32, "cpu", backbone.token_type, prepack=False)
    prompts = ModularPrompts(
        2, 3, 3, 4, frame, encoder.hidden, 0.05, torch.Generator().manual_seed(0), True, recipe.scale, 2
    )
    tensors, _ = load_checkpoint(trained / "checkpoint.safetensors", encoder.device)
    with torch.no_grad():
        for name, parameter in prompts.named_parameters():
            parameter.copy_(tensors[name])
    head = PrototypeHead(1.0, recipe.prefix, False, 0.0, tokenize_with(backbone.tokenizer), frame, torch.device("cpu"))
    task = upstream_tasks(recipe.tasks)[index]
    batch = collate_prototypes([(task, index, example) for example in examples], head)
    with torch.no_grad():
        each, _ = prototype_loss(prompts, encoder, head, batch, Phase(noise=False), torch.Generator())
    losses: NDArray[np.float32] = each.numpy()
    return losses


def test_the_model_learns(recipe: PretrainConfig, data: Path, tmp_path: Path) -> None:
    quick = {"prompt_scale": 1.0, "head_rate": 0.02, "module_rate": 0.1, "projection_rate": 0.05, "noise_from": 1.0}
    one = {"steps": 60, "tasks": recipe.tasks[1:], "tasks_per_step": 1, "per_task": 8, "train_cap": 8}
    losses: list[float] = []
    pretrain(
        recipe.model_copy(update=one | quick), tmp_path / "out", data, lambda progress, _: losses.append(progress.loss)
    )
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


class StoppedError(Exception):
    """The end of the process."""


def stopper(progress: Progress, steps: int) -> None:
    if progress.step == 5:
        raise StoppedError


def test_without_pairs_there_are_no_offsets_to_go_on_with(recipe: PretrainConfig, data: Path, tmp_path: Path) -> None:
    choices = recipe.model_copy(update={"tasks": recipe.tasks[1:], "tasks_per_step": 1})
    with pytest.raises(StoppedError):
        pretrain(choices, tmp_path / "out", data, stopper)
    assert set(pretrain(choices, tmp_path / "out", data, silent, resume=True)) == {"tiny-choice"}


def test_stopped_and_resumed_it_ends_the_same(
    trained: Path, recipe: PretrainConfig, data: Path, tmp_path: Path
) -> None:
    again = recipe.model_copy(update={"head_rate": 0.02})
    with pytest.raises(StoppedError):
        pretrain(again, tmp_path / "out", data, stopper)
    pretrain(again, tmp_path / "out", data, silent, resume=True)
    for name in ("checkpoint.safetensors", "artifact/model.safetensors", "artifact/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes(), name


def test_extraction_has_no_prototypes(recipe: PretrainConfig, data: Path, tmp_path: Path) -> None:
    tasks = [*recipe.tasks, str(data / "tiny-extract" / "task.yaml")]
    with pytest.raises(UsageError, match="'tiny-extract' has no options for prototypes"):
        pretrain(recipe.model_copy(update={"tasks": tasks}), tmp_path / "out", data, silent)
    with pytest.raises(ValidationError, match="readout: 'prototype' is not for kind ppt"):
        PretrainConfig.model_validate(recipe.model_dump() | {"kind": "ppt", "modules": 1})


def test_the_options_of_a_task_serve_all_its_examples(mixture: PrototypeMixture) -> None:
    words = [f"词{n}" for n in range(9)]
    task = Task.model_validate(tiny_prompt.SINGLE | {"labels": {f"l{n}": word for n, word in enumerate(words)}})
    kept = [(0, 4), (4, 7), (7, 8)]
    examples = [
        Example({"text": f"文{n}"}, tuple(words[i] for i in pair), n % 2, (), f"{n:016x}")
        for n, pair in enumerate(kept)
    ]
    head = mixture.head
    batch = collate_prototypes([(task, 0, example) for example in examples], head)
    options = [batch.sequences[row].ids for row in batch.right[0].tolist()]
    assert options == [head.write(Form((Part(f"词{n}。", cut=True),), (), -1)).ids for n in (0, 4, 7, 8)]
    assert batch.present.all()
    assert (batch.right == batch.right[0]).all()
    assert batch.gold.tolist() == [0, 2, 2], "each keeps its answer"


def test_graded_pairs_train_with_all_their_labels(mixture: PrototypeMixture) -> None:
    graded = {"labels": {"0": "无关", "1": "相近", "2": "相同"}, "same": "2"}
    task = Task.model_validate(tiny_prompt.PAIR | graded)
    example = task.example({"text_a": "甲乙", "text_b": "甲丙", "label": "1"})
    batch = collate_prototypes([(task, 0, example)], mixture.head)
    assert batch.grades.tolist() == [[-1.0, 0.0, 1.0]]
    assert len(batch.sequences) == 2
    assert batch.gold.tolist() == [1]


def test_the_untrained_prompts_are_validated_too(trained: Path, recipe: PretrainConfig) -> None:
    first = json.loads((trained / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["step"] == 0
    training = ModularPrompt.load(trained / "artifact").config.training
    assert training["untrained"] == first["valid"]
    assert set(first["valid"]) == {task.name for task in upstream_tasks(recipe.tasks)}
    card = (trained / "artifact" / "README.md").read_text(encoding="utf-8")
    name, score = next(iter(first["valid"].items()))
    assert f"| {name} | {score:.3f} | {training['validation'][name]:.3f} |" in card


def test_thinned_examples_keep_their_answer(mixture: PrototypeMixture, recipe: PretrainConfig) -> None:
    for batch in mixture.valid(1, 8, 3):
        assert batch.present[torch.arange(len(batch.gold)), batch.gold].all()
        assert (batch.present.sum(1) <= recipe.option_limit).all()
