"""The frozen affine map with a gradient: packed for oneDNN forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bbprompt.backends.linear import FrozenLinear, packed, product

__all__ = ["DifferentiableLinear"]


class DifferentiableLinear(FrozenLinear):
    """A frozen map whose input gets its gradient; from the first backward on it holds a transposed packed copy."""

    _transposed: Tensor | None = None

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Map (..., in) to (..., out), then apply "gelu" (erf) or nothing."""
        if self.packed is None or not torch.is_grad_enabled():
            return super().__call__(x, activation)
        out: Tensor = _Map.apply(x, self)  # type: ignore[no-untyped-call]
        return F.gelu(out) if activation == "gelu" else out

    def pulled_back(self, gradient: Tensor) -> Tensor:
        """The gradient `(..., out)` of y as that of x, `(..., in)`."""
        if self._transposed is None:
            self._transposed = packed(self.weight.t().contiguous())
        return product(gradient.contiguous(), self._transposed)


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: DifferentiableLinear) -> Tensor:
        ctx.layer = layer
        return layer(x)  # no gradient is recorded in here

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.pulled_back(gradients[0]), None
