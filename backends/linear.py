"""A frozen affine map; on a CPU its weight is packed for oneDNN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FrozenLinear", "packable", "packed", "product"]


class FrozenLinear:
    """y = x W^T + b whose weight never learns.

    On a CPU a second copy of the weight stands in the layout that oneDNN's products run fastest on; it serves where no
    gradient is asked for.

    Args:
        weight: W, `(out, in)`.
        bias: b, `(out,)`.
        prepack: Keep the packed copy.
    """

    def __init__(self, weight: Tensor, bias: Tensor, prepack: bool) -> None:
        self.weight, self.bias = weight, bias
        self.packed = packed(weight) if prepack else None

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Map (..., in) to (..., out), then apply "gelu" (erf) or nothing."""
        if self.packed is None or torch.is_grad_enabled():
            out = F.linear(x, self.weight, self.bias)
            return F.gelu(out) if activation == "gelu" else out
        algorithm = "none" if activation == "gelu" else ""
        done: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, activation, [], algorithm)
        return done

    def onto(self, x: Tensor, residual: Tensor) -> Tensor:
        """The map of (..., in) added to `residual` (..., out), in one pass over the result where it is packed."""
        if self.packed is None or torch.is_grad_enabled():
            return residual + self(x)
        done: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        return done

    def linear(self, x: Tensor) -> Tensor:
        """The map without its bias; forward only."""
        return F.linear(x, self.weight) if self.packed is None else product(x, self.packed)


def packable(dtype: torch.dtype) -> bool:
    """Whether this torch and processor have packed products of that precision: bfloat16 needs AVX-512 or better."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weight: Tensor) -> Tensor:
    """A weight in oneDNN's own layout, for `product`."""
    own: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return own


def product(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T of a packed W."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out
