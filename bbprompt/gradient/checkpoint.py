"""The checkpoint of a descent: parameters, Adam's moments, and the prompts that may still be chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from bbprompt.errors import DiskError
from bbprompt.gradient.soft import SoftPrompt
from bbprompt.store.rundir import CHECKPOINT, RunDirectory
from bbprompt.tensorfile import pack, unpack

__all__ = ["CHECKPOINT", "Checkpoint"]

_Kept = dict[int, dict[str, NDArray[np.float32]]]
_KEPT = re.compile(r"kept\.(0|[1-9][0-9]{0,17})\.(.+)", re.DOTALL | re.ASCII)
_ALWAYS = {"prompt", "head.weight", "head.bias"}  # see `SoftPrompt.written`


class Checkpoint:
    """The one checkpoint of a run, replaced whole at every look and removed at the end.

    Args:
        directory: Of the run.

    Raises:
        DiskError: The one that is there is damaged, or is no checkpoint of a descent.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._tensors: dict[str, NDArray[Any]] = {}
        self._calls, self._kept = 0, _Kept()
        self._file = directory.path / CHECKPOINT
        if directory.holds(CHECKPOINT):
            try:
                self._tensors = unpack(directory.read_bytes(CHECKPOINT))
                self._calls, self._kept = _calls(self._tensors), _kept(self._tensors)
            except (SafetensorError, ValueError) as error:
                raise self._damaged(error) from None

    @property
    def calls(self) -> int:
        """Calls that it stands for; 0 where there is none."""
        return self._calls

    def save(
        self,
        calls: int,
        soft: SoftPrompt,
        moved: Mapping[str, nn.Parameter],
        adam: torch.optim.Adam,
        kept: Mapping[int, Mapping[str, NDArray[np.float32]]],
    ) -> None:
        """Replace it.

        Args:
            calls: Made so far.
            soft: What is moved.
            moved: The parameters that Adam moves.
            adam: Its moments.
            kept: Prompts that may still be chosen, by key.
        """
        tensors: dict[str, NDArray[Any]] = {"calls": np.array(calls, dtype=np.int64)}
        for name, parameter in soft.named_parameters():
            tensors[f"soft.{name}"] = parameter.detach().cpu().numpy()
        for name, parameter in moved.items():
            for moment, value in adam.state[parameter].items():
                tensors[f"adam.{moment}.{name}"] = value.detach().cpu().numpy()
        for key, prompt in kept.items():
            tensors |= {f"kept.{key}.{name}": array for name, array in prompt.items()}
        self._directory.write_bytes(CHECKPOINT, pack(tensors))

    def restore(self, soft: SoftPrompt, moved: Mapping[str, nn.Parameter], adam: torch.optim.Adam) -> _Kept:
        """Put everything back; the prompts that were kept.

        Raises:
            DiskError: It was made by another descent than this one.
        """
        try:
            with torch.no_grad():
                for name, parameter in soft.named_parameters():
                    parameter.copy_(torch.from_numpy(self._shaped(f"soft.{name}", parameter.shape)))
            for name, parameter in moved.items():
                shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                state = {moment: self._shaped(f"adam.{moment}.{name}", shape) for moment, shape in shapes.items()}
                adam.state[parameter] = {
                    moment: torch.from_numpy(value.copy()).to("cpu" if moment == "step" else parameter.device)
                    for moment, value in state.items()
                }
            _check_parts(self._kept, soft.written())
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self._damaged(error) from None
        return self._kept

    def remove(self) -> None:
        """Let it go, at the end of the run."""
        self._directory.remove(CHECKPOINT)

    def _shaped(self, name: str, shape: torch.Size) -> NDArray[np.float32]:
        """A tensor, which is not to be spread over another shape; float32, as everything that moves."""
        array = self._tensors[name]
        if array.shape != tuple(shape) or array.dtype != np.float32:
            raise ValueError(f"{name} is {array.dtype} {array.shape} and should be float32 {tuple(shape)}")
        return array

    def _damaged(self, error: Exception) -> DiskError:
        reason = " ".join(str(error).split())[:200]
        return DiskError(f"{self._file}: damaged ({reason}); remove it, and the run goes on from its first step")


def _calls(tensors: Mapping[str, NDArray[Any]]) -> int:
    """The calls that a checkpoint says it stands for; raises `ValueError` where it does not say."""
    calls = tensors.get("calls")
    if calls is None or calls.shape != () or calls.dtype != np.int64 or calls < 0:
        raise ValueError("calls is missing or no number of calls")
    return int(calls)


def _kept(tensors: Mapping[str, NDArray[Any]]) -> _Kept:
    """The prompts that may still be chosen; raises `ValueError` for a name that says no key and part."""
    kept: _Kept = {}
    for name, array in tensors.items():
        if name.startswith("kept."):
            found = _KEPT.fullmatch(name)
            if found is None:
                raise ValueError(f"{name[:80]!r} names no prompt")
            kept.setdefault(int(found[1]), {})[found[2]] = array
    return kept


def _check_parts(kept: _Kept, now: Mapping[str, NDArray[Any]]) -> None:
    """Raise `ValueError` where a kept prompt is not made of what this descent writes, or, before later stages, less."""
    for key, prompt in kept.items():
        if missing := _ALWAYS - prompt.keys():
            raise ValueError(f"kept.{key} has no {min(missing)}")
        for part, array in prompt.items():
            if part not in now or (array.shape, array.dtype) != (now[part].shape, now[part].dtype):
                raise ValueError(f"kept.{key}.{part[:80]!r} is {array.dtype} {array.shape}, which does not fit")
