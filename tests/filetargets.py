"""Files that training, descent, sweep and baseline write and read again, as fuzz targets.

Imported by `fuzztargets.targets` only, so that a fuzzer can instrument the package first. A tensor file is a seed with
its checksum and without: a mutant of the first hardly ever gets past it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tiny_prompt
import torch
from faultdisk import FaultDisk
from fuzztargets import Target
from safetensors.numpy import save

from bbprompt import tensorfile
from bbprompt.backends.trained_head import HeadCard, TrainedHead, Transform, is_head
from bbprompt.baselines.settings import BaselineConfig
from bbprompt.baselines.use import load_baseline
from bbprompt.descent_settings import PromptDescentConfig
from bbprompt.errors import ArtifactError, DiskError, ResumeMismatch, UsageError
from bbprompt.frozen import frozen_prompt, frozen_tensors
from bbprompt.gradient.checkpoint import CHECKPOINT, Checkpoint
from bbprompt.gradient.soft import SoftPrompt
from bbprompt.predict import _read_tensors
from bbprompt.pretrain.checkpoint import save_checkpoint, training_state
from bbprompt.pretrain.directory import append_log, cut_log
from bbprompt.pretrain.mp2 import Trainer
from bbprompt.router import PAPER
from bbprompt.store.disk import RealDisk
from bbprompt.store.rundir import PROMPT, RunDirectory
from bbprompt.sweep.experiment import experiment_from
from bbprompt.sweep.runner import SWEEP, read_sweep, write_sweep
from bbprompt.tasks.task import Task

__all__ = ["Stage", "targets", "trainer"]

Tensors = dict[str, np.ndarray]


class Stage:
    """A descent's parameters and Adam after one step, in a run directory that keeps its checkpoint."""

    def __init__(self, directory: RunDirectory) -> None:
        self.soft = SoftPrompt(tiny_prompt.artifact(Path("toy"), "toy", layers=1), PAPER, 0)
        self.moved = self.soft.moved(PromptDescentConfig(rate=0.1, epochs=1))
        self.adam = torch.optim.Adam(self.moved.values())
        self.soft.current().sum().backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        self.directory = directory
        Checkpoint(directory).save(9, self.soft, self.moved, self.adam, {4: self.soft.written()})
        self.tensors: Tensors = tensorfile.unpack(directory.read_bytes(CHECKPOINT))

    def reopened(self, data: bytes) -> Checkpoint:
        self.directory.write_bytes(CHECKPOINT, data)
        return Checkpoint(self.directory)

    def restored(self, data: bytes) -> dict[int, Any]:
        return self.reopened(data).restore(self.soft, self.moved, self.adam)


def trainer(folder: Path) -> Trainer:
    """A training of one weight after one step, which has only what loading a checkpoint needs."""
    made = Trainer.__new__(Trainer)
    prompts: Any = torch.nn.Linear(1, 1)
    made.prompts, made.optimizer = prompts, torch.optim.Adam(prompts.parameters())
    made.directory, made._identity = folder, {}
    encoder: Any = SimpleNamespace(device=torch.device("cpu"))
    batches: Any = SimpleNamespace(digests={})
    made.encoder, made.batches = encoder, batches
    prompts(torch.ones(1)).sum().backward()
    made.optimizer.step()
    return made


def targets(scratch: Path) -> dict[str, Target]:
    """All of them by name; `scratch` is an empty folder of theirs."""
    return {
        "descent checkpoint": _descent(),
        "training checkpoint": _training(scratch / "training"),
        "training log": _log(scratch / "log"),
        "head weights": _head(scratch / "head", "model.safetensors"),
        "head config": _head(scratch / "head", "config.json"),
        "sweep": _sweep(scratch / "sweep"),
        "baseline": _kept(_fitted, {"weight": np.ones((2, 3)), "bias": np.zeros(2), "view": np.array(0)}),
        "frozen prompt": _kept(_frozen, _frozen_tensors()),
    }


def _run() -> RunDirectory:
    return RunDirectory.create(Path("/runs/run"), {"config": {"task": "t"}}, FaultDisk())


def _both(tensors: Tensors) -> tuple[bytes, bytes]:
    return tensorfile.pack(tensors), bytes(save(tensors))


def _descent() -> Target:
    stage = Stage(_run())
    return Target(_both(stage.tensors), stage.restored, (DiskError,))


def _training(folder: Path) -> Target:
    folder.mkdir()
    file, made = folder / "checkpoint.safetensors", trainer(folder)
    words = {"step": "1", "best": "[0.5, 1]", "untrained": '{"a": 0.5}', "data": "{}"}
    save_checkpoint(RealDisk(), file, training_state(made.prompts, made.optimizer), words)
    return Target((file.read_bytes(),), _from(file, made.load), (ArtifactError, ResumeMismatch))


def _log(folder: Path) -> Target:
    folder.mkdir()
    file = folder / "train.jsonl"
    for step in (1, 2, 3):
        append_log(folder, {"step": step, "loss": 0.5, "said": "eins\u2028zwei"})
    return Target((file.read_bytes(),), _from(file, lambda: cut_log(RealDisk(), folder, 2)), (DiskError,))


def _head(folder: Path, which: str) -> Target:
    card = HeadCard(backbone="toy", backbone_digest="d", hidden=2, width=3, tokens=4, training={"steps": 1})
    tensors = {name: value.numpy() for name, value in Transform(2, 3).state_dict().items()}
    head = TrainedHead(card, tensors | {"bias": np.zeros(4), "tokens": np.arange(4)})
    folder.mkdir(exist_ok=True)
    sound = head.files()

    def read(data: bytes) -> object:
        for name, content in (sound | {which: data}).items():
            (folder / name).write_bytes(content)
        is_head(folder)
        return TrainedHead.load(folder).open(torch.zeros(5, 2), "toy", "d")

    loose = bytes(save(tensorfile.unpack(sound["model.safetensors"])))
    seeds = (sound[which], loose) if which == "model.safetensors" else (sound[which],)
    return Target(seeds, read, (ArtifactError,))


def _sweep(folder: Path) -> Target:
    grid = {"tasks": ["lcqmc", "ocnli"], "methods": ["mp2-deep"], "seeds": [1, 2]}
    write_sweep(folder, experiment_from(None, grid, {"threads": 1, "budget": 50}), None)
    file = folder / SWEEP
    return Target((file.read_bytes(),), _from(file, lambda: read_sweep(folder)), (DiskError, UsageError))


def _kept(read: Callable[[RunDirectory], object], tensors: Tensors) -> Target:
    directory = _run()

    def reading(data: bytes) -> object:
        directory.write_bytes(PROMPT, data)
        return read(directory)

    return Target(_both(tensors), reading, (DiskError, ArtifactError))


def _fitted(directory: RunDirectory) -> object:
    return load_baseline(directory, BaselineConfig(rule="logistic"), Task.model_validate(tiny_prompt.PAIR), None)


def _frozen_tensors() -> Tensors:
    prompt = tiny_prompt.artifact(Path("toy"), "toy", layers=1)
    return dict(frozen_tensors(prompt, np.zeros((1, prompt.config.intrinsic_dim), np.float32)))


def _frozen(directory: RunDirectory) -> object:
    return frozen_prompt(_read_tensors(directory), ("toy", "d"), "span", None)


def _from(file: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    def reading(data: bytes) -> object:
        file.write_bytes(data)
        return read()

    return reading
