"""Routers: how K modules of a layer are mixed into one intrinsic vector.

A router is a matrix w (L, K). A rule turns it into weights, and the weights mix the modules z (L, K, d):

- *paper* (MP2, eq. 1): weights 1[w > 0] / K, the mean over K of the chosen modules;
- *code* (the released implementation): sigmoid(w) / sum_k sigmoid(w), soft and normalised.

Because a prompt is linear in its intrinsic vector (p = u A), mixing modules and mixing prompts are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["CODE", "PAPER", "GateRule", "compose", "mass"]


@dataclass(frozen=True, slots=True)
class GateRule:
    """How router entries become mixing weights.

    Attributes:
        gates: "binary" is 1[w > 0]; "sigmoid" is 1 / (1 + exp(-w)).
        mixing: "mean" divides by K; "normalized" divides by the sum of the layer's gates.
    """

    gates: Literal["binary", "sigmoid"]
    mixing: Literal["mean", "normalized"]

    def weights(self, router: NDArray[np.floating]) -> NDArray[np.float64]:
        """Mixing weights `(..., L, K)` of a router `(..., L, K)`.

        A layer whose gates are all zero gets all-zero weights, that is: no prompt in this layer.
        """
        w = np.asarray(router, dtype=np.float64)
        gates: NDArray[np.float64]
        # tanh keeps the sigmoid finite for any logit.
        gates = (w > 0).astype(np.float64) if self.gates == "binary" else 0.5 * (1.0 + np.tanh(0.5 * w))
        if self.mixing == "mean":
            gates /= w.shape[-1]
            return gates
        total = gates.sum(axis=-1, keepdims=True)
        np.divide(gates, total, out=gates, where=total > 0)
        return gates


PAPER = GateRule("binary", "mean")
CODE = GateRule("sigmoid", "normalized")


def compose(weights: NDArray[np.floating], modules: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mix modules: u_l = sum_k weights_lk z_lk.

    Args:
        weights: `(..., L, K)`.
        modules: z, `(L, K, d)`.

    Returns:
        Intrinsic points `(..., L, d)`.
    """
    mixed: NDArray[np.float64] = np.einsum(
        "...lk,lkd->...ld", np.asarray(weights, np.float64), np.asarray(modules, np.float64)
    )
    return mixed


def mass(weights: NDArray[np.floating]) -> NDArray[np.float64]:
    """Sum of the mixing weights of each layer: `(..., L, K)` to `(..., L)`."""
    total: NDArray[np.float64] = np.asarray(weights, np.float64).sum(axis=-1)
    return total
