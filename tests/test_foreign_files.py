"""Files that are sound as such and hold something else than what they are read for: a documented error, never a bug."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_prompt
import torch

from bbprompt.backends.cache import MANIFEST, check_sealed
from bbprompt.backends.checkpoint import read_config
from bbprompt.backends.trained_head import is_head
from bbprompt.config import TuneConfig
from bbprompt.descent_settings import PromptDescentConfig
from bbprompt.errors import ArtifactError, DiskError
from bbprompt.gradient.checkpoint import CHECKPOINT, Checkpoint
from bbprompt.gradient.soft import SoftPrompt
from bbprompt.pretrain.checkpoint import load_checkpoint, restore_state, save_checkpoint, training_state
from bbprompt.pretrain.directory import append_log, cut_log
from bbprompt.pretrain.mp2 import Trainer
from bbprompt.router import PAPER
from bbprompt.store.disk import RealDisk
from bbprompt.store.rundir import RunDirectory
from bbprompt.sweep.runner import SWEEP, read_sweep
from bbprompt.tensorfile import pack, unpack

DEEP = "[" * 100_000 + "]" * 100_000
Tensors = dict[str, np.ndarray]


class Stage:
    """A descent's parameters and Adam after one step, in a run directory that keeps its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.soft = SoftPrompt(tiny_prompt.artifact(Path("toy"), "toy", layers=1), PAPER, 0)
        self.moved = self.soft.moved(PromptDescentConfig(rate=0.1, epochs=1))
        self.adam = torch.optim.Adam(self.moved.values())
        self.soft.current().sum().backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        self.directory = RunDirectory.create(folder, {"config": TuneConfig(task="lcqmc").model_dump(mode="json")})
        kept = {4: self.soft.written()}
        Checkpoint(self.directory).save(9, self.soft, self.moved, self.adam, kept)
        self.tensors: Tensors = unpack(self.directory.read_bytes(CHECKPOINT))

    def reopened(self, tensors: Tensors) -> Checkpoint:
        self.directory.write_bytes(CHECKPOINT, pack(tensors))
        return Checkpoint(self.directory)

    def restored(self, tensors: Tensors) -> dict[int, dict[str, Any]]:
        return self.reopened(tensors).restore(self.soft, self.moved, self.adam)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "run")


def test_a_sound_checkpoint_of_a_descent(stage: Stage) -> None:
    assert stage.reopened(stage.tensors).calls == 9
    kept = stage.restored(stage.tensors)
    assert list(kept) == [4]
    assert kept[4].keys() == stage.soft.written().keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"calls": None},
        {"calls": np.zeros(2, np.int64)},
        {"calls": np.zeros(0, np.int64)},
        {"calls": np.array(0.5)},
        {"calls": np.array(-1)},
        {"kept.4": np.zeros(3, np.float32)},
        {"kept.": np.zeros(3, np.float32)},
        {"kept.x.prompt": np.zeros(3, np.float32)},
        {"kept.-4.prompt": np.zeros(3, np.float32)},
        {"kept.４.prompt": np.zeros(3, np.float32)},
    ],
    ids=str,
)
def test_names_and_calls_of_a_descents_checkpoint_are_checked_when_it_is_opened(
    stage: Stage, changes: dict[str, np.ndarray | None]
) -> None:
    tensors = {name: array for name, array in (stage.tensors | changes).items() if array is not None}
    with pytest.raises(DiskError, match=r"checkpoint\.safetensors: damaged .*remove it, and the run goes on"):
        stage.reopened(tensors)


def test_a_descents_checkpoint_of_nothing_is_no_checkpoint(stage: Stage) -> None:
    with pytest.raises(DiskError, match=r"checkpoint\.safetensors: damaged"):
        stage.reopened({})


@pytest.mark.parametrize(
    "changes",
    [
        {"soft.bank": None},
        {"soft.bank": np.zeros(1, np.float32)},
        {"soft.bank": np.zeros((), np.float32)},
        {"adam.exp_avg.bank": None},
        {"adam.exp_avg.bank": np.zeros(1, np.float32)},
        {"adam.exp_avg_sq.bank": np.zeros(1, np.float32)},
        {"adam.step.bank": np.zeros(2, np.float32)},
        {"kept.4.prompt": np.zeros(1, np.float32)},
        {"kept.4.prompt": None},
        {"kept.4.other": np.zeros(1, np.float32)},
    ],
    ids=str,
)
def test_a_descents_checkpoint_that_fits_something_else(stage: Stage, changes: dict[str, np.ndarray | None]) -> None:
    tensors = {name: array for name, array in (stage.tensors | changes).items() if array is not None}
    with pytest.raises(DiskError, match=r"checkpoint\.safetensors: damaged .*remove it, and the run goes on"):
        stage.restored(tensors)


