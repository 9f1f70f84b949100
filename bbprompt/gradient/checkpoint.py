"""The checkpoint of a descent: parameters, Adam's moments, and the prompts that may still be chosen."""

from __future__ import annotations

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


class Checkpoint:
    """The one checkpoint of a run, replaced whole at every look and removed at the end.

    Args:
        directory: Of the run.

    Raises:
        DiskError: The one that is there is damaged.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._tensors: dict[str, NDArray[Any]] = {}
        self._file = directory.path / CHECKPOINT
        if directory.holds(CHECKPOINT):
            try:
                self._tensors = unpack(directory.read_bytes(CHECKPOINT))
                if self._tensors["calls"].shape or self._tensors["calls"].dtype != np.int64:
                    raise ValueError("calls is no whole number")
            except (SafetensorError, ValueError, KeyError) as error:
                raise self._damaged(error) from None

    @property
    def calls(self) -> int:
        """Calls that it stands for; 0 where there is none."""
        return int(self._tensors["calls"]) if self._tensors else 0

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
        kept: _Kept = {}
        try:
            with torch.no_grad():
                for name, parameter in soft.named_parameters():
                    parameter.copy_(torch.from_numpy(self._tensors[f"soft.{name}"]))
            for name, parameter in moved.items():
                state = {moment: self._tensors[f"adam.{moment}.{name}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {
                    moment: torch.from_numpy(value.copy()).to("cpu" if moment == "step" else parameter.device)
                    for moment, value in state.items()
                }
            for name, array in self._tensors.items():
                if name.startswith("kept."):
                    _, key, part = name.split(".", 2)
                    kept.setdefault(int(key), {})[part] = array
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise self._damaged(error) from None
        return kept

    def remove(self) -> None:
        """Let it go, at the end of the run."""
        self._directory.remove(CHECKPOINT)

    def _damaged(self, error: Exception) -> DiskError:
        reason = " ".join(str(error).split())[:200]
        return DiskError(f"{self._file}: damaged ({reason}); remove it, and the run goes on from its first step")
