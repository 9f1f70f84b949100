"""Files that somebody else may have written: what they hold ends in a value or in a documented error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faultdisk import FaultDisk

from bbprompt.backends.cache import MANIFEST, check_sealed
from bbprompt.backends.checkpoint import _read_json
from bbprompt.backends.trained_head import HeadCard, TrainedHead, is_head
from bbprompt.errors import ArtifactError, DiskError
from bbprompt.gradient.checkpoint import CHECKPOINT, Checkpoint
from bbprompt.jsontext import parse_json
from bbprompt.pretrain.checkpoint import load_checkpoint
from bbprompt.pretrain.directory import append_log, cut_log
from bbprompt.store.disk import RealDisk
from bbprompt.store.rundir import RunDirectory
from bbprompt.sweep.runner import SWEEP, read_sweep
from bbprompt.tensorfile import pack

DEEP = "[" * 100_000


def test_json_that_is_nested_too_deeply_is_an_error_like_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    for name in ("config.json", MANIFEST, SWEEP):
        (tmp_path / name).write_text(DEEP, encoding="utf-8")
    assert not is_head(tmp_path)
    with pytest.raises(ArtifactError, match="unreadable"):
        _read_json(tmp_path / "config.json")
    with pytest.raises(ArtifactError, match="damaged cache"):
        check_sealed(tmp_path)
    with pytest.raises(DiskError, match="damaged or edited"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": np.zeros(1)},
        {"calls": np.zeros(2, np.int64)},
        {"calls": np.array(0.5)},
        {"calls": np.array(3), "kept.x.point": np.zeros(1)},
        {"calls": np.array(3), "kept.5": np.zeros(1)},
        {"calls": np.array(3), "soft.weight": np.zeros((9, 9), np.float32)},
    ],
)
def test_a_descent_does_not_go_on_from_what_no_descent_wrote(tensors: dict[str, Any]) -> None:
    disk, run = FaultDisk(), Path("/runs/run")
    module = torch.nn.Linear(2, 1, bias=False)

    def go_on(held: dict[str, Any]) -> None:
        disk.put(run / CHECKPOINT, pack({"soft.weight": np.zeros((1, 2), np.float32)} | held), durable=True)
        Checkpoint(directory).restore(module, {}, torch.optim.Adam(module.parameters()))  # type: ignore[arg-type]

    with RunDirectory.create(run, {"config": {}}, disk) as directory:
        go_on({"calls": np.array(3)})
        with pytest.raises(DiskError, match=r"damaged \(.*; remove it, and the run goes on from its first step"):
            go_on(tensors)


def test_a_checkpoint_of_a_training_says_its_words_as_text(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "checkpoint.safetensors"
    for words in ("[]", "null", '{"step": 3}', DEEP):
        save_file({"a": torch.zeros(1)}, file, metadata={"words": words})
        with pytest.raises(ArtifactError, match=r"damaged .*start the training again"):
            load_checkpoint(file, torch.device("cpu"))


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


def test_a_head_takes_no_memory_for_what_its_card_alone_says(tmp_path: Path) -> None:
    card = HeadCard(backbone="toy", backbone_digest="0" * 64, hidden=2**20, width=2**20, tokens=2)
    (tmp_path / "config.json").write_text(card.model_dump_json(), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(pack({"tokens": np.array([1, 2])}))
    with pytest.raises(ArtifactError, match=r"no usable dense\.weight of shape \(1048576, 1048576\)"):
        TrainedHead.load(tmp_path)
    (tmp_path / "config.json").write_text(card.model_dump_json().replace("1048576", "9" * 400), encoding="utf-8")
    with pytest.raises(ArtifactError, match="damaged language model head"):
        TrainedHead.load(tmp_path)
