"""The rule of choice: which of two prompts that were looked at is returned, by train and dev alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from bbprompt.config import MethodConfig
from bbprompt.search.evaluate import DevScore

__all__ = ["Looked", "better", "clearly_lower"]


class Looked(Protocol):
    """What train and dev say of a prompt, whatever it is made of; see `Look`."""

    @property
    def dev(self) -> DevScore:
        """What dev says of it."""

    @property
    def searched(self) -> bool:
        """Whether it was found by minimising the train loss."""

    @property
    def pooled_loss(self) -> float:
        """Train and dev loss together."""

    @property
    def dev_losses(self) -> tuple[float, ...]:
        """Dev loss of each text."""


def clearly_lower(losses: Sequence[float], others: Sequence[float], margin: float) -> bool:
    """Whether a mean over texts is below another by more than `margin` standard errors of their paired difference."""
    gain = np.subtract(others, losses)
    error = float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return float(gain.mean()) > margin * error


def better(method: MethodConfig, look: Looked, held: Looked) -> bool:
    """Whether the rule of choice of `method` prefers a later look to the one held so far."""
    match method.select:
        case "both-losses":
            lower = look.pooled_loss < held.pooled_loss
            return lower and (not look.searched or clearly_lower(look.dev_losses, held.dev_losses, method.margin))
        case "dev-loss":
            return look.dev.loss < held.dev.loss
        case "pooled-loss":
            return look.pooled_loss < held.pooled_loss
        case "dev-metric":
            return look.dev.metric > held.dev.metric