def test_a_type_of_number_that_numpy_lacks_is_a_damaged_file() -> None:
    header = b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    with pytest.raises(ValueError, match="BF16"):
        unpack(len(header).to_bytes(8, "little") + header + b"\0\0")


def test_json_that_is_nested_too_deep(tmp_path: Path) -> None:
    for name in ("config.json", MANIFEST, SWEEP):
        (tmp_path / name).write_text(DEEP)
    assert not is_head(tmp_path)
    with pytest.raises(ArtifactError, match=r"config\.json: unreadable \(nested too deep\)"):
        read_config(tmp_path)
    with pytest.raises(ArtifactError, match="damaged cache"):
        check_sealed(tmp_path)
    with pytest.raises(DiskError, match=r"sweep\.json: damaged or edited"):
        read_sweep(tmp_path)


@pytest.mark.parametrize("words", [DEEP, "[]", "3", "null", '{"step": 1}'], ids=lambda words: words[:9])
def test_the_words_of_a_training_checkpoint(tmp_path: Path, words: str) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "c", metadata={"words": words})
    with pytest.raises(ArtifactError, match="damaged"):
        load_checkpoint(tmp_path / "c", torch.device("cpu"))


@pytest.mark.parametrize(
    "words",
    [{"best": "3"}, {"best": "[1]"}, {"best": DEEP}, {"data": "3"}, {"untrained": "3"}, {"step": "-1"}],
    ids=lambda words: str(words)[:20],
)
def test_a_training_checkpoint_with_other_words_in_it(tmp_path: Path, words: dict[str, str]) -> None:
    trainer = Trainer.__new__(Trainer)
    trainer.prompts = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    trainer.optimizer = torch.optim.Adam(trainer.prompts.parameters())
    trainer.directory, trainer._identity = tmp_path, {}
    trainer.encoder = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
    trainer.batches = SimpleNamespace(digests={})
    trainer.prompts(torch.ones(1)).sum().backward()
    trainer.optimizer.step()
    tensors = training_state(trainer.prompts, trainer.optimizer)
    file = tmp_path / "checkpoint.safetensors"
    save_checkpoint(RealDisk(), file, tensors, {"step": "1", "best": "[0.5, 1]"})
    trainer.load()
    assert (trainer.step, trainer.best) == (1, (0.5, 1))
    save_checkpoint(RealDisk(), file, tensors, {"step": "1"} | words)
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors: damaged"):
        trainer.load()


@pytest.mark.parametrize("name", ["weight", "adam.exp_avg.weight", "adam.step.weight"])
def test_a_training_checkpoint_of_other_shapes_is_not_spread_over_the_weights(tmp_path: Path, name: str) -> None:
    module = torch.nn.Linear(3, 2, bias=False)
    adam = torch.optim.Adam(module.parameters())
    module(torch.ones(3)).sum().backward()
    adam.step()
    tensors = training_state(module, adam)
    save_checkpoint(RealDisk(), tmp_path / "c", tensors, {"step": "1"})
    restore_state(load_checkpoint(tmp_path / "c", torch.device("cpu"))[0], module, adam)
    with pytest.raises(RuntimeError, match="shape"):
        restore_state(tensors | {name: torch.zeros(1, 2 if "step" in name else 1)}, module, adam)


def test_a_log_of_a_training_with_other_lines_in_it(tmp_path: Path) -> None:
    said = "eins\u2028zwei\x85drei\x0b"
    append_log(tmp_path, {"step": 1, "said": said})
    log = tmp_path / "train.jsonl"
    odd = ["[]", "3", "null", "{}", '{"step": null}', '{"step": "1"}', '{"step": [1]}', DEEP, '{"st']
    log.write_text(log.read_text(encoding="utf-8") + "\n".join(odd) + "\n", encoding="utf-8")
    append_log(tmp_path, {"step": 2})
    append_log(tmp_path, {"step": 3})
    cut_log(RealDisk(), tmp_path, 2)
    kept = [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]
    assert kept == [{"step": 1, "said": said}, {"step": 2}]


def test_a_log_of_a_training_that_is_not_utf_8(tmp_path: Path) -> None:
    append_log(tmp_path, {"step": 1})
    log = tmp_path / "train.jsonl"
    log.write_bytes(b'{"step": 1, "\xff": 2}\n' + log.read_bytes())
    cut_log(RealDisk(), tmp_path, 1)
    assert log.read_text(encoding="utf-8") == '{"step": 1}\n'
