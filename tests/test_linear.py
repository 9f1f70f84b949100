"""The frozen affine map and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bbprompt.backends.linear import FrozenLinear
from bbprompt.pretrain.linear import DifferentiableLinear


def tensors(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(24, 16, generator=generator), torch.randn(24, generator=generator)
    return weight, bias, torch.randn(*shape, 16, generator=generator)


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
@pytest.mark.parametrize("kind", [FrozenLinear, DifferentiableLinear])
def test_the_gradient_is_that_of_the_stock_map(
    kind: type[FrozenLinear], shape: tuple[int, ...], activation: str, prepack: bool
) -> None:
    weight, bias, x = tensors(*shape)
    mine, stock = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer = kind(weight, bias, prepack)
    out, plain = layer(mine, activation), F.linear(stock, weight, bias)
    plain = F.gelu(plain) if activation == "gelu" else plain
    torch.testing.assert_close(out, plain)
    # Of a sum the gradient is one number expanded: not a dense tensor.
    for whole in (out, plain):
        whole.sum().backward()
    torch.testing.assert_close(mine.grad, stock.grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, activation), plain.detach())
        torch.testing.assert_close(layer.linear(x), F.linear(x, weight))


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("kind", [FrozenLinear, DifferentiableLinear])
def test_a_sum_in_the_same_pass(kind: type[FrozenLinear], prepack: bool) -> None:
    weight, bias, x = tensors(2, 3)
    layer, residual = kind(weight, bias, prepack), torch.randn(2, 3, 24)
    kept = residual.clone()
    mine, stock = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer.onto(mine, residual).square().sum().backward()
    (F.linear(stock, weight, bias) + residual).square().sum().backward()
    torch.testing.assert_close(mine.grad, stock.grad)
    with torch.no_grad():
        torch.testing.assert_close(layer.onto(x, residual), F.linear(x, weight, bias) + residual)
    assert torch.equal(residual, kept)


def test_the_weight_does_not_learn() -> None:
    weight, bias, x = tensors(4)
    layer = DifferentiableLinear(weight.requires_grad_(), bias.requires_grad_(), True)
    layer(x.requires_grad_()).sum().backward()
    assert weight.grad is None
    assert bias.grad is None
