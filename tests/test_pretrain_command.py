"""`bbprompt pretrain mp2` up to the training itself, and the recipes that come with the package."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bbprompt import cli
from bbprompt.commands import pretrain as command
from bbprompt.config import load_method, method_with
from bbprompt.errors import DiskError
from bbprompt.pretrain import run
from bbprompt.pretrain.directory import claimed
from bbprompt.pretrain.lm_recipe import HeadConfig
from bbprompt.pretrain.mp2 import Progress
from bbprompt.pretrain.recipe import PptSettings, PretrainConfig
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.store.disk import RealDisk
from bbprompt.sweep.experiment import experiment_from
from bbprompt.tasks.task import load_task
from bbprompt.texts.ppt import format_of, language_of

Calls = list[tuple[PretrainConfig, Path, Path | None, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the training was called with; it pretends to have done three steps."""
    made: Calls = []

    def pretrain(
        config: PretrainConfig,
        out: Path,
        data: Path | None,
        report: Callable[[Progress, int], None],
        **settings: Any,
    ) -> dict[str, float]:
        made.append((config, out, data, settings))
        for step in (1, 2, 3):
            report(Progress(step, 1.25, 0.5, 1000.0, 120.0, 16.0, 0.25), config.steps)
        return {"one": 0.5, "two": 0.75}

    monkeypatch.setattr(run, "pretrain", pretrain)
    return made


@pytest.mark.parametrize("name", command._names())
def test_bundled_recipes_spell_out_every_setting(name: str) -> None:
    file = command._RECIPES / f"{name}.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    if name == "lm-head":
        assert set(values) == set(HeadConfig.model_fields)
        assert command._recipe(name, Path()).kind == "lm-head"
        return
    assert set(values) == set(PretrainConfig.model_fields)
    assert set(values["ppt"] or PptSettings.model_fields) == set(PptSettings.model_fields)
    kinds = {
        "mp2-proto": "mp2-deep",
        "mp2-deep": "mp2-deep",
        "mp2-shallow": "mp2-shallow",
        "spot": "spot",
        "ppt": "ppt",
    }
    recipe = command._recipe(name, Path())
    assert recipe.kind == next(kind for begin, kind in kinds.items() if name.startswith(begin))
    assert isinstance(recipe, PretrainConfig)
    assert set(range(10, 60, 10)) <= set(recipe.spare_seeds), "the seeds of the papers are spared"


@pytest.mark.parametrize(
    ("artifact", "last_phase"),
    [
        ("mp2-deep", "mp2-deep-pairs"),
        ("mp2-shallow", "mp2-shallow-more"),
        ("mp2-proto", "mp2-proto-more"),
        ("spot", "spot"),
        ("ppt", "ppt-more"),
    ],
)
def test_the_bundled_prompts_come_from_the_bundled_recipes(artifact: str, last_phase: str) -> None:
    made = ModularPrompt.load(resolve_prompts(f"e5-small-{artifact}")).config.training["recipe"]
    recipe = command._recipe(last_phase, Path()).model_dump(mode="json")
    # Threads, notes and where a phase began are a training's own; the deep prompts' steps are those of both phases; the
    # processor multiplied bfloat16, which is what auto takes then, and it was no GPU, where auto compiles.
    first = [command._recipe(artifact, Path()).steps] if artifact == "mp2-deep" else []
    assert (recipe["dtype"], made["dtype"]) == ("auto", "bfloat16")
    assert (recipe["compile"], made.get("compile", False)) == ("auto", False)
    own = {"threads", "note", "start", "steps", "dtype", "compile"}
    assert {key: value for key, value in made.items() if key not in own} == {
        key: recipe[key] for key in made.keys() - own
    }
    assert made["steps"] == sum([*first, recipe["steps"]])


@pytest.mark.parametrize("name", ["mp2-deep", "mp2-shallow"])
def test_the_ablation_differs_in_fast_and_slow_learning_alone(name: str) -> None:
    with_it, without = (command._recipe(each, Path()).model_dump() for each in (name, f"{name}-no-fsl"))
    assert (with_it["fsl"], without["fsl"]) == (True, False)
    assert with_it == without | {"fsl": True}


