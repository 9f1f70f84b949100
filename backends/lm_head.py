"""The language model head of a stock model, split so that only the rows of the words in question are computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class LanguageHead:
    """From a last state to the logit of a token: transform, then one row of the output matrix.

    Attributes:
        transform: What comes before the output matrix; the identity for all but masked models.
        weight: `(V, H)`; of a head with `tokens` `(E, H)`.
        bias: `(V,)` or `(E,)`, or None.
        kind: What its states are of.
        tokens: Ids `(E,)` of the only tokens that the head can name, ascending; None for the whole vocabulary.
        rows: Then V.
    """

    transform: nn.Module
    weight: Tensor
    bias: Tensor | None
    kind: HeadKind
    tokens: Tensor | None = None
    rows: int = 0

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
        return LanguageHead(transform, self.weight.to(device, torch.float32), bias, self.kind, tokens, self.rows)

    def logits(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Logit of one token for each feature: `(..., N, H)` and `(N,)` to `(..., N)`; all must be nameable."""
        if self.tokens is not None:
            tokens = torch.searchsorted(self.tokens, tokens.contiguous())
        values = (features * self.weight[tokens]).sum(-1)
        return values if self.bias is None else values + self.bias[tokens]

    def vocabulary(self, features: Tensor) -> Tensor:
        """Log-probability of every token for each feature: `(..., H)` to `(..., V)`.

        Minus infinity for a token that the head cannot name.
        """
        logs = torch.log_softmax(nn.functional.linear(features, self.weight, self.bias), dim=-1)
        if self.tokens is None:
            return logs
        return logs.new_full((*logs.shape[:-1], self.rows), -torch.inf).index_copy(-1, self.tokens, logs)


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

    Raises:
        ArtifactError: A masked model whose head is built otherwise than BERT's, RoBERTa's or ELECTRA's.
    """
    output = model.get_output_embeddings()
    weight = output.weight.detach()
    bias = None if output.bias is None else output.bias.detach()
    if getattr(model.config, "scale_decoder_outputs", False):  # T5, not its versions from 1.1 on and not mT5
        weight = weight * model.config.d_model**-0.5
    if kind != "masked":
        return LanguageHead(nn.Identity(), weight, bias, kind)
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
    return LanguageHead(transform, weight, bias, kind)
