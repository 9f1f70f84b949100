"""The language model head of a stock model, split so that only the rows of the words in question are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bbprompt.errors import ArtifactError

__all__ = ["LanguageHead", "head_of"]


@dataclass(frozen=True, slots=True)
class LanguageHead:
    """From a last state to the logit of a token: transform, then one row of the output matrix.

    Attributes:
        transform: What comes before the output matrix; the identity for causal models.
        weight: `(V, H)`.
        bias: `(V,)`, or None.
        causal: Whether a state tells the token behind it, not the token at it.
    """

    transform: nn.Module
    weight: Tensor
    bias: Tensor | None
    causal: bool

    def to(self, device: torch.device) -> LanguageHead:
        """The same in float32 on a device."""
        bias = None if self.bias is None else self.bias.to(device, torch.float32)
        transform = self.transform.to(device, torch.float32)
        return LanguageHead(transform, self.weight.to(device, torch.float32), bias, self.causal)

    def logits(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Logit of one token for each feature: `(..., E, H)` and `(E,)` to `(..., E)`."""
        values = (features * self.weight[tokens]).sum(-1)
        return values if self.bias is None else values + self.bias[tokens]

    def vocabulary(self, features: Tensor) -> Tensor:
        """Log-probability of every token for each feature: `(..., H)` to `(..., V)`."""
        return torch.log_softmax(nn.functional.linear(features, self.weight, self.bias), dim=-1)


def head_of(model: Any, causal: bool) -> LanguageHead:
    """The head of a stock `...ForMaskedLM` or `...ForCausalLM` model.

    Raises:
        ArtifactError: A masked model whose head is built otherwise than BERT's, RoBERTa's or ELECTRA's.
    """
    output = model.get_output_embeddings()
    weight = output.weight.detach()
    bias = None if output.bias is None else output.bias.detach()
    if causal:
        return LanguageHead(nn.Identity(), weight, bias, causal=True)
    if hasattr(model, "cls"):
        transform = model.cls.predictions.transform
    elif hasattr(model, "lm_head") and hasattr(model.lm_head, "layer_norm"):
        transform = nn.Sequential(model.lm_head.dense, nn.GELU(), model.lm_head.layer_norm)
    elif hasattr(model, "generator_predictions"):
        own = model.generator_predictions
        transform = nn.Sequential(own.dense, nn.GELU(), own.LayerNorm)
    else:
        raise ArtifactError(
            f"backbone of type '{model.config.model_type}': its masked language model head is not known"
        )
    return LanguageHead(transform, weight, bias, causal=False)
