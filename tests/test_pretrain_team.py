"""Several processes and several slices learn what one process with a larger batch does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinytrain
import torch

from bbprompt.errors import Interrupted
from bbprompt.pretrain.checkpoint import load_checkpoint
from bbprompt.pretrain.recipe import PretrainConfig
from bbprompt.pretrain.run import pretrain
from bbprompt.pretrain.team import ALONE, Team, join

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("token_cache")

#: Without the head's bias: the loss does not depend on it, so that Adam makes steps of its rounding errors.
MEASURED = ("router", "bank", "projection", "head_weight")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinytrain.data_root(tmp_path_factory.mktemp("upstream"))


@pytest.fixture(scope="module")
def alone(data: Path, tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], Any]:
    """One process with six examples a task: directory, losses, scores."""
    out = tmp_path_factory.mktemp("alone") / "out"
    losses: list[float] = []
    scores = pretrain(small(data, tiny_bert_dir, per_task=6), out, data, lambda p, _: losses.append(p.loss))
    return out, losses, scores


def small(data: Path, backbone: Path, **changes: Any) -> PretrainConfig:
    settings = {"steps": 5, "noise_from": 0.4, "module_rate": 0.05, "projection_rate": 0.02, "head_rate": 0.05}
    return tinytrain.make_recipe(data, backbone, **(settings | changes))


def weights(out: Path) -> dict[str, Any]:
    tensors, _ = load_checkpoint(out / "checkpoint.safetensors", torch.device("cpu"))
    return {name: tensor.numpy() for name, tensor in tensors.items() if name in MEASURED}


def team(config: PretrainConfig, data: Path, out: Path, size: int) -> list[subprocess.Popen[str]]:
    out.parent.mkdir(exist_ok=True)
    recipe = out.with_suffix(".recipe")
    recipe.write_text(config.model_dump_json(), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, str(HERE / "teamtrain.py"), str(recipe), str(data), str(out)]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(words, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]


def test_two_processes_learn_what_one_with_the_doubled_batch_does(
    alone: tuple[Path, list[float], Any], data: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    out, losses, scores = alone
    processes = team(small(data, tiny_bert_dir), data, tmp_path / "two", 2)
    assert [process.wait(120) for process in processes] == [0, 0]
    found = json.loads((tmp_path / "two.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    assert len(losses) == 5
    assert found["scores"] == scores
    for name, array in weights(tmp_path / "two").items():
        np.testing.assert_allclose(array, weights(out)[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_slices_learn_what_the_whole_batch_does(
    alone: tuple[Path, list[float], Any], data: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    out, losses, _ = alone
    found: list[float] = []
    pretrain(small(data, tiny_bert_dir, accumulate=2), tmp_path, data, lambda p, _: found.append(p.loss))
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for name, array in weights(tmp_path).items():
        np.testing.assert_allclose(array, weights(out)[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_without_torchrun_there_is_no_team(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") == (ALONE, "cpu")
    tensor = torch.ones(2)
    ALONE.average([tensor])
    assert tensor.tolist() == [1, 1]


def test_a_lost_process_can_be_resumed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Connection closed by peer\nmore")

    monkeypatch.setattr(torch.distributed, "all_reduce", gone)
    with pytest.raises(Interrupted, match=r"another process of the training is gone \(Connection closed by peer\)"):
        Team(0, 2).sum([torch.ones(1)])