@pytest.mark.parametrize("name", ["fsl", "fsl-shallow"])
def test_the_commands_of_the_ablation_make_its_prompts(
    name: str, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (command._RECIPES.parent / "experiments" / f"{name}.yaml").read_text(encoding="utf-8")
    *trainings, sweep = re.findall(r"^#   bbprompt (.*)$", text, re.MULTILINE)
    assert sweep.startswith(f"sweep --config {name} --out ")
    for line in trainings:
        assert cli.run([*line.split(), "--quiet", "--device", "cpu"]) == 0
    experiment = experiment_from(name, {}, {})
    assert [str(out / "artifact") for _, out, _, _ in calls] == [
        each["prompts"] for each in experiment.variants.values()
    ]
    assert [config.fsl for config, *_ in calls] == [True, False]
    assert {config.kind for config, *_ in calls} == set(experiment.methods)


def test_a_bundled_recipe_by_name(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["pretrain", "mp2", "--config", "mp2-shallow", "--device", "cpu", "--data", "somewhere"]) == 0
    ((config, out, data, settings),) = calls
    assert (config.kind, out, data) == ("mp2-shallow", Path("runs/pretrain-mp2-shallow"), Path("somewhere"))
    assert settings == {"resume": False, "device": "cpu"}
    out_text, err = capsys.readouterr()
    assert "mean                     0.625" in out_text
    tune = "bbprompt tune --task lcqmc --method mp2-shallow --prompts runs/pretrain-mp2-shallow/artifact"
    assert out_text.endswith(f"Next: {tune}\n")
    speed = "16.0 examples/s, 1000 tokens/s (25% of GEMM)"
    assert f"pretrain: 1/2000 steps, loss 1.250, accuracy 0.50, {speed}, 2 min left" in err


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("formats", [["choice"], ["pair"], ["single"], ["pair", "choice"]])
def test_what_follows_writes_texts_as_the_prompts_were_trained(formats: list[Any], language: Any, hybrid: bool) -> None:
    ppt = PptSettings(
        corpus=["a.txt"],
        formats=formats,
        language=language,
        hybrid=hybrid,
        annotator="run" if "single" in formats else None,
    )
    recipe = command._recipe("ppt", Path())
    assert isinstance(recipe, PretrainConfig)
    words = command._following(recipe.model_copy(update={"readout": "verbalizer", "ppt": ppt}))
    options = dict(zip(words[::2], words[1::2], strict=True))
    method = load_method(options["--method"])
    if "--set" in options:
        method = method_with(method, {options["--set"].split("=")[0]: options["--set"].split("=")[1]})
    assert method.gradient is not None
    assert method.gradient.start == "ppt"
    assert method.gradient.form == ("hybrid" if hybrid else "unified" if "choice" in formats else "plain")
    if (formats, language, hybrid) == (["choice"], "en", True):
        assert options["--task"] == "YOUR_TASK.yaml", "no bundled task is an English choice"
        return
    task = load_task(options["--task"])
    assert format_of(task, method.gradient.form) in formats
    assert language_of(task) == language


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("mp2-proto", {}, "--method mp2-proto"),
        ("mp2-proto", {"kind": "mp2-shallow"}, "--method mp2-proto"),
        ("spot", {"readout": "prototype"}, "--method mp2-proto --set router=null"),
        ("mp2-deep", {}, ""),
        ("mp2-shallow", {}, "--method mp2-shallow"),
        ("spot", {}, "--method mp2-shallow --set router=null"),
        ("ppt", {}, "--method mp2-deep --set router=null"),
    ],
)
def test_what_follows_reads_the_prompts_as_they_were_trained(recipe: str, changes: dict[str, Any], words: str) -> None:
    trained = command._recipe(recipe, Path())
    assert isinstance(trained, PretrainConfig)
    found = command._following(trained.model_copy(update=changes))
    assert " ".join(found) == f"--task lcqmc {words}".strip()


def test_raw_text_has_no_directory_of_tasks(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["pretrain", "ppt", "--device", "cpu", "--data", "somewhere"]) == 2
    assert "No such option: --data" in capsys.readouterr().err
    assert not calls


def test_going_on_takes_the_recipe_of_the_directory(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = PretrainConfig(kind="mp2-deep", steps=7, clip=1e-05).model_dump(mode="json")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    assert cli.run(["pretrain", "mp2", "--resume", str(tmp_path), "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "artifact": str(tmp_path / "artifact"),
        "validation": {"one": 0.5, "two": 0.75},
        "mean": 0.625,
    }
    ((config, folder, _, settings),) = calls
    assert config.model_dump(mode="json") == recipe
    assert (folder, settings["resume"]) == (tmp_path, True)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with (
        pytest.raises(DiskError, match="make this folder"),
        claimed(RealDisk(), tmp_path / "file" / "out", PretrainConfig(kind="mp2-deep"), False),
    ):
        pass


def test_a_wrong_recipe(tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("kind: mp2-deep\nstepps: 3\n", encoding="utf-8")
    assert cli.run(["pretrain", "mp2", "--config", str(file)]) == 2
    assert "unknown key 'stepps'; did you mean 'steps'" in capsys.readouterr().err
    assert cli.run(["pretrain", "mp2", "--resume", str(tmp_path)]) == 2
    assert "no recipe.json" in capsys.readouterr().err
    assert not calls


def test_spot_has_a_recipe_of_its_own(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["pretrain", "spot", "--device", "cpu", "--quiet"]) == 0
    ((config, out, _, _),) = calls
    assert (config.kind, config.modules, config.tasks) == ("spot", 1, "upstream")
    assert not config.routed
    assert out == Path("runs/pretrain-spot")


def test_a_recipe_of_another_kind(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["pretrain", "mp2", "--config", "spot"]) == 2
    assert "this recipe is of kind spot; run `bbprompt pretrain spot`" in capsys.readouterr().err
    assert not calls


def test_the_corpus_of_the_bundled_recipe_is_yours_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bbprompt.pretrain.run.load_backbone", None)  # it does not come to that
    assert cli.run(["pretrain", "ppt", "--device", "cpu", "--quiet"]) == 2
    assert "ppt.corpus: zh_lctt.txt.gz: no such file" in capsys.readouterr().err
