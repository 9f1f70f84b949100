"""Settings: bundled methods, changes to them, and runs."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny_prompt
from depth import deep
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bbprompt import wire
from bbprompt.config import (
    MethodConfig,
    PromptStageConfig,
    RouterStageConfig,
    TuneConfig,
    load_method,
    method_names,
    method_with,
    parse_set,
)
from bbprompt.errors import UsageError
from bbprompt.router import CODE, PAPER, GateRule
from bbprompt.sweep.experiment import Experiment
from bbprompt.tasks.task import Task, load_task
from bbprompt.testing import ToyOracle
from bbprompt.yamlfile import read_yaml, validate


def test_the_bundled_methods() -> None:
    assert {"mp2-deep", "mp2-deep-code", "mp2-shallow", "mp2-shallow-code"} <= set(method_names())


@pytest.mark.parametrize("name", method_names())
def test_every_bundled_method_loads(name: str) -> None:
    method = load_method(name)
    assert method.name == name, "the name in the file is that of the file"
    assert method.summary
    assert method.source
    assert method_with(method, {}) == method
    assert MethodConfig.model_validate(method.model_dump(mode="json")) == method
    assert (0 if method.baseline else 2) <= method.least_budget <= 30


@pytest.mark.parametrize("added", ["", "-paper"])
def test_the_papers_settings(added: str) -> None:
    deep, shallow = load_method(f"mp2-deep{added}"), load_method(f"mp2-shallow{added}")
    assert deep.rule is shallow.rule is PAPER
    assert deep.router is not None
    assert shallow.router is not None
    assert deep.prompt is not None
    assert shallow.prompt is not None
    assert (deep.router.calls, shallow.router.calls) == (100, 200)
    assert deep.router.kappa == shallow.router.kappa == 2.0
    assert deep.prompt.popsize == shallow.prompt.popsize == 20
    assert (deep.prompt.layout, deep.prompt.sigma_first, deep.prompt.sigma) == ("layerwise", 0.05, 0.01)
    assert (shallow.prompt.layout, shallow.prompt.sigma_first) == ("joint", 0.1)


@pytest.mark.parametrize("name", ["mp2-deep", "mp2-shallow"])
def test_the_paper_and_what_is_added_to_it(name: str) -> None:
    added, paper = load_method(name).model_dump(), load_method(f"{name}-paper").model_dump()
    ours = {"router": {"warm_start"}, "prompt": {"patience"}}
    assert {key for key in added if added[key] != paper[key]} == {
        *("name", "summary", "calibrate", "select", "tempered", "margin"),
        *ours,
    }
    for stage, keys in ours.items():
        assert {key for key in added[stage] if added[stage][key] != paper[stage][key]} == keys


def test_the_released_settings() -> None:
    deep = load_method("mp2-deep-code")
    assert deep.rule is CODE
    assert deep.router is not None
    assert deep.prompt is not None
    assert (deep.router.space, deep.router.random, deep.router.batch) == ("continuous", 20, 1)
    assert (deep.prompt.sigma_first, deep.prompt.sigma, deep.prompt.bound) == (0.5, 0.1, 5.0)
    assert (deep.prompt.keep, deep.support, deep.legacy_decision, deep.select) == (
        "all-time",
        "sequence",
        True,
        "dev-metric",
    )


def test_the_released_settings_of_a_prompt_at_the_input() -> None:
    shallow = load_method("mp2-shallow-code")
    assert shallow.rule is CODE
    assert shallow.router is not None
    assert shallow.prompt is not None
    assert (shallow.router.space, shallow.router.calls, shallow.router.kappa) == ("continuous", 200, 2.0)
    assert (shallow.router.random, shallow.router.batch, shallow.router.dev_every) == (20, 1, 10)
    assert (shallow.prompt.layout, shallow.prompt.popsize, shallow.prompt.sigma_first) == ("joint", 20, 0.1)
    assert (shallow.support, shallow.legacy_decision, shallow.select) == ("sequence", True, "dev-metric")


def test_a_rule_of_ones_own() -> None:
    method = method_with(load_method("mp2-deep"), {"mixing": "normalized"})
    assert method.rule == GateRule("binary", "normalized")


def test_a_method_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nsummary: s\nsource: me\nprompts: p\ngates: sigmoid\nmixing: mean\n"
        "prompt: {layout: joint, sigma_first: 1e-2, sigma: 0.5}\n"
    )
    method = load_method(str(file))
    assert method.router is None
    assert method.prompt == PromptStageConfig(layout="joint", sigma_first=0.01, sigma=0.5)
    assert method.least_budget == 23
    file.write_text(file.read_text() + "colour: red\n")
    with pytest.raises(UsageError, match=r"mine\.yaml: unknown key 'colour'"):
        load_method(str(file))


def test_an_unknown_method() -> None:
    with pytest.raises(UsageError, match=r"there is no method 'mp2-dep'; did you mean 'mp2-deep'"):
        load_method("mp2-dep")
    with pytest.raises(UsageError, match=r"no such file"):
        load_method("nowhere/mine.yaml")


# ----------------------------------------------------------------------------------------------- --set


def test_set_changes_what_it_names() -> None:
    method = load_method("mp2-deep")
    changed = method_with(method, {"router.calls": 40, "prompt.sigma": 0.5, "select": "dev-loss", "prompt.bound": 2})
    assert changed.router == method.router.model_copy(update={"calls": 40})  # type: ignore[union-attr]
    assert changed.prompt == method.prompt.model_copy(update={"sigma": 0.5, "bound": 2.0})  # type: ignore[union-attr]
    assert changed.select == "dev-loss"
    assert load_method("mp2-deep") == method


def test_set_leaves_a_stage_out() -> None:
    method = method_with(load_method("mp2-deep"), {"router": None})
    assert method.router is None
    with pytest.raises(UsageError, match=r"--set router\.calls: the method mp2-deep has no such setting"):
        method_with(method, {"router.calls": 3})


@pytest.mark.parametrize("key", ["colour", "router.colour", "router.calls.more", "nothing.calls", "", ".", "router."])
def test_set_of_an_unknown_key(key: str) -> None:
    with pytest.raises(UsageError, match="has no such setting"):
        method_with(load_method("mp2-deep"), {key: 1})


BAD: list[tuple[str, Any]] = [
    ("router.calls", 0),
    ("router.calls", 2.5),
    ("router.calls", True),
    ("router.calls", 3),  # less than one batch
    ("router.kappa", -1.0),
    ("router.kappa", float("nan")),
    ("router.kappa", float("inf")),
    ("router.optimizer", "adam"),
    ("prompt.popsize", 1),
    ("prompt.sigma", 0.0),
    ("prompt.sigma", 1e-30),
    ("prompt.sigma", float("nan")),
    ("prompt.sigma_first", float("inf")),
    ("prompt.bound", -2),
    ("prompt.bound", 0.01),  # narrower than the first step
    ("prompt.layout", "deep"),
    ("gates", "tanh"),
    ("select", "test"),
    ("name", 3),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_set_of_a_wrong_value(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=key.split(".")[0]) as caught:
        method_with(load_method("mp2-deep"), {key: value})
    assert "\n" not in str(caught.value)


def test_parse_set() -> None:
    pairs = [
        "router.calls=40",
        "prompt.sigma=1e-2",
        "router=null",
        "select=dev-loss",
        "router.warm_start=false",
        "a=b=c",
        "calibration={folds: 4}",
    ]
    assert parse_set(pairs) == {
        "router.calls": 40,
        "prompt.sigma": "1e-2",
        "router": None,
        "select": "dev-loss",
        "router.warm_start": False,
        "a": "b=c",
        "calibration": {"folds": 4},
    }
    changed = method_with(load_method("mp2-deep"), parse_set(["prompt.sigma=1e-2"]))
    assert changed.prompt is not None
    assert changed.prompt.sigma == 0.01
    assert parse_set([]) == {}


@pytest.mark.parametrize(
    "pair",
    [
        "router.calls",
        "=3",
        "select='open",
        "router={calls: 3",
        "router={calls: 3, calls: 4, [1]: 2}",
        "x=@a",
        "x=" + "{" * 5000,
        "x=" + "1" * 5000,
        "x=2024-13-45",
    ],
    ids=lambda pair: pair[:20],
)
def test_parse_set_refuses(pair: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        parse_set([pair])


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: lcqmc\nbudge: 5\n", r"run\.yaml: unknown key 'budge'; did you mean 'budget'"),
        ("budget: 5\n", r"run\.yaml: the key 'task' is missing"),
        ("task: lcqmc\nbudget: many\n", r"run\.yaml: budget: "),
        ("task: lcqmc\nbudget: true\n", r"run\.yaml: budget: "),
        ("task: lcqmc\nseed: -1\n", r"run\.yaml: seed: "),
        ("task: lcqmc\nshots: 0\n", r"run\.yaml: shots: "),
        ("task: lcqmc\ndevice: tpu\n", r"run\.yaml: device: "),
        ("task: lcqmc\ndtype: float16\n", r"run\.yaml: dtype: "),
    ],
)
def test_a_wrong_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        validate(TuneConfig, read_yaml(file), str(file))


def test_a_wrong_flag() -> None:
    with pytest.raises(UsageError, match=r"command line: device: "):
        validate(TuneConfig, {"task": "lcqmc", "device": "tpu"}, "command line")


#: Names that lead elsewhere, or that some system takes for something else, where a path is built from them.
NAMES = [
    *(
        up + end
        for up in ("..", "../..", "..\\..", "....//", "%2e%2e", "%252e%252e", "%c0%ae", "..;")
        for end in ("", "/x")
    ),
    *(
        f"{root}{end}"
        for root in ("/", "//", "~/", "C:\\", "\\\\host\\", "file:///")
        for end in ("", "x", "etc/passwd")
    ),
    *(f"a{odd}b" for odd in "\0\r\n\t /\\:*?\"<>|;&$`'(){}[]!#%^=+,@~\u202e\u2024\u2215\uff0f\u200b\ufeff"),
    *(
        "",
        " ",
        ".",
        "..",
        "...",
        "-rf",
        "_",
        "CON",
        "NUL.txt",
        "A",
        "\uff10",
        "\u00e9",
        "a" * 65,
        "a" * 300,
        "\ud800",
        "a\n",
    ),
]


REQUEST = wire.request_for(ToyOracle().info, "0" * 64, np.zeros((1, 3, 4), np.float32), "candidates", None)


def named(name: str) -> list[tuple[type[Any], dict[str, Any]]]:
    """Everything that a folder may be called after, with that name."""
    grid = {"tasks": ["lcqmc"], "methods": ["mp2-deep"], "seeds": [1], "variants": {name: {}}}
    method = load_method("mp2-deep").model_dump(mode="json") | {"name": name}
    return [(Task, tiny_prompt.PAIR | {"name": name}), (MethodConfig, method), (Experiment, grid)]


def test_a_sound_name_is_taken() -> None:
    for model, values in named("my-own_task.2"):
        validate(model, values, "x.yaml")


@given(st.one_of(st.sampled_from(NAMES), st.text(alphabet="./\\%~\0\n ab-", max_size=12)))
@example("../../../x")
@settings(max_examples=deep(250), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """Names of tasks, methods and variants, of which those of folders are made: refused, or of one part."""
    for model, values in named(name):
        try:
            validate(model, values, "x.yaml")
        except UsageError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 - one line is the promise
        else:
            assert (tmp_path / f"{name}-1").resolve().parent == tmp_path.resolve()
            assert Path(name).name == name
    for load in (load_task, load_method):
        with pytest.raises(UsageError):
            load(name)
    with contextlib.suppress(UnicodeEncodeError):  # by the sender, of half a character
        body = wire.encode_request(replace(REQUEST, call_id=name))
        with pytest.raises(wire.WireError):
            wire.decode_request(body, layers=3, dim=4, most=1)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        TuneConfig(task="lcqmc").budget = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        RouterStageConfig(calls=8).calls = 3  # type: ignore[misc]


def test_a_manifest_gives_the_settings_back() -> None:
    config = TuneConfig(task="lcqmc", budget=50, set={"router.calls": 8, "router": None})
    assert TuneConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("backend", "given", "resends"),
    [
        ("local", None, True),
        ("http://127.0.0.1:8765", None, True),
        ("https://models.example", None, True),
        ("kserve://127.0.0.1:8000/oracle", None, True),
        ("kserve+grpc://127.0.0.1:8001/oracle", None, True),
        ("vllm+http://127.0.0.1:8000", None, False),
        ("vllm+https://models.example", "resend", True),
        ("local", "charge", False),
    ],
)
def test_a_call_is_made_again_by_default_where_that_charges_nothing(
    backend: str, given: Literal["resend", "charge"] | None, resends: bool
) -> None:
    assert TuneConfig(task="lcqmc", backend=backend, on_doubt=given).resends is resends


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mp2-deep-code", {"tempered": True, "legacy_decision": False}),
        ("mp2-deep-code", {"tempered": True}),
        ("mp2-gradient-deep", {"tempered": True}),
        ("zero-shot", {"tempered": True}),
    ],
)
def test_what_cannot_be_tempered_is_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="tempered"):
        method_with(load_method(name), changes)
