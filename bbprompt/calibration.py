"""Offsets of the options: what is added to their scores, fitted on the few-shot texts by convex optimization.

A prompt may rank the texts of each label well and still favour one label over another. As many numbers as there are
options mend that, and 32 texts are enough to fit them, which they are not for the prompt itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bbprompt.oracle import Scores, TextBatch

__all__ = ["compared_offsets", "label_offsets"]

#: Ridge penalty on what the offsets of more than two compared options have beside a threshold.
_RIDGE = 0.3
#: Ridge penalty on the offsets of labels, as a sum over all texts: that of one text more.
_PRIOR = 1.0
#: Newton steps at most; some ten are usual.
_STEPS = 200

_Floats = NDArray[np.float64]


def compared_offsets(scores: Scores, batch: TextBatch, gold: Sequence[int]) -> _Floats | None:
    """Offsets for texts that are compared with each other; None for texts of another form.

    Options of grade g, from 1 for "same" to -1, have the logits g * s, s the scaled similarity, which tells nothing of
    where one ends and the next begins. Offsets -g * t say where "alike" begins; they are fitted by the cross-entropy
    alone. What they have beside that, where there are more than two options, is held near 0 by a ridge penalty.

    Args:
        scores: Of n candidates.
        batch: The N texts.
        gold: Index of the right option of each.

    Returns:
        `(n, C)`, each candidate's own; they sum to 0.
    """
    if any(form.second < 0 for form in batch.forms):
        return None
    grades = np.array(batch.forms[0].grades)
    count = len(grades)
    held = _RIDGE * (np.eye(count) - np.outer(grades, grades) / (grades @ grades))
    logits = scores.logits[..., 0].astype(np.float64).reshape(len(scores.logits), -1, count)
    # The threshold begins at the mean similarity.
    start = -grades * (logits @ grades).mean(axis=1, keepdims=True) / (grades @ grades)
    return _fitted(logits, gold, held, start)


def label_offsets(option_scores: _Floats, gold: Sequence[int]) -> _Floats:
    """Offsets of labels that all texts share, held near 0 by a ridge penalty that weighs as one text does.

    Args:
        option_scores: `(N, C)` of one candidate.
        gold: Index of the right option of each of the N texts.

    Returns:
        `(C,)`; they sum to 0.
    """
    count = option_scores.shape[1]
    held = _PRIOR / len(option_scores) * np.eye(count)
    offsets: _Floats = _fitted(option_scores[None], gold, held, np.zeros((1, count)))[0]
    return offsets


def _fitted(logits: _Floats, gold: Sequence[int], held: _Floats, offsets: _Floats) -> _Floats:
    """Minimum of mean cross-entropy + offsets' held offsets / 2, for each candidate.

    The sum is convex; Newton's method finds its minimum, with steps that no pair of options moves by more than 1/2 in,
    in which the curvature changes by a bounded factor.

    Args:
        logits: `(n, N, C)`.
        gold: Index of the right option of each text.
        held: `(C, C)` penalty.
        offsets: `(n, C)` where to begin.

    Returns:
        `(n, C)`, each row of mean 0.
    """
    count = logits.shape[2]
    right = np.eye(count)[np.asarray(gold)]
    for _ in range(_STEPS):
        shifted = logits + offsets[:, None]
        shares = np.exp(shifted - shifted.max(axis=2, keepdims=True))
        shares /= shares.sum(axis=2, keepdims=True)
        slope = (shares - right).mean(axis=1) + offsets @ held
        curvature = -np.einsum("knc,knd->kcd", shares, shares) / shares.shape[1] + held
        curvature[:, range(count), range(count)] += shares.mean(axis=1)
        # A constant added to all offsets changes no share: that direction is given a curvature of its own.
        step = np.linalg.solve(curvature + 1.0 / count + 1e-12 * np.eye(count), -slope[..., None])[..., 0]
        step /= np.maximum(2.0 * np.ptp(step, axis=1, keepdims=True), 1.0)
        offsets = offsets + step
        if np.abs(step).max() < 1e-9:
            break
    centred: _Floats = offsets - offsets.mean(axis=1, keepdims=True)
    return centred
