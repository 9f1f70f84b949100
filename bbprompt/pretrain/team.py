"""Several processes that train together: one a GPU, or on CPUs over gloo.

Each process computes the gradient of its own share of a step's examples; the gradients are averaged before the
one update that all make alike, so W processes learn what one does with a batch W times as large. The parameters
are few and each gets its gradient at the very end of the backward pass (all layers' prompts come from one
product), so there is nothing for the communication to hide behind and a plain all-reduce does.

Start with `torchrun --nproc-per-node W -m bbprompt pretrain …`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bbprompt.errors import Interrupted

__all__ = ["ALONE", "Team", "join", "leads", "leave"]


@dataclass(frozen=True, slots=True)
class Team:
    """This process among `size`, from `rank` 0, which alone writes files and shows progress."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place.

        Raises:
            Interrupted: Another process of the team is gone.
        """
        if self.size == 1:
            return
        try:
            pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in pending:
                work.wait()
        except RuntimeError as error:
            raise Interrupted(
                f"another process of the training is gone ({str(error).splitlines()[0][:120]}); "
                "see what it said, then go on with --resume"
            ) from error

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in place."""
        if self.size == 1:
            return
        held = list(tensors)
        self.sum(held)
        for tensor in held:
            tensor /= self.size

    def wait(self) -> None:
        """Go on when all are here."""
        self.sum([torch.zeros(1)])


ALONE = Team()


def join(device: str) -> tuple[Team, str]:
    """Enter the team that `torchrun` started this process in, if it did.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The team, and the device of this process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE, device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    # Gloo beside NCCL: what is waited on and counted lies on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return Team(dist.get_rank(), dist.get_world_size()), device


def leads() -> bool:
    """Whether this process is the first, or the only one, of those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def leave(team: Team) -> None:
    """Leave the team again."""
    if team.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
