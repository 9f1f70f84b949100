"""What a sweep leaves out because a method cannot do a task is what its run would have refused, in the same words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_prompt

from bbprompt.config import TuneConfig
from bbprompt.errors import UsageError
from bbprompt.possible import known_prompts
from bbprompt.prompts import ModularPrompt, PromptConfig
from bbprompt.run import prepare
from bbprompt.sweep.experiment import Experiment, experiment_from

WORDS = {"gradient.soft.readout": "verbalizer", "gradient.soft.prompt_length": 2, "gradient.soft.head": None}
#: Method, changes, whether it begins with prototype prompts, the task that it cannot do, what is said.
CASES: dict[str, tuple[str, dict[str, Any], bool, str, str]] = {
    "artifact": ("mp2-proto", {}, True, "extract", "a prototype readout cannot find answers in a context"),
    "descent": ("mp2-gradient-deep", {}, True, "extract", "a prototype readout cannot find answers in a context"),
    "projection": ("bbt", {}, False, "extract", "a verbalizer readout cannot find answers in a context"),
    "soft prompt": ("prompt-tuning", WORDS, False, "extract", "a verbalizer readout cannot find answers"),
    "form": ("prompt-tuning", WORDS | {"gradient.form": "plain"}, False, "extract", "PPT's patterns have no gap"),
    "loss": ("mp2-deep", {"loss": "hinge", "calibrate": False}, False, "extract", "has no options to keep apart"),
    "graded": ("mp2-gradient-deep", {}, True, "same", "compares texts by a threshold that no gradient here fits"),
}


@pytest.fixture(scope="module")
def prototypes(tmp_path_factory: pytest.TempPathFactory, tiny_prompts: Path) -> Path:
    """Deep prompts whose readout compares embeddings."""
    made = ModularPrompt.load(tiny_prompts)
    config = made.config.model_dump() | {"readout": "prototype", "pooling": {}}
    folder = tmp_path_factory.mktemp("prompts") / "prototypes"
    head = made.head_weight[:0], made.head_bias[:0]
    ModularPrompt(PromptConfig.model_validate(config), made.projection, made.modules, made.routers, *head).save(folder)
    return folder


@pytest.fixture(scope="module")
def same_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = tiny_prompt.pair_records
    splits = {"train": make(90, 1), "dev": make(40, 2), "test": make(30, 3)}
    task = tiny_prompt.PAIR | {"name": "tiny-same", "same": "1"}
    return tiny_prompt.data_dir(tmp_path_factory.mktemp("data") / "tiny-same", task, splits)


@pytest.mark.parametrize("case", CASES)
def test_a_sweep_says_what_the_run_would(
    case: str,
    prototypes: Path,
    same_data: Path,
    tiny_single_data: Path,
    tiny_extract_data: Path,
    tiny_prompts: Path,
    tiny_bert_dir: Path,
) -> None:
    method, changes, compares, kind, said = CASES[case]
    data = {"extract": tiny_extract_data, "same": same_data}[kind]
    own = "soft" in case or case in ("projection", "form")
    keys: dict[str, Any] = {"set": changes, "backbone": str(tiny_bert_dir), "threads": 1}
    keys |= {} if own else {"prompts": str(prototypes if compares else tiny_prompts)}
    tasks = [str(data / "task.yaml"), str(tiny_single_data / "task.yaml")]
    sweep = experiment_from(None, {"tasks": tasks, "methods": [method], "seeds": [1]}, keys)
    ((pair, reason),) = sweep.unfit().items()
    assert pair == (tasks[0], method)
    assert said in reason
    assert [cell.config.task for cell in sweep.cells()] == tasks[1:]
    with pytest.raises(UsageError) as refused:
        prepare(TuneConfig.model_validate({**keys, "task": tasks[0], "data": str(data), "method": method}))
    assert str(refused.value) == reason


def test_variants_are_rows_of_their_own(prototypes: Path, tiny_prompts: Path) -> None:
    variants = {"span": {"prompts": str(tiny_prompts)}, "proto": {"prompts": str(prototypes)}}
    grid = {"tasks": ["cote_bd", "tnews"], "methods": ["mp2-gradient-deep"], "seeds": [1], "variants": variants}
    sweep = Experiment.model_validate(grid)
    assert list(sweep.unfit()) == [("cote_bd", "mp2-gradient-deep proto")]
    assert len(sweep.cells()) == 3
    with pytest.raises(UsageError, match="cannot find answers in a context"):
        Experiment.model_validate(grid | {"tasks": ["cote_bd"]}).cells()


def test_ppt_prompts_of_another_form_have_no_runs(tmp_path: Path, tiny_prompts: Path) -> None:
    """What a run would find in the prompts is found in their settings alone."""
    told = json.loads((tiny_prompts / "config.json").read_text(encoding="utf-8"))
    ppt = {"formats": ["pair"], "language": "zh", "hybrid": True, "options": [2, 16]}
    told |= {"kind": "ppt", "readout": "verbalizer", "training": {"recipe": {"ppt": ppt}}}
    (tmp_path / "config.json").write_text(json.dumps(told), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    grid = {"tasks": ["tnews", "lcqmc", "cote_bd", "sst2"], "methods": ["ppt-hybrid"], "seeds": [1]}
    found = experiment_from(None, grid, {"prompts": str(tmp_path)}).unfit()
    assert [task for task, _ in found] == ["tnews", "cote_bd", "sst2"]
    assert 'ppt.formats: ["pair"], but --method ppt-hybrid' in found["tnews", "ppt-hybrid"]
    assert "no gap for an answer" in found["cote_bd", "ppt-hybrid"]


def test_prompts_that_are_not_here_are_left_to_their_runs(tmp_path: Path, tiny_prompts: Path) -> None:
    assert known_prompts("owner/name") is known_prompts(str(tmp_path)) is None
    known = known_prompts(str(tiny_prompts))
    assert known is not None
    assert known.readout == "span"
    grid = {"tasks": ["cmrc2018"], "methods": ["mp2-proto"], "seeds": [1]}
    assert len(experiment_from(None, grid, {"prompts": "owner/name"}).cells()) == 1


def test_listing_a_grid_loads_no_torch() -> None:
    code = (
        "import sys; from bbprompt.sweep.experiment import experiment_from; "
        "experiment_from('main-table', {}, {}).cells(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_too_many_routers_are_not_listed(tiny_pair_data: Path, tiny_prompts: Path) -> None:
    """Said before a model is loaded, and before any call."""
    keys = {"task": str(tiny_pair_data / "task.yaml"), "data": str(tiny_pair_data), "prompts": str(tiny_prompts)}
    config = TuneConfig.model_validate({**keys, "threads": 1, "set": {"router.optimizer": "enumerate"}})
    assert prepare(config)  # 3 layers of 3 modules
    deep = TuneConfig(task="lcqmc", data="sample", set={"router.optimizer": "enumerate"})
    with pytest.raises(
        UsageError, match=r"--set router.optimizer=enumerate: takes at most 16 .* these prompts have 96"
    ):
        prepare(deep)
