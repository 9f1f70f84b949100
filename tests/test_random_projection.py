"""Random subspaces: sizes and scale by the published formulas, and whole runs that carry their prompt with them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_prompt
import torch
import yaml
from pydantic import ValidationError
from safetensors.numpy import load_file

from bbprompt.backends.backbone import Backbone, load_backbone
from bbprompt.backends.scale import measure
from bbprompt.config import TuneConfig, load_method, located
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.predict import load_prompt
from bbprompt.prompts import ModularPrompt
from bbprompt.random_projection import (
    BackboneFacts,
    clipped_std,
    entry_std,
    placeholders_for,
    random_prompt,
)
from bbprompt.result import Result
from bbprompt.run import prepare, reopen, tune
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.store.rundir import RunDirectory
from bbprompt.tasks.example import Form, Part
from bbprompt.texts.mrc import NO_TOKEN

FACTS = BackboneFacts("model", "d" * 64, 32, 5000, 3, (0.04, 0.8, 1.2))


def settings(**changes: Any) -> ProjectionConfig:
    return ProjectionConfig.model_validate({"dim": 200, "prompt_length": 5, "layers": "all"} | changes)


# ---------------------------------------------------------------------------------- formulas


def test_the_std_of_an_entry() -> None:
    # BBT: s = alpha * std / (sqrt(d) * sigma)
    assert entry_std(0.04, 500) == pytest.approx(0.04 / math.sqrt(500))
    assert entry_std(0.8, 400, alpha=0.5, sigma=0.2) == pytest.approx(0.5 * 0.8 / (20 * 0.2))


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 1.0), (0.5, 0.2)])
def test_a_step_of_sigma_is_alpha_deviations_of_the_states(alpha: float, sigma: float) -> None:
    prompt = random_prompt(settings(alpha=alpha, sigma=sigma), FACTS, 3)
    assert prompt.projection.shape == (3, 200, 5 * 32)
    for layer, std in enumerate(FACTS.stds):
        assert prompt.projection[layer].std() == pytest.approx(entry_std(std, 200, alpha, sigma), rel=0.02)
        assert abs(prompt.projection[layer].mean()) < 0.02 * prompt.projection[layer].std()
    points = np.random.default_rng(0).normal(0.0, sigma, (40, 3, 200))
    sizes = prompt.prompts(points).std(axis=(0, 2, 3))
    np.testing.assert_allclose(sizes, alpha * np.array(FACTS.stds), rtol=0.05)


def test_uniform_entries() -> None:
    prompt = random_prompt(settings(distribution="uniform", layers="input"), FACTS, 3)
    assert prompt.projection.shape == (1, 200, 160)
    assert np.abs(prompt.projection).max() <= 1 / math.sqrt(200)
    assert prompt.projection.std() == pytest.approx(1 / math.sqrt(3 * 200), rel=0.02)


def test_clipping_takes_outliers_out() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.5, 2.0, 20_000)
    spoiled = np.concatenate([values, np.full(20, 500.0)])
    assert spoiled.std() > 10
    assert clipped_std(spoiled) < 0.5 * spoiled.std()
    expected = spoiled
    for _ in range(5):
        mean, std = expected.mean(), expected.std()
        expected = np.minimum(np.maximum(expected, mean - 3 * std), mean + 3 * std)
    assert clipped_std(spoiled) == expected.std()


def test_the_untuned_prompt_is_zero_and_the_seed_decides() -> None:
    prompt = random_prompt(settings(), FACTS, 3)
    assert not prompt.prompts(prompt.space.even()).any()
    assert prompt.digest == random_prompt(settings(), FACTS, 3).digest
    other = random_prompt(settings(), FACTS, 4)
    assert not np.array_equal(prompt.projection, other.projection)
    assert not np.array_equal(prompt.projection[0] / FACTS.stds[0], prompt.projection[1] / FACTS.stds[1])


def test_placeholders() -> None:
    assert placeholders_for(21_128, 50) == tuple(range(1000, 1050))
    assert placeholders_for(1020, 50) == tuple(range(970, 1020))
    with pytest.raises(ArtifactError, match="40 tokens"):
        placeholders_for(40, 50)


def test_the_states_are_measured_as_the_stock_model_has_them(tiny_bert_dir: Path) -> None:
    backbone = load_backbone(str(tiny_bert_dir))
    forms = [Form((Part("今天天气", cut=True),), ("好", "坏"), -1)]
    facts = measure(backbone, forms, 4)
    words = backbone.model.get_input_embeddings().weight
    assert facts.stds[0] == pytest.approx(float(words.std(correction=0)), rel=1e-6)
    (frame_start, *_, frame_end) = backbone.tokenizer("今")["input_ids"]
    text = backbone.tokenizer("今天天气好，坏，", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[frame_start, *placeholders_for(facts.vocabulary, 4), *text, frame_end]])
    with torch.inference_mode():
        states = backbone.model(ids, output_hidden_states=True).hidden_states
    assert len(facts.stds) == 3
    for layer in (1, 2):
        assert facts.stds[layer] == pytest.approx(clipped_std(states[layer].numpy()), rel=1e-4)


def test_a_prepended_prompt_has_no_tokens() -> None:
    prompt = random_prompt(settings(layers="input", injection="prepend"), FACTS, 3)
    assert (prompt.config.injection, prompt.config.placeholders) == ("prepend", (NO_TOKEN,) * 5)
    added = random_prompt(settings(layers="input"), FACTS, 3)
    assert (added.config.injection, added.config.placeholders) == ("add", tuple(range(1000, 1005)))
    assert np.array_equal(prompt.projection, added.projection)
    assert prompt.digest != added.digest
    assert added.config.training["projection"]["injection"] == "add"
    assert prompt.config.training["projection"]["injection"] == "prepend"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "all"}, "at the input layer alone; set layers=input"),
        ({"start": "x"}, "takes no start, for the prompts there are were trained to be added"),
        ({"placeholder": 7}, "leave out placeholder and repeat"),
        ({"repeat": True}, "leave out placeholder and repeat"),
        ({"injection": "cat"}, "'add' or 'prepend'"),
    ],
)
def test_what_rows_before_the_text_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**({"layers": "input", "injection": "prepend"} | changes))


# ---------------------------------------------------------------------------------- around a trained prompt


def facts_for(start: ModularPrompt) -> BackboneFacts:
    return BackboneFacts("model", start.config.backbone_digest, 32, 5000, 3, (0.04, 0.8, 1.2))


@pytest.mark.parametrize("kind", ["mp2-deep", "mp2-shallow", "spot", "ppt"])
def test_around_a_trained_prompt(kind: str, tiny_bert_dir: Path, backbone: Backbone, tmp_path: Path) -> None:
    layers = 3 if kind in ("mp2-deep", "ppt") else 1  # SPoT's prompt stands at the input
    start = tiny_prompt.artifact(tiny_bert_dir, backbone.digest, kind=kind, layers=layers)
    if kind in ("spot", "ppt"):
        config = start.config.model_copy(update={"modules": 1, "tasks": ()})
        start = replace(start, config=config, modules=start.modules[:, :1], routers=start.routers[:0, :, :1])
    chosen = settings(start="x", prompt_length=2)
    prompt = random_prompt(chosen, facts_for(start), 3, start=start)
    untuned = start.prompts(start.space.even())
    begin = prompt.space.even()
    assert np.array_equal(prompt.prompts(begin)[: len(untuned)], untuned)
    assert not prompt.prompts(begin)[len(untuned) :].any()
    assert prompt.config.placeholders == start.config.placeholders
    assert np.array_equal(prompt.head_weight, start.head_weight)
    # The random rows are those of the same seed without it: p = z A + p0.
    alone = random_prompt(chosen, facts_for(start), 3)
    offset = np.random.default_rng(1).normal(size=alone.space.shape)
    begin[:, : prompt.config.intrinsic_dim - 1] += offset
    expected = alone.prompts(offset)
    expected[: len(untuned)] += untuned
    np.testing.assert_allclose(prompt.prompts(begin), expected, atol=1e-5)
    prompt.save(tmp_path, half=False)
    assert ModularPrompt.load(tmp_path).digest == prompt.digest
    assert ModularPrompt.load(tmp_path).space.fixed == 1
    alone.save(tmp_path)
    assert '"fixed"' not in (tmp_path / "config.json").read_text(encoding="utf-8")  # so digests of others stay


def test_a_start_that_does_not_fit_is_refused(tiny_prompts: Path) -> None:
    start = ModularPrompt.load(tiny_prompts)
    for changes, message in (
        ({"layers": "input", "prompt_length": 2}, "prompts 3 layers; set projection.layers=all"),
        ({"prompt_length": 3}, "has 2 positions"),
        ({"readout": "verbalizer", "prompt_length": 2}, "trained for the readout 'span'"),
    ):
        with pytest.raises(ArtifactError, match=message):
            random_prompt(settings(start="x", **changes), facts_for(start), 3, start=start)
    rows = random_prompt(settings(layers="input", injection="prepend"), facts_for(start), 3)
    with pytest.raises(ArtifactError, match="has the injection 'prepend', not 'add'"):
        random_prompt(settings(start="x", layers="input"), facts_for(start), 3, start=rows)
    with pytest.raises(ArtifactError, match=r"projection\.start: 'x' was trained for"):
        random_prompt(settings(start="x"), FACTS, 3, start=start)


# ---------------------------------------------------------------------------------- runs


def method_file(folder: Path, head: Path | None, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "name": "tiny-bbtv2",
        "summary": "random",
        "source": "test",
        "prompts": "none",
        "loss": "hinge",
        "projection": {"dim": 6, "prompt_length": 3, "layers": "all"},
        "prompt": {"layout": "layerwise", "popsize": 4, "sigma_first": 1.0, "sigma": 1.0},
        "refine": {"step": 0.2},
        "select": "dev-loss",
    }
    if head is not None:
        content["projection"]["head"] = str(head)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


def config(data: Path, method: Path, **changes: Any) -> TuneConfig:
    values = {"task": str(data / "task.yaml"), "data": str(data), "method": str(method), "budget": 60, "threads": 1}
    return TuneConfig.model_validate(values | changes)


def begin(run: TuneConfig, folder: Path) -> Result:
    prepared = prepare(run)
    with RunDirectory.create(folder, prepared.manifest()) as directory:
        return tune(prepared, directory)


def test_a_run_keeps_its_prompt(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    run = config(tiny_pair_data, method_file(tmp_path, tiny_prompts))
    result = begin(run, tmp_path / "run")
    assert [stage.optimizer for stage in result.stages] == ["cmaes", "cobyla"]
    assert result.calls.train + result.calls.dev <= 60
    assert result.prompts == "none"
    tensors = load_file(tmp_path / "run" / "prompt.safetensors")
    assert tensors["prompt"].shape == (3, 3, 32)
    assert tensors["point"].shape == (3, 6)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["method"]["projection"].keys() == ProjectionConfig.model_fields.keys()
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value
    assert begin(run, tmp_path / "again").digest == result.digest
    assert begin(config(tiny_pair_data, Path(run.method), seed=5), tmp_path / "other").digest != result.digest
    directory, known = reopen(tmp_path / "again", writable=True)
    (tmp_path / "again" / "result.json").unlink()
    with directory:
        assert tune(prepare(known), directory).digest == result.digest


def test_states_are_measured_with_the_threads_of_the_manifest(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    def measured(*more: Any, threads: int, **settings: Any) -> BackboneFacts:
        given.append(threads)
        raise UsageError("enough")

    monkeypatch.setattr("bbprompt.run.measure_backbone", measured)
    with pytest.raises(UsageError, match="enough"):
        prepare(config(tiny_pair_data, method_file(tmp_path, tiny_prompts), threads=None, ray="local"))
    assert given == [1]


def test_the_head_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    changed = located(TuneConfig(task="lcqmc", set={"projection.head": "mine", "select": "dev-loss"}))
    assert changed.set == {"projection.head": str(tmp_path / "mine"), "select": "dev-loss"}
    block = {
        "projection": {"head": "mine", "dim": 5},
        "gradient": {"soft": {"head": "mine"}},
        "router": {"head": "mine"},
    }
    changed = located(TuneConfig(task="lcqmc", set=block))
    assert changed.set == {
        "projection": {"head": str(tmp_path / "mine"), "dim": 5},
        "gradient": {"soft": {"head": str(tmp_path / "mine")}},
        "router": {"head": "mine"},
    }


def test_what_does_not_fit_is_refused(
    tiny_pair_data: Path, tiny_extract_data: Path, tiny_prompts: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"projection\.head"):
        prepare(config(tiny_pair_data, method_file(tmp_path, None)))
    path = method_file(tmp_path, tiny_prompts)
    with pytest.raises(UsageError, match="--prompts none"):
        prepare(config(tiny_pair_data, path, prompts=str(tiny_prompts)))
    with pytest.raises(UsageError, match="needs a prompt artifact"):
        prepare(config(tiny_pair_data, Path("mp2-deep"), prompts="none"))
    with pytest.raises(UsageError, match="loss=hinge"):
        prepare(config(tiny_extract_data, path))
    with pytest.raises(UsageError, match="only 'local'"):
        prepare(config(tiny_pair_data, path, backend="http://nowhere"))
    with pytest.raises(ArtifactError, match="was trained for"):
        random_prompt(settings(head="x"), FACTS, 1, ModularPrompt.load(tiny_prompts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "e5-small-mp2-deep"}, "'none'"),
        ({"projection": None}, "'none'"),
        ({"router": {"calls": 8}}, "no modules"),
        ({"baseline": {"rule": "logistic"}}, "searches nothing"),
        ({"router": {"calls": 8, "optimizer": "listing", "warm_start": False}}, "warm start"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_method(str(method_file(tmp_path, None, **changes)))
