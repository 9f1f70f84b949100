"""When bfloat16 may be trusted: what the processor can, and the error of a population against its spread."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bbprompt.oracle import Scores, TextBatch

__all__ = [
    "ENOUGH",
    "ENOUGH_THROUGHOUT",
    "Probe",
    "best_precision",
    "error_of",
    "fast_bfloat16",
    "log_probabilities",
    "spread_of",
    "training_precision",
    "warn_of_slow",
]

log = logging.getLogger("bbprompt")

#: Least spread over error of a span at which candidates are ranked by their deviations in bfloat16.
ENOUGH = 20.0
#: The same for bfloat16 throughout, whose errors differ from text to text and partly cancel in a mean over texts.
ENOUGH_THROUGHOUT = 10.0
#: Texts on which the error is measured.
_TEXTS = 8


def best_precision(device: str) -> str:
    """What "auto" means: "mixed" where bfloat16 is multiplied in hardware, else "float32".

    Depends on the device alone, so that a resumed run finds the precision that it began with.
    """
    return "mixed" if fast_bfloat16(device) else "float32"


def training_precision(device: str) -> str:
    """What "auto" means to a training: "bfloat16" where the device multiplies it in hardware, else "float32"."""
    return "bfloat16" if fast_bfloat16(device) else "float32"


def fast_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it works and is slower than float32."""
    if device != "cpu":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def warn_of_slow(dtype: torch.dtype, device: str) -> None:
    """Say so where bfloat16 was asked for and the device has no instructions for it."""
    if dtype is torch.bfloat16 and not fast_bfloat16(device):
        log.warning("no bfloat16 instructions here (%s): float32 is several times faster", device)


@dataclass(frozen=True, slots=True)
class Probe:
    """A few texts of a batch, spread over all of it, and two candidates: what an error is measured on.

    Attributes:
        batch: The texts.
        spans: Which scored spans of the whole batch are theirs.
        pair: The first candidate and the one farthest from it.
    """

    batch: TextBatch
    spans: NDArray[np.int64]
    pair: tuple[int, int]

    @classmethod
    def of(cls, batch: TextBatch, points: NDArray[np.float32]) -> Probe:
        """Choose them; the choice follows from the request alone."""
        texts = range(0, len(batch.forms), max(len(batch.forms) // _TEXTS, 1))
        few = TextBatch(
            tuple(batch.forms[i] for i in texts), tuple(batch.answers[i] for i in texts) if batch.answers else ()
        )
        owner = np.repeat(np.arange(len(batch.sizes)), batch.sizes)
        farthest = int(np.square(points - points[:1]).sum(axis=(1, 2)).argmax())
        return cls(few, np.flatnonzero(np.isin(owner, texts)), (0, farthest))


def spread_of(scores: Scores, sizes: Sequence[int]) -> float:
    """How far candidates lie apart: standard deviation of a span's log-probability, root mean square over spans.

    The loss is the mean over the right spans of that log-probability. 0 where nothing is scored.
    """
    return _root_mean_square(log_probabilities(scores, sizes).std(axis=0))


def error_of(values: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    """How far log-probabilities of spans are from their exact values, root mean square; infinite without any."""
    return _root_mean_square(values - exact) if values.size else np.inf


def log_probabilities(scores: Scores, sizes: Sequence[int]) -> NDArray[np.float64]:
    """Log-probability of each span `(n, O)`, the mean of the channels; `sizes` is how many spans each text has."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values: NDArray[np.float64] = (scores.logits.astype(np.float64) - scores.normalizer[:, owner]).mean(axis=2)
    return values


def _root_mean_square(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(values).mean())) if values.size else 0.0
