"""What the cheap methods fit: a linear map from features to one score a label.

All are closed forms or small convex problems over a few dozen examples, so they cost no time beside the forwards that
make the features. Scores are logits: their softmax are the probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LinearHead",
    "accuracy_of",
    "cross_entropy",
    "frequencies",
    "logistic",
    "nearest_mean",
    "prototypes",
    "scaled",
    "sharpness",
    "softmax",
    "threshold",
]

Matrix = NDArray[np.float64]

#: Factors tried for a head whose scores are similarities, and so say who wins but not how surely.
_SCALES = np.geomspace(1.0, 1000.0, 31)

#: Score of a label that is never the answer: far below any other, and finite, for losses are journalled.
_NEVER = -1e4


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Scores = features @ weight.T + bias.

    Attributes:
        weight: `(C, D)`.
        bias: `(C,)`.
    """

    weight: Matrix
    bias: Matrix

    def scores(self, features: Matrix) -> Matrix:
        """Features `(N, D)` to scores `(N, C)`."""
        scores: Matrix = features @ self.weight.T + self.bias
        return scores


def softmax(scores: Matrix) -> Matrix:
    """Probabilities `(N, C)` of scores `(N, C)`."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares: Matrix = powers / powers.sum(axis=1, keepdims=True)
    return shares


def cross_entropy(scores: Matrix, gold: Sequence[int]) -> float:
    """Mean negative log-probability of the right labels, in nats."""
    shift = scores.max(axis=1)
    total = np.log(np.exp(scores - shift[:, None]).sum(axis=1)) + shift
    return float((total - scores[np.arange(len(scores)), np.asarray(gold)]).mean())


def accuracy_of(scores: Matrix, gold: Sequence[int]) -> float:
    """Share of rows whose best score is the right one; the first of equals counts as best."""
    return float((scores.argmax(axis=1) == np.asarray(gold)).mean())


def frequencies(gold: Sequence[int], labels: int) -> LinearHead:
    """The same answer for all: the log of each label's share, counted from one so that none is impossible."""
    counts = np.bincount(np.asarray(gold), minlength=labels) + 1.0
    return LinearHead(np.zeros((labels, 0)), np.log(counts / counts.sum()))


def prototypes(vectors: Matrix, centre: Matrix) -> LinearHead:
    """Score = inner product of the label's own vector, `(C, D)`, with what a text has beside `centre` `(D,)`.

    Vectors of a language model share a large common part, which lies nearer to some labels than to others.
    """
    return LinearHead(np.array(vectors, dtype=np.float64), -vectors @ centre)


def nearest_mean(features: Matrix, gold: Sequence[int], labels: int) -> LinearHead:
    """Score = minus the squared distance to the mean of the label's examples, up to what all labels share."""
    right = np.eye(labels)[np.asarray(gold)]
    counts = right.sum(axis=0)
    means = right.T @ features / np.maximum(counts, 1.0)[:, None]
    # A label without an example has no mean, and is never the answer.
    return LinearHead(2.0 * means, np.where(counts > 0, -(means**2).sum(axis=1), _NEVER))


def logistic(features: Matrix, gold: Sequence[int], labels: int, penalty: float) -> LinearHead:
    """Multinomial logistic regression: mean cross-entropy plus penalty / 2 times the squared weights.

    Features are centred first; the bias is not penalised. Solved by L-BFGS from zero.
    """
    from scipy.optimize import minimize

    right = np.eye(labels)[np.asarray(gold)]
    centre = features.mean(axis=0)
    centred = features - centre
    rows, size = centred.shape

    def loss(flat: Matrix) -> tuple[float, Matrix]:
        weight, bias = flat[: labels * size].reshape(labels, size), flat[labels * size :]
        shares = softmax(centred @ weight.T + bias)
        value = -np.log((shares * right).sum(axis=1).clip(1e-300)).mean() + penalty / 2 * (weight**2).sum()
        error = (shares - right) / rows
        slope = np.concatenate([(error.T @ centred + penalty * weight).ravel(), error.sum(axis=0)])
        return float(value), slope

    found = minimize(loss, np.zeros(labels * (size + 1)), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weight, bias = found.x[: labels * size].reshape(labels, size), found.x[labels * size :]
    return LinearHead(weight, bias - weight @ centre)


def threshold(values: Matrix, gold: Sequence[int]) -> LinearHead:
    """Two labels by one number `(N, 1)`: the cut, and the side of label 1, of a nearly unpenalised logistic curve.

    The cut that errs least on a few dozen examples is a matter of one or two of them; the curve uses all.
    """
    return logistic(values, gold, 2, 1e-6)


def sharpness(scores: Matrix, gold: Sequence[int]) -> float:
    """The factor of the scores `(N, C)` under which the right labels are least surprising."""
    return float(min(_SCALES, key=lambda factor: cross_entropy(scores * factor, gold)))


def scaled(head: LinearHead, features: Matrix, gold: Sequence[int]) -> LinearHead:
    """The head times its `sharpness` on these examples; its decisions stay the same."""
    factor = sharpness(head.scores(features), gold)
    return LinearHead(head.weight * factor, head.bias * factor)
