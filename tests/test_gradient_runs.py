"""Methods that descend gradients, as whole runs on tiny models: results, resumes, use, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_prompt
from killeddescent import PLANS
from safetensors.numpy import load_file
from test_verbalizer import causal_dir

from bbprompt import cli
from bbprompt.backends.backbone import load_backbone
from bbprompt.config import TuneConfig, load_method, located, method_with
from bbprompt.errors import ArtifactError, DiskError, Interrupted, OracleError, ResumeMismatch, UsageError
from bbprompt.export import export_prompt
from bbprompt.gradient.checkpoint import CHECKPOINT
from bbprompt.gradient.forward import Forward
from bbprompt.gradient.soft import SoftPrompt
from bbprompt.predict import load_prompt
from bbprompt.prompts import PromptConfig
from bbprompt.result import Result
from bbprompt.run import Watcher, prepare, reopen, tune
from bbprompt.search.tuner import Status
from bbprompt.store.rundir import RunDirectory
from bbprompt.sweep.experiment import Experiment

METHODS = ("prompt-tuning", "p-tuning-v2", "spot", "ppt", "mp2-gradient-deep", "mp2-gradient-shallow")
SCRATCH = {"gradient.soft.prompt_length": 3, "gradient.prompt.epochs": 6, "gradient.prompt.dev_every": 3}
STAGES = {
    "gradient.router.epochs": 4,
    "gradient.router.rate": 0.5,
    "gradient.router.dev_every": 2,
    "gradient.prompt.epochs": 4,
    "gradient.prompt.rate": 0.05,
    "gradient.prompt.dev_every": 2,
}


def settings(data: Path, method: str, changes: dict[str, Any], **keys: Any) -> TuneConfig:
    values = {"task": str(data / "task.yaml"), "data": str(data), "method": method, "threads": 1}
    values |= {"baselines": False}
    return TuneConfig.model_validate(values | {"set": changes} | keys)


def begin(config: TuneConfig, folder: Path, watcher: Watcher | None = None) -> Result:
    run = prepare(config)
    with RunDirectory.create(folder, run.manifest()) as directory:
        return tune(run, directory, watcher)


def go_on(folder: Path) -> Result:
    directory, config = reopen(folder, writable=True)
    with directory:
        return tune(prepare(config), directory)


def killed_everywhere(config: TuneConfig, folder: Path) -> dict[str, Any]:
    """What comes out of a run by each plan of kills, which is the same for all of them; see `killeddescent`."""
    (folder / "config.json").write_text(config.model_dump_json())
    script = Path(__file__).with_name("killeddescent.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "config.json"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert list(summary) == list(PLANS)
    for name, found in summary.items():
        assert found["killed"] == found["planned"], name
        for key in ("digest", "calls", "prompt", "curve", "files"):
            assert found[key] == summary["never"][key], (name, key)
    return summary


def single_prompt(folder: Path, backbone: Path, kind: Any) -> Path:
    """An artifact of one module at the input, as `bbprompt pretrain spot` and `ppt` leave it."""
    made = tiny_prompt.artifact(backbone, load_backbone(str(backbone)).digest, kind="mp2-shallow")
    config = made.config.model_copy(update={"kind": kind, "modules": 1, "tasks": ()})
    PromptConfig.model_validate(config.model_dump())
    made = type(made)(
        config, made.projection, made.modules[:, :1], made.routers[:0, :, :1], made.head_weight, made.head_bias
    )
    made.save(folder)
    return folder


def test_the_constants_of_the_papers() -> None:
    for name, rates in {"deep": (3e-3, 2e-5), "shallow": (1e-2, 3e-4)}.items():
        gradient = load_method(f"mp2-gradient-{name}").gradient
        assert gradient is not None
        assert gradient.router is not None
        assert gradient.prompt is not None
        assert (gradient.router.epochs, gradient.prompt.epochs) == (500, 500)
        assert (gradient.router.rate, gradient.prompt.rate) == rates
        assert (gradient.router.noise, gradient.prompt.head) == (True, False)
    for name in METHODS:
        method = load_method(name)
        assert method.gradient is not None
        assert method.select == ("both-losses" if name.startswith("mp2") else "dev-metric")
        assert sum(stage.calls for stage in method.gradient.stages.values()) + 2 == 1000 + 80 + 2
        assert method.gradient.prompt is not None
        rate = {"spot": 3e-3, "mp2-gradient-deep": 2e-5, "mp2-gradient-shallow": 3e-4}.get(name, 5e-3)
        assert (method.gradient.prompt.rate, method.gradient.prompt.dev_every) == (rate, 25)
        layers = method.gradient.soft.layers if method.gradient.soft else None
        assert layers == {"prompt-tuning": "input", "p-tuning-v2": "all"}.get(name)


@pytest.mark.parametrize("name", ["prompt-tuning", "p-tuning-v2"])
def test_from_scratch(name: str, tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    changes = SCRATCH | {"gradient.soft.head": str(tiny_prompts)}
    result = begin(settings(tiny_pair_data, name, changes), tmp_path / "run")
    assert (result.calls.train, result.calls.dev) == (1 + 6 + 2, 1 + 2)
    assert [(stage.name, stage.optimizer, stage.calls, stage.ended) for stage in result.stages] == [
        ("prompt", "adam", 10, "calls")
    ]
    tensors = load_file(tmp_path / "run" / "prompt.safetensors")
    assert tensors["prompt"].shape == (1 if name == "prompt-tuning" else tiny.LAYERS, 3, tiny.HIDDEN)
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value
        assert used.predict([{"text_a": "天气", "text_b": "天空"}])[0].label in ("0", "1")


@pytest.mark.parametrize("kind", ["spot", "ppt"])
def test_from_one_trained_prompt(kind: str, tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    prompts = single_prompt(tmp_path / "prompts", tiny_bert_dir, kind)
    changes = {"gradient.prompt.epochs": 4, "gradient.prompt.dev_every": 2, "gradient.prompt.rate": 0.05}
    result = begin(settings(tiny_pair_data, kind, changes, prompts=str(prompts)), tmp_path / "run")
    untuned = settings(tiny_pair_data, "untuned", {}, prompts=str(prompts), dtype="float32")
    assert begin(untuned, tmp_path / "untuned").before == result.before  # the very same untuned prompt
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


@pytest.mark.parametrize("name", ["mp2-gradient-deep", "mp2-gradient-shallow"])
def test_two_stages(
    name: str, tiny_pair_data: Path, tiny_prompts: Path, tiny_shallow_prompts: Path, tmp_path: Path
) -> None:
    prompts = tiny_prompts if name.endswith("deep") else tiny_shallow_prompts
    result = begin(settings(tiny_pair_data, name, STAGES, prompts=str(prompts)), tmp_path / "run")
    assert [(stage.name, stage.calls) for stage in result.stages] == [("router", 8), ("prompt", 8)]
    assert result.calls.train + result.calls.dev == 2 + 16
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


@pytest.mark.parametrize("task", ["single", "choice", "extract"])
def test_every_kind_of_task(task: str, tiny_prompts: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    data: Path = request.getfixturevalue(f"tiny_{task}_data")
    result = begin(settings(data, "mp2-gradient-deep", STAGES, prompts=str(tiny_prompts)), tmp_path / "run")
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_label_words(family: str, tiny_pair_data: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    backbone = tiny_bert_dir if family == "bert" else causal_dir(tmp_path / "llama", "llama")
    changes = SCRATCH | {"gradient.soft.readout": "verbalizer"}
    result = begin(settings(tiny_pair_data, "prompt-tuning", changes, backbone=str(backbone)), tmp_path / "run")
    with load_prompt(tmp_path / "run") as used:
        assert used.evaluate().value == result.test.value
    form: Any = "safetensors" if family == "bert" else "peft"
    assert export_prompt(tmp_path / "run", form, tmp_path / "out").files


def test_the_loss_falls_on_what_can_be_learned(tiny_prompts: Path, tmp_path: Path) -> None:
    task = tiny_prompt.SINGLE | {"labels": {"a": "房产", "b": "体育"}}
    rng = np.random.default_rng(0)
    rows = [
        {"text": ("天" if i % 2 else "地") + tiny_prompt.words(rng, 3, 5), "label": "ab"[i % 2]} for i in range(140)
    ]
    data = tiny_prompt.data_dir(tmp_path / "data", task, {"train": rows[:80], "dev": rows[80:], "test": rows[80:]})
    changes = {
        "gradient.soft.head": str(tiny_prompts),
        "gradient.soft.prompt_length": 4,
        "gradient.prompt.epochs": 80,
        "gradient.prompt.dev_every": 20,
        "gradient.prompt.rate": 0.05,
    }
    config = settings(data, "p-tuning-v2", changes, allow_overlap=True)
    result = begin(config, tmp_path / "run")
    losses = [float(row.split(",")[2]) for row in (tmp_path / "run" / "curve.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.5 * losses[0]
    assert result.stages[0].train_loss < 0.5 * losses[0]
    assert result.test.value > max(result.before.test, 0.8)


def test_the_choice_is_by_dev(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    changes = STAGES | {"gradient.prompt.rate": 3.0, "select": "dev-metric"}  # so that looks differ
    result = begin(settings(tiny_pair_data, "mp2-gradient-deep", changes, prompts=str(tiny_prompts)), tmp_path / "run")
    curve = [row.split(",") for row in (tmp_path / "run" / "curve.csv").read_text().splitlines()[1:]]
    assert float(curve[-1][3]) == result.dev == max(float(row[3]) for row in curve)
    assert result.dev >= result.before.dev


def test_the_head_moves_where_it_is_asked_to(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    changes = STAGES | {"gradient.prompt.head": True, "gradient.router": None}
    changes = {key: value for key, value in changes.items() if not key.startswith("gradient.router.")}
    # Any look at the end wins over the untuned prompt, so that what is kept is what was tuned.
    config = settings(tiny_pair_data, "mp2-gradient-deep", changes | {"select": "dev-loss"}, prompts=str(tiny_prompts))
    begin(config, tmp_path / "run")
    head = load_file(tiny_prompts / "model.safetensors")
    tuned = load_file(tmp_path / "run" / "prompt.safetensors")
    assert not np.array_equal(tuned["head.weight"], head["head.weight"].astype(np.float32))
    np.testing.assert_array_equal(tuned["head.bias"], head["head.bias"].astype(np.float32))


@pytest.mark.parametrize("budget", [8, 11, 17])
def test_stages_share_a_small_budget(budget: int, tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    changes = STAGES | {"gradient.router.epochs": 40, "gradient.prompt.epochs": 40}
    config = settings(tiny_pair_data, "mp2-gradient-deep", changes, prompts=str(tiny_prompts), budget=budget)
    result = begin(config, tmp_path / "run")
    assert result.calls.train + result.calls.dev <= budget
    assert all(stage.calls >= 3 and stage.ended == "budget" for stage in result.stages)
    with pytest.raises(UsageError, match="--budget 7: method mp2-gradient-deep needs at least 8"):
        prepare(config.model_copy(update={"budget": 7}))


def test_patience(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    changes = SCRATCH | {
        "gradient.soft.head": str(tiny_prompts),
        "gradient.prompt.epochs": 50,
        "gradient.prompt.rate": 1e-12,
        "gradient.prompt.patience": 2,
    }
    stage = begin(settings(tiny_pair_data, "prompt-tuning", changes), tmp_path / "run").stages[0]
    assert (stage.ended, stage.calls) == ("patience", 6 + 4)


def test_killed_and_gone_on_with(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    config = settings(tiny_pair_data, "mp2-gradient-deep", STAGES, prompts=str(tiny_prompts))
    summary = killed_everywhere(config, tmp_path)
    whole = summary["never"]
    assert whole["steps"] == 8
    assert CHECKPOINT not in whole["files"]
    assert summary["never either"]["journal"] == whole["journal"]
    # From a checkpoint on, and not from the beginning.
    assert summary["testing"]["steps"] == 8
    assert summary["each part"]["steps"] <= 8 + 4


def test_a_checkpoint_that_outlived_its_run_goes(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the result and the removal."""
    config = settings(tiny_pair_data, "mp2-gradient-deep", STAGES, prompts=str(tiny_prompts))
    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "remove", lambda *_: None)
        whole = begin(config, tmp_path / "run")
    left = tmp_path / "run" / CHECKPOINT
    kept = left.read_bytes()
    assert go_on(tmp_path / "run") == whole
    assert not left.exists()
    left.write_bytes(kept)
    assert cli.run(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert not left.exists()


class Stopper(Watcher):
    """Stops a run at some call."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def status(self, status: Status) -> None:
        if status.calls >= self.calls:
            raise Interrupted("stopped")


def stopped(data: Path, prompts: Path, folder: Path, calls: int = 9) -> Path:
    config = settings(data, "mp2-gradient-deep", STAGES, prompts=str(prompts))
    with pytest.raises(Interrupted):
        begin(config, folder, Stopper(calls))
    return folder


def test_what_a_resume_refuses(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    run = stopped(tiny_pair_data, tiny_prompts, tmp_path / "run")
    whole = (run / CHECKPOINT).read_bytes()
    (run / CHECKPOINT).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DiskError, match=r"checkpoint\.safetensors: damaged .* remove it, and the run goes on"):
        go_on(run)
    later = stopped(tiny_pair_data, tiny_prompts, tmp_path / "later", calls=17)
    (run / CHECKPOINT).write_bytes((later / CHECKPOINT).read_bytes())
    with pytest.raises(ResumeMismatch, match="the checkpoint is ahead of the journal"):
        go_on(run)
    (run / CHECKPOINT).unlink()  # as the message says
    (later / CHECKPOINT).unlink()
    assert go_on(run).digest == go_on(later).digest


def test_a_descent_that_computes_otherwise_is_noticed(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tiny_pair_data, tiny_prompts, tmp_path / "run")
    (run / CHECKPOINT).unlink()
    plain = SoftPrompt.for_step
    monkeypatch.setattr(SoftPrompt, "for_step", lambda self, *step: plain(self, *step) * 1.0001)
    with pytest.raises(ResumeMismatch, match="other numbers than the journal holds"):
        go_on(run)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "mp2-gradient-deep",
        {},
        {"backend": "http://127.0.0.1:1"},
        "--backend http://127.0.0.1:1: .* leave --backend out",
    ),
    ("mp2-gradient-deep", {}, {"ray": "local"}, "--ray local: the method mp2-gradient-deep goes backward"),
    ("mp2-gradient-deep", {}, {"workers": 2}, "--workers: .* leave it out"),
    ("mp2-gradient-deep", {}, {"prompts": "none"}, "begins with a prompt artifact; name it with --prompts"),
    ("ppt-unified", {}, {}, "name it with --prompts .`bbprompt pretrain ppt` makes one"),
    ("ppt", {}, {"prompts": "e5-small-mp2-shallow"}, "of the kind mp2-shallow, but the method ppt begins with"),
    ("prompt-tuning", {}, {"prompts": "e5-small-mp2-shallow"}, "begins from scratch; leave it out"),
    ("prompt-tuning", {"gradient.soft.head": None}, {}, "the span readout needs a trained answer head"),
    ("prompt-tuning", {"gradient.prompt": None}, {}, "else nothing is tuned"),
    ("prompt-tuning", {"gradient.start": "spot"}, {}, "no modules to route and no kind to start from"),
    ("prompt-tuning", {"gradient.prompt.rate": 0.0}, {}, r"gradient\.prompt\.rate"),
    ("prompt-tuning", {"gradient.prompt.rate": 1e38}, {}, r"gradient\.prompt\.rate"),
    ("prompt-tuning", {"loss": "hinge"}, {}, "with loss 'ce'"),
    ("prompt-tuning", {"calibrate": True}, {}, "without 'calibrate'"),
]


@pytest.mark.parametrize(("method", "changes", "keys", "message"), REFUSED)
def test_refused(
    method: str, changes: dict[str, Any], keys: dict[str, Any], message: str, tiny_pair_data: Path
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        prepare(settings(tiny_pair_data, method, changes, **keys))
    assert "\n" not in str(error.value)


def test_a_head_of_another_model_is_refused(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    other = tiny.bert_dir(tmp_path / "other", seed=5)
    config = settings(tiny_pair_data, "prompt-tuning", {"gradient.soft.head": str(tiny_prompts)}, backbone=str(other))
    with pytest.raises(ArtifactError, match=r"gradient\.soft\.head: .* was trained for"):
        prepare(config)


def test_a_head_is_found_from_anywhere(
    tiny_pair_data: Path, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_prompts.parent)
    config = located(settings(tiny_pair_data, "prompt-tuning", {"gradient.soft.head": tiny_prompts.name}))
    assert config.set == {"gradient.soft.head": str(tiny_prompts.resolve())}


def test_a_loss_that_is_no_number_ends_the_run(
    tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Forward.losses
    monkeypatch.setattr(Forward, "losses", lambda self, piece, prompt: plain(self, piece, prompt) * float("nan"))
    changes = SCRATCH | {"gradient.soft.head": str(tiny_prompts)}
    with pytest.raises(OracleError, match=r"the train loss is nan: .* lower the rate 0\.005"):
        begin(settings(tiny_pair_data, "p-tuning-v2", changes), tmp_path / "run")
    monkeypatch.undo()
    assert go_on(tmp_path / "run").calls.train == 1 + 6 + 2  # nothing that is no number was kept


def test_sweeps_take_them(tiny_prompts: Path) -> None:
    grid = {"tasks": ("lcqmc",), "seeds": (10,), "methods": ("prompt-tuning", "mp2-gradient-deep", "p-tuning-v2")}
    assert [cell.config.method for cell in Experiment.model_validate(grid).cells()] == list(grid["methods"])
    named = Experiment.model_validate(grid | {"methods": ("spot", "prompt-tuning"), "settings": {"prompts": "mine"}})
    assert [cell.config.prompts for cell in named.cells()] == ["mine", None]
    with pytest.raises(UsageError, match="ppt-unified: begins with a prompt artifact; name it with --prompts"):
        Experiment.model_validate(grid | {"methods": ("ppt-unified",)}).cells()


def test_the_effective_settings_of_a_method_are_shown() -> None:
    changed = method_with(load_method("prompt-tuning"), {"gradient.prompt.epochs": 7})
    assert changed.gradient is not None
    assert changed.gradient.least_budget == 5
    assert changed.model_dump(mode="json")["gradient"]["prompt"]["epochs"] == 7
