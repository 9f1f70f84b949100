"""Checkpoints: tensors and a few words in one safetensors file, replaced in one step or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bbprompt.errors import ArtifactError, DiskError, UsageError
from bbprompt.jsontext import parse_json
from bbprompt.oneline import one_line
from bbprompt.store.disk import Disk, disk_error

__all__ = [
    "check_finite",
    "load_checkpoint",
    "pretrain_disk_error",
    "restore_state",
    "save_checkpoint",
    "shaped",
    "training_state",
    "write_atomic",
]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_CHUNK = 64 * 2**20


def write_atomic(disk: Disk, file: Path, data: bytes) -> None:
    """Give `file` the content `data`, or leave it as it was.

    The bytes are durable before the name is, so that neither a kill nor a power cut leaves a torn file.

    Raises:
        DiskError: The disk is full or faulty; what stood there before is whole.
    """
    temporary = file.with_name(file.name + ".tmp")
    try:
        opened = disk.open(temporary, fresh=True)
        try:
            for begin in range(0, len(data), _CHUNK):
                disk.write(opened, data[begin : begin + _CHUNK])
            disk.sync(opened)
        finally:
            disk.close(opened)
        disk.replace(temporary, file)
        disk.sync_folder(file.parent)
    except DiskError as error:
        with suppress(DiskError):  # half a file would keep a full disk full
            if disk.exists(temporary):
                disk.remove(temporary)
        raise DiskError(f"{_advised(error)} (what {file.name} held before is kept)") from error


def pretrain_disk_error(error: OSError, doing: str, file: Path) -> DiskError:
    """As `bbprompt.store.disk.disk_error`, with the flags of `pretrain`."""
    return DiskError(_advised(disk_error(error, doing, file)))


def _advised(error: DiskError) -> str:
    return str(error).replace("`bbprompt resume`", "--resume").replace("--run-dir", "--out")


def save_checkpoint(disk: Disk, file: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> None:
    """Write `tensors` with `words` as the file's metadata.

    Raises:
        DiskError: As `write_atomic`.
    """
    held = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    # One key: the order of several is left to chance, and equal checkpoints are to be equal files.
    write_atomic(disk, file, save(held, metadata={"words": json.dumps(dict(words), sort_keys=True)}))


def load_checkpoint(file: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and words back.

    Raises:
        ArtifactError: The file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        words = parse_json(metadata["words"]) if "words" in metadata else metadata  # as version 0.1 wrote it
        if not isinstance(words, dict) or not all(isinstance(word, str) for word in words.values()):
            raise ValueError("its words are no texts by name")
        return load_file(file, device=str(device)), words
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{file}: damaged ({one_line(str(error))[:200]}); start the training again") from error


def check_finite(step: int, module: nn.Module) -> None:
    """Refuse weights that no checkpoint may hold.

    Raises:
        UsageError: A weight is not finite; names the step.
    """
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UsageError(
                f"step {step}: {name} is not finite; begin again with lower learning rates and another --out (the "
                "last good checkpoint of this one is kept)"
            )


def training_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is trained, and Adam's moments of it."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        tensors[name] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value
    return tensors


def restore_state(tensors: Mapping[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `training_state` gave.

    Raises:
        KeyError, RuntimeError: A tensor is missing or has another shape.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(shaped(tensors, name, parameter.shape))
            if parameter.requires_grad:
                shapes = dict.fromkeys(_MOMENTS, parameter.shape) | {"step": torch.Size()}
                optimizer.state[parameter] = {
                    key: shaped(tensors, f"adam.{key}.{name}", shape) for key, shape in shapes.items()
                }


def shaped(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """A tensor of this shape: of another, it could be spread over it unseen.

    Raises:
        KeyError, RuntimeError: It is missing or has another shape.
    """
    if tensors[name].shape != shape:
        raise RuntimeError(f"{name} has the shape {tuple(tensors[name].shape)} and should have {tuple(shape)}")
    return tensors[name]
