"""Files that are sound as such and hold something else than what they are read for: a documented error, never a bug."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from filetargets import Stage, trainer

from bbprompt.backends.cache import MANIFEST, check_sealed
from bbprompt.backends.checkpoint import read_config
from bbprompt.backends.trained_head import TrainedHead, Transform, is_head
from bbprompt.errors import ArtifactError, DiskError
from bbprompt.frozen import frozen_prompt
from bbprompt.pretrain.checkpoint import load_checkpoint, restore_state, save_checkpoint, training_state
from bbprompt.pretrain.directory import append_log, cut_log
from bbprompt.store.disk import RealDisk
from bbprompt.store.rundir import RunDirectory
from bbprompt.sweep.runner import SWEEP, read_sweep
from bbprompt.tensorfile import pack, unpack

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(RunDirectory.create(tmp_path / "run", {"config": {"task": "t"}}))


def test_a_sound_checkpoint_of_a_descent(stage: Stage) -> None:
    assert stage.reopened(pack(stage.tensors)).calls == 9
    kept = stage.restored(pack(stage.tensors))
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
        stage.reopened(pack(tensors))


def test_a_descents_checkpoint_of_nothing_is_no_checkpoint(stage: Stage) -> None:
    with pytest.raises(DiskError, match=r"checkpoint\.safetensors: damaged"):
        stage.reopened(pack({}))


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
        stage.restored(pack(tensors))


def test_a_type_of_number_that_numpy_lacks_is_a_damaged_file() -> None:
    header = b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    with pytest.raises(ValueError, match="BF16"):
        unpack(len(header).to_bytes(8, "little") + header + b"\0\0")


def test_json_that_is_nested_too_deep(tmp_path: Path) -> None:
    for name in ("config.json", MANIFEST, SWEEP):
        (tmp_path / name).write_text(DEEP)
    assert not is_head(tmp_path)
    with pytest.raises(ArtifactError, match=r"config\.json: unreadable \(nested too deeply\)"):
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
    made = trainer(tmp_path)
    tensors = training_state(made.prompts, made.optimizer)
    file = tmp_path / "checkpoint.safetensors"
    save_checkpoint(RealDisk(), file, tensors, {"step": "1", "best": "[0.5, 1]"})
    made.load()
    assert (made.step, made.best) == (1, (0.5, 1))
    save_checkpoint(RealDisk(), file, tensors, {"step": "1"} | words)
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors: damaged"):
        made.load()


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


def test_a_line_of_a_log_ends_where_it_ends(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0bfour"
    append_log(tmp_path, {"step": 1, "task": text})
    append_log(tmp_path, {"step": 2, "task": text})
    cut_log(RealDisk(), tmp_path, 1)
    (line,) = (tmp_path / "train.jsonl").read_bytes().splitlines()
    assert json.loads(line) == {"step": 1, "task": text}
    for other in (b"[]\n", b"3\n", b'{"loss": 1}\n', b'{"step": "1"}\n'):
        (tmp_path / "train.jsonl").write_bytes(other)
        with pytest.raises(DiskError, match=r"train\.jsonl: holds a line that no training wrote"):
            cut_log(RealDisk(), tmp_path, 1)
        assert (tmp_path / "train.jsonl").read_bytes() == other


@pytest.mark.parametrize(
    "placeholders",
    [np.array([-1, 3]), np.array([0.5, 3]), np.array(3), np.array([[1, 2]]), np.array([1, 2, 3])],
    ids=lambda array: str(array.tolist()),
)
def test_a_tuned_prompt_with_other_placeholders(placeholders: np.ndarray) -> None:
    tensors = {
        "prompt": np.zeros((1, 2, 4), np.float32),
        "head.weight": np.zeros((2, 4), np.float32),
        "head.bias": np.zeros(2, np.float32),
    }
    frozen_prompt(tensors | {"placeholders": np.array([1, 3])}, ("toy", "d"), "span", None)
    with pytest.raises(ArtifactError, match=r"^the tuned prompt is damaged.* tune again$"):
        frozen_prompt(tensors | {"placeholders": placeholders}, ("toy", "d"), "span", None)


def head(folder: Path, tokens: np.ndarray, **changes: int | str) -> Path:
    """Write a trained head of zeros."""
    card = {"backbone": "toy", "backbone_digest": "d", "hidden": 2, "width": 3, "tokens": len(tokens)}
    tensors = {name: np.zeros_like(value.numpy()) for name, value in Transform(2, 3).state_dict().items()}
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(pack(tensors | {"bias": np.zeros(len(tokens)), "tokens": tokens}))
    (folder / "config.json").write_text(json.dumps(card | changes))
    return folder


def test_a_head_for_tokens_that_the_encoder_lacks(tmp_path: Path) -> None:
    TrainedHead.load(head(tmp_path / "sound", np.array([0, 4]))).open(torch.zeros(5, 2), "toy", "d")
    beyond = TrainedHead.load(head(tmp_path / "beyond", np.array([0, 5])))
    with pytest.raises(ArtifactError, match="damaged head: names token 5, and toy has 5"):
        beyond.open(torch.zeros(5, 2), "toy", "d")
    with pytest.raises(ArtifactError, match="damaged head: not the 2 token ids"):
        TrainedHead.load(head(tmp_path / "half", np.array([0.5, 1.5])))


@pytest.mark.parametrize("size", [10**30, 2**63, 2**40, 10**6])
@pytest.mark.parametrize("name", ["hidden", "width"])
def test_a_head_of_a_vast_size_is_refused_before_memory_is_asked_for(tmp_path: Path, name: str, size: int) -> None:
    folder = head(tmp_path / "head", np.array([0, 4]), **{name: size})
    with pytest.raises(ArtifactError, match="damaged"):
        TrainedHead.load(folder)


def test_what_a_head_says_of_its_encoder_is_shown_in_one_line(tmp_path: Path) -> None:
    folder = head(tmp_path / "head", np.array([0, 4]), backbone="a\nb", backbone_digest="c\nd")
    with pytest.raises(ArtifactError, match=r"was trained for a b \(weights c d\), not for toy \(weights d\)"):
        TrainedHead.load(folder).open(torch.zeros(5, 2), "toy", "d")
