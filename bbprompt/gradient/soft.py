"""What a descent moves: the routers, the modules written out and the answer head's weight, or a whole model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bbprompt.backends.overlay import weights_of, written_weights
from bbprompt.descent_settings import AnyDescent, PromptDescentConfig, RouterDescentConfig
from bbprompt.pretrain.model import relaxed_bernoulli
from bbprompt.prompts import ModularPrompt
from bbprompt.router import GateRule

__all__ = ["SoftModel", "SoftPrompt"]


class SoftPrompt(nn.Module):
    """A prompt p_l = sum_k g_lk p_lk with the modules p_lk = z_lk A_l, A and z merged.

    Released MP2 merges A and z for gradient descent too, for what is tuned is the prompt itself and no point of the
    subspace. As in the paper, "only the selected prompts" move: a closed gate passes no gradient. With one module this
    is prompt tuning, or P-tuning v2 where every layer has a prompt.

    Args:
        prompt: Where it begins; its modules mixed evenly are the untuned prompt.
        rule: How a tuned router becomes gates.
        seed: Of the router.
    """

    even: Tensor
    gain: Tensor

    def __init__(self, prompt: ModularPrompt, rule: GateRule, seed: int) -> None:
        super().__init__()
        self._space, self._rule = prompt.space, rule
        layers, modules = self._space.router_shape
        generator = torch.Generator().manual_seed(seed)
        bank = torch.einsum("lkd,ldx->lkx", torch.from_numpy(prompt.modules), torch.from_numpy(prompt.projection))
        self.bank = nn.Parameter(bank.view(layers, modules, prompt.config.prompt_length, prompt.config.hidden))
        # As small as upstream (MP2's code): every gate is about as likely open as closed.
        self.router = nn.Parameter((torch.rand(layers, modules, generator=generator) * 2 - 1) * 1e-3)
        self.head_weight = nn.Parameter(torch.from_numpy(prompt.head_weight.copy()))
        self.head_bias = nn.Parameter(torch.from_numpy(prompt.head_bias.copy()))
        self.routed = False
        total = self._space.even_mass
        self.register_buffer("even", torch.from_numpy(np.repeat(total[:, None] / modules, modules, 1)).float())
        self.register_buffer("gain", torch.from_numpy(self._space.gain(rule)).float())
        self.requires_grad_(False)

    def shake(self, scale: float, seed: int) -> None:
        """Add noise of a standard deviation to a prompt from scratch."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.bank.add_(torch.randn(self.bank.shape, generator=generator).to(self.bank.device) * scale)

    def moved(self, stage: AnyDescent) -> dict[str, nn.Parameter]:
        """The parameters that a stage moves, and from now on the only ones that gradients are kept for."""
        if isinstance(stage, RouterDescentConfig):
            names = ["router"]
        elif not isinstance(stage, PromptDescentConfig):
            raise TypeError("a prompt has no weights of a model")
        else:
            names = ["bank", "head_weight"] if stage.head and len(self.head_weight) else ["bank"]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)
        return {name: parameter for name, parameter in self.named_parameters() if name in names}

    def for_step(self, stage: AnyDescent, generator: torch.Generator) -> Tensor:
        """The prompt `(L, P, H)` of one step."""
        if not isinstance(stage, RouterDescentConfig):
            return self.current()
        if stage.noise:
            gates = relaxed_bernoulli(self.router, stage.temperature, generator)
        else:
            gates = torch.sigmoid(self.router / stage.temperature)
        normalized = self._rule.mixing == "normalized"
        total = gates.sum(-1, keepdim=True) + 1e-12 if normalized else float(gates.shape[-1])
        return self._mixed(gates / total * self.gain)

    def current(self) -> Tensor:
        """The prompt `(L, P, H)` as it would be returned now: gates by the rule, without noise."""
        return self._mixed(self._weights())

    def written(self) -> dict[str, NDArray[np.float32]]:
        """What is kept of it: prompt, head, and the router where one was tuned."""
        tensors = {"prompt": self.current(), "head.weight": self.head_weight, "head.bias": self.head_bias}
        if self.routed:
            tensors["router"] = self.router
        return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in tensors.items()}

    def _weights(self) -> Tensor:
        if not self.routed:
            return self.even
        weights = self._rule.weights(self.router.detach().cpu().numpy())
        return torch.from_numpy(weights).float().to(self.router.device) * self.gain

    def _mixed(self, weights: Tensor) -> Tensor:
        return torch.einsum("lk,lkph->lph", weights, self.bank)


class SoftModel(SoftPrompt):
    """The weights of an encoder and of its answer head; the prompt, where there is one, stays as it is.

    Args:
        prompt: Placeholders and answer head.
        rule: See `SoftPrompt`; nothing is routed.
        seed: Likewise.
        model: A copy of the encoder of its own; see `bbprompt.backends.overlay.with_rows`.
    """

    def __init__(self, prompt: ModularPrompt, rule: GateRule, seed: int, model: Any) -> None:
        super().__init__(prompt, rule, seed)
        self.model = model.requires_grad_(False)
        self._moving = False

    def moved(self, stage: AnyDescent) -> dict[str, nn.Parameter]:
        """All weights that the scores follow from, which from now on are written too."""
        moved = {f"model.{name}": weight for name, weight in weights_of(self.model).items()}
        if len(self.head_weight):
            moved |= {"head_weight": self.head_weight, "head_bias": self.head_bias}
        for parameter in moved.values():
            parameter.requires_grad_(True)
        self._moving = True
        return moved

    def written(self) -> dict[str, NDArray[Any]]:
        """What is kept of it: as of a prompt, and the weights of the model as soon as they move."""
        return super().written() | (written_weights(self.model) if self._moving else {})
