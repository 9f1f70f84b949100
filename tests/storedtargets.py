"""What a training, a descent or a sweep finds in its own directory, as fuzz targets: others may have written it.

Imported by `fuzztargets.targets` only, so that a fuzzer can instrument the package first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from faultdisk import FaultDisk
from fuzztargets import Target
from torch import nn

from bbprompt import tensorfile
from bbprompt.backends.trained_head import HeadCard, TrainedHead, is_head
from bbprompt.errors import ArtifactError, DiskError, UsageError
from bbprompt.gradient.checkpoint import CHECKPOINT, Checkpoint
from bbprompt.pretrain.checkpoint import load_checkpoint, restore_state, save_checkpoint, training_state
from bbprompt.pretrain.directory import cut_log
from bbprompt.store.disk import RealDisk
from bbprompt.store.rundir import RunDirectory
from bbprompt.sweep.runner import SWEEP, read_sweep

__all__ = ["targets"]

RUN = Path("/runs/run")


def targets(scratch: Path) -> dict[str, Target]:
    """All of them by name; files go into the folder `scratch`."""
    return _descent() | _training(scratch) | _head(scratch) | _sweep(scratch)


def _moved() -> tuple[nn.Module, torch.optim.Adam]:
    """Parameters with Adam's moments."""
    module = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return module, optimizer


def _descent() -> dict[str, Target]:
    def opened(disk: FaultDisk) -> RunDirectory:
        RunDirectory.create(RUN, {"config": {}}, disk).close()
        return RunDirectory.open(RUN, disk)

    def read(data: bytes) -> object:
        disk = FaultDisk()
        with opened(disk) as directory:
            disk.put(RUN / CHECKPOINT, data, durable=True)
            checkpoint, (module, adam) = Checkpoint(directory), _moved()
            kept = checkpoint.restore(module, dict(module.named_parameters()), adam)  # type: ignore[arg-type]
            return checkpoint.calls, kept

    disk, (module, adam) = FaultDisk(), _moved()
    with opened(disk) as directory:
        point = {"point": np.ones((1, 2), np.float32), "router": np.ones(3, np.float32)}
        Checkpoint(directory).save(7, module, dict(module.named_parameters()), adam, {5: point})  # type: ignore[arg-type]
    return {"descent checkpoint": Target((disk.files()[str(RUN / CHECKPOINT)],), read, (DiskError,))}


def _training(scratch: Path) -> dict[str, Target]:
    file, log = scratch / "checkpoint.safetensors", scratch / "train.jsonl"
    module, optimizer = _moved()
    save_checkpoint(RealDisk(), file, training_state(module, optimizer), {"step": "3", "best": "[0.5, 2]"})
    sound = file.read_bytes()

    def checkpoint(data: bytes) -> object:
        file.write_bytes(data)
        tensors, words = load_checkpoint(file, torch.device("cpu"))
        assert all(isinstance(word, str) for word in words.values())
        try:
            restore_state(tensors, *_moved())
        except (KeyError, RuntimeError):  # as documented; who calls it says which file
            return None
        return words.get("step")

    def cut(data: bytes) -> object:
        log.write_bytes(data)
        cut_log(RealDisk(), scratch, 2)
        return log.read_bytes()

    records = [{"step": 1, "loss": 0.5}, {"step": 2, "note": "第\u2028行"}, {"step": 2, "speed": 1.0}, {"step": 3}]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return {
        "training checkpoint": Target((sound,), checkpoint, (ArtifactError,)),
        "training log": Target((lines.encode(),), cut, (DiskError,)),
    }


def _head(scratch: Path) -> dict[str, Target]:
    folder, hidden, width = scratch / "head", 4, 3
    folder.mkdir()
    card = HeadCard(backbone="toy", backbone_digest="0" * 64, hidden=hidden, width=width, tokens=2)
    shapes = {"dense.weight": (width, hidden), "dense.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"out.weight": (hidden, width), "out.bias": (hidden,), "bias": (2,)}
    numbers = {name: np.ones(shape, np.float16) for name, shape in shapes.items()}
    files = TrainedHead(card, numbers | {"tokens": np.array([3, 9])}).files()

    def reader(changed: str) -> Callable[[bytes], object]:
        def read(data: bytes) -> object:
            for name, content in {**files, changed: data}.items():
                (folder / name).write_bytes(content)
            assert is_head(folder) or changed == "config.json"
            return TrainedHead.load(folder).digest

        return read

    return {
        "head card": Target((files["config.json"],), reader("config.json"), (ArtifactError,)),
        "head weights": Target(
            (files["model.safetensors"], tensorfile.pack({})), reader("model.safetensors"), (ArtifactError,)
        ),
    }


def _sweep(scratch: Path) -> dict[str, Target]:
    grid = {"tasks": ["lcqmc"], "methods": ["mp2-deep"], "seeds": [1, 2], "settings": {"budget": 50}}

    def read(data: bytes) -> object:
        (scratch / SWEEP).write_bytes(data)
        found = read_sweep(scratch)
        return found and found.cells()

    return {
        "sweep.json": Target((json.dumps({"format": 1, "experiment": grid}).encode(),), read, (DiskError, UsageError))
    }
