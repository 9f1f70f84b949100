"""When bfloat16 may be trusted: what the processor can, and the error of a population against its spread."""

from __future__ import annotations

import numpy as np
import torch

from bbprompt.oracle import Scores

__all__ = ["ENOUGH", "best_precision", "spread_over_error"]

#: Least spread over error at which candidates are ranked by their bfloat16 scores.
ENOUGH = 20.0


def best_precision(device: str) -> str:
    """What "auto" means: "mixed" on CPUs with bfloat16 tiles (AMX), else "float32".

    Depends on the device alone, so that a resumed run finds the precision that it began with. AVX-512 BF16 without
    tiles doubles the rate of the products only, which the reference and the check all but use up.
    """
    return "mixed" if device == "cpu" and torch.cpu._is_amx_tile_supported() else "float32"


def spread_over_error(scores: Scores, exact: Scores, which: int, sizes: tuple[int, ...]) -> float:
    """How much further candidates lie apart than one of them is off.

    Both are root mean squares over the scored spans of their log-probability (the loss is its mean over the right
    ones): of its standard deviation over candidates, and of its difference from the exact value.

    Args:
        scores: Of a population.
        exact: Of one of its candidates alone, in float32.
        which: Which candidate that is.
        sizes: Number of spans of each text.

    Returns:
        The ratio; 0 where nothing is scored, infinity without an error.
    """
    if not sum(sizes):
        return 0.0
    values, right = _log_probabilities(scores, sizes), _log_probabilities(exact, sizes)[0]
    spread = float(np.sqrt(values.var(axis=0).mean()))
    error = float(np.sqrt(np.square(values[which] - right).mean()))
    return spread / error if error else np.inf


def _log_probabilities(scores: Scores, sizes: tuple[int, ...]) -> np.ndarray:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values: np.ndarray = (scores.logits.astype(np.float64) - scores.normalizer[:, owner]).mean(axis=2)
    return values
