"""The files of a Hugging Face checkpoint directory: config and safetensors weights, read without pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bbprompt.errors import ArtifactError

__all__ = ["read_config", "read_tensors", "tensor_names", "tensors_by_name", "weight_files"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed ``config.json`` of a checkpoint directory.

    Raises:
        ArtifactError: It is missing, no JSON object, or names no model type.
    """
    config = _read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ArtifactError(f"{folder / 'config.json'}: no model_type; give a directory in transformers' format")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint directory, one or the shards that its index lists.

    Raises:
        ArtifactError: There are none (a pickled checkpoint is named and refused), or a shard is missing.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        shards = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ArtifactError(f"{folder / _INDEX}: no weight_map; download the checkpoint again")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ArtifactError(f"{folder / _INDEX}: shard {name!r} is missing; download the checkpoint again")
        return [folder / name for name in names]
    for name in _PICKLED:
        if (folder / name).is_file():
            raise ArtifactError(
                f"{folder / name}: pickled weights can run code and are not read; convert them, "
                "if you trust them, with "
                "safetensors.torch.save_file({k: v.clone() for k, v in torch.load('pytorch_model.bin', "
                f"weights_only=True).items()}}, '{_SINGLE}', {{'format': 'pt'}})"
            )
    raise ArtifactError(f"{folder}: no {_SINGLE}; give a directory with safetensors weights")


def tensor_names(folder: Path) -> list[str]:
    """Return the sorted names of all tensors of a checkpoint directory; only headers are read.

    Raises:
        ArtifactError: As `weight_files`, or a file is damaged.
    """
    names: list[str] = []
    for path in weight_files(folder):
        with _opened(path) as file:
            names.extend(file.keys())
    return sorted(names)


def read_tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint directory whose names are wanted, in the types they are stored in.

    Raises:
        ArtifactError: As `weight_files`, or a file is damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        with _opened(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    return tensors


@contextmanager
def tensors_by_name(folder: Path) -> Iterator[dict[str, Callable[[], torch.Tensor]]]:
    """For each tensor of a checkpoint directory how to read it, while the context is open; nothing is read before.

    Raises:
        ArtifactError: As `weight_files`, or a file is damaged.
    """
    with ExitStack() as opened:
        found: dict[str, Callable[[], torch.Tensor]] = {}
        for path in weight_files(folder):
            file = opened.enter_context(_opened(path))
            found |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
        yield found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: damaged weights ({error}); download the checkpoint again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file; give a directory in transformers' format") from error
    except RecursionError:
        raise ArtifactError(f"{path}: unreadable (nested too deep); download the checkpoint again") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: unreadable ({error}); download the checkpoint again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: not a JSON object; download the checkpoint again")
    return value
