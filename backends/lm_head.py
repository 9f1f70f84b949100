"""The language model head of a stock model, split so that only the rows of the words in question are computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from bbprompt.errors import ArtifactError

__all__ = ["HeadKind", "LanguageHead", "head_of", "kind_of", "lacks_head"]

#: How a model was taught to fill a gap: at a mask in the text; by going on where the text ends; by a decoder that is
#: told the gap's sentinel.
HeadKind = Literal["masked", "causal", "sentinel"]

#: Encoder-decoders whose decoder fills a sentinel in the encoder's text.
_SENTINEL_FAMILY = ("t5", "mt5")
#: Parts of the names of the head's tensors in BERT, RoBERTa and ELECTRA.
_PARTS = ("cls.predictions", "lm_head", "generator_predictions")
#: By the beginning of a model type: the key of config.json that all logits are multiplied with, to this power.
_FACTORS = {
    "cohere": ("logit_scale", 1),
    "falcon_h1": ("lm_head_multiplier", 1),
    "granite": ("logits_scaling", -1),
    "hyperclovax": ("logits_scaling", 1),
}
#: Keys of config.json that bound the logits, in Gemma 2 and its kin and in RecurrentGemma.
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True, slots=True)
class LanguageHead:
    """From a last state to the logit of a token: transform, then one row of the output matrix.

    A factor that the model multiplies its logits with is in the matrix and its bias.

    Attributes:
        transform: What comes before the output matrix; the identity for all but masked models and decoders of their
            families.
        weight: `(V, H)`; of a head with `tokens` `(E, H)`.
        bias: `(V,)` or `(E,)`, or None.
        kind: What its states are of.
        tokens: Ids `(E,)` of the only tokens that the head can name, ascending; None for the whole vocabulary.
        rows: Then V.
        cap: Bound c of a logit x, which becomes c tanh(x / c); None for none.
    """

    transform: nn.Module
    weight: Tensor
    bias: Tensor | None
    kind: HeadKind
    tokens: Tensor | None = None
    rows: int = 0
    cap: float | None = None

    @property
    def causal(self) -> bool:
        """Whether the gap is the end of the text."""
        return self.kind == "causal"

    @property
    def whole_words(self) -> bool:
        """Whether a word may fill several places; otherwise its first token stands for it."""
        return self.kind == "masked"

    def to(self, device: torch.device) -> LanguageHead:
        """The same in float32 on a device."""
        bias = None if self.bias is None else self.bias.to(device, torch.float32)
        transform = self.transform.to(device, torch.float32)
        tokens = None if self.tokens is None else self.tokens.to(device)
        weight = self.weight.to(device, torch.float32)
        return replace(self, transform=transform, weight=weight, bias=bias, tokens=tokens)

    def logits(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Logit of one token for each feature: `(..., N, H)` and `(N,)` to `(..., N)`; all must be nameable."""
        if self.tokens is not None:
            tokens = torch.searchsorted(self.tokens, tokens.contiguous())
        values = (features * self.weight[tokens]).sum(-1)
        return self._capped(values if self.bias is None else values + self.bias[tokens])

    def vocabulary(self, features: Tensor) -> Tensor:
        """Log-probability of every token for each feature: `(..., H)` to `(..., V)`.

        Minus infinity for a token that the head cannot name.
        """
        values = self._capped(nn.functional.linear(features, self.weight, self.bias))
        logs = torch.log_softmax(values, dim=-1)
        if self.tokens is None:
            return logs
        return logs.new_full((*logs.shape[:-1], self.rows), -torch.inf).index_copy(-1, self.tokens, logs)

    def _capped(self, values: Tensor) -> Tensor:
        return values if self.cap is None else self.cap * torch.tanh(values / self.cap)


def kind_of(config: dict[str, Any]) -> HeadKind | None:
    """How a model of this configuration fills a gap; None where it does not, or not in a way that is known here."""
    kind = config["model_type"]
    if kind in _SENTINEL_FAMILY:
        return "sentinel"
    if config.get("is_encoder_decoder"):
        return None
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (
        config.get("is_decoder") and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        return "masked"
    return "causal" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def lacks_head(names: Iterable[str]) -> bool:
    """Whether a masked model with tensors of these names was saved without its head."""
    return not any(part in name for name in names for part in _PARTS)


def head_of(model: Any, kind: HeadKind) -> LanguageHead:
    """The head of a stock `...ForMaskedLM`, `...ForCausalLM` or T5 `...ForConditionalGeneration` model.

    What is not known of a model here is left out; that nothing was is for `families.check_model` to see.

    Raises:
        ArtifactError: The head has no single output matrix, or is that of a masked model and built otherwise than
            BERT's, RoBERTa's or ELECTRA's.
    """
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise ArtifactError(
            f"backbone of type '{model.config.model_type}': its language model head has no single output matrix; use "
            "another --backbone"
        )
    weight: Tensor = output.weight.detach()
    bias: Tensor | None = None if output.bias is None else output.bias.detach()
    factor = _factor(model.config)
    if factor != 1.0:  # a copy of the matrix, which the model may share with its embeddings
        weight, bias = weight * factor, None if bias is None else bias * factor
    caps = [cap for cap in (getattr(model.config, key, None) for key in _CAPS) if cap]
    return LanguageHead(_transform(model, kind), weight, bias, kind, cap=float(caps[0]) if caps else None)


def _factor(config: Any) -> float:
    """What a model multiplies all its logits with, by config.json."""
    if getattr(config, "scale_decoder_outputs", False):  # T5, not its versions from 1.1 on and not mT5
        return float(config.d_model**-0.5)
    for kind, (key, power) in _FACTORS.items():
        if config.model_type.startswith(kind) and hasattr(config, key):
            return float(getattr(config, key) ** power)
    return 1.0


def _transform(model: Any, kind: HeadKind) -> nn.Module:
    """What comes before the output matrix."""
    predictions: Any = getattr(getattr(model, "cls", None), "predictions", None)
    if hasattr(predictions, "transform"):
        found: nn.Module = predictions.transform
        return found
    if hasattr(getattr(model, "lm_head", None), "layer_norm"):
        return nn.Sequential(model.lm_head.dense, nn.GELU(), model.lm_head.layer_norm)
    if hasattr(model, "generator_predictions"):
        own = model.generator_predictions
        return nn.Sequential(own.dense, nn.GELU(), own.LayerNorm)
    if kind == "masked":
        raise ArtifactError(
            f"backbone of type '{model.config.model_type}': its masked language model head is not known; use BERT, "
            "RoBERTa, ELECTRA or the like"
        )
    return nn.Identity()
