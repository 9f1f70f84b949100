"""Where a descent begins: the frozen model, and a prompt artifact or a prompt of zeros."""

from __future__ import annotations

import numpy as np

from bbprompt.backends.backbone import DEFAULT_BACKBONE, Backbone, load_backbone
from bbprompt.backends.scale import facts_of
from bbprompt.config import NAMED_PROMPTS, NO_PROMPTS, MethodConfig, TuneConfig
from bbprompt.connect import named_language_model
from bbprompt.descent_settings import GradientConfig, SoftPromptConfig
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.frozen import written_out
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.random_projection import placeholders_for

__all__ = ["start_of"]


def start_of(config: TuneConfig, method: MethodConfig, settings: GradientConfig) -> tuple[Backbone, ModularPrompt]:
    """The model, and where the descent begins.

    Raises:
        UsageError: No prompts are named where some are needed, or the other way round, or they are of another kind.
        ArtifactError: They cannot be loaded, or an answer head is of another model.
    """
    name = config.prompts or method.prompts
    if settings.soft is not None:
        if name != NO_PROMPTS:
            raise UsageError(f"--prompts {name}: the method {method.name} begins from scratch; leave it out")
        return _from_scratch(config, method, settings.soft)
    if name in (NAMED_PROMPTS, NO_PROMPTS):
        made = f" (`bbprompt pretrain {settings.start}` makes one)" if settings.start else ""
        raise UsageError(f"--method {method.name}: begins with a prompt artifact; name it with --prompts{made}")
    prompt = ModularPrompt.load(resolve_prompts(name))
    if settings.start is not None and prompt.config.kind != settings.start:
        raise UsageError(
            f"--prompts {name}: of the kind {prompt.config.kind}, but the method {method.name} begins with one of the "
            f"kind {settings.start}"
        )
    model = config.backbone or prompt.config.backbone
    return load_backbone(model, head=prompt.config.readout == "verbalizer"), prompt


def _from_scratch(config: TuneConfig, method: MethodConfig, soft: SoftPromptConfig) -> tuple[Backbone, ModularPrompt]:
    """The model and a prompt of zeros, with the answer head of another artifact where there is one."""
    spans = soft.readout == "span"
    head = ModularPrompt.load(resolve_prompts(soft.head)) if spans and soft.head is not None else None
    if soft.readout == "verbalizer":
        named_language_model(config.backbone)
    name = config.backbone or (head.config.backbone if head is not None else DEFAULT_BACKBONE)
    backbone = load_backbone(name, head=soft.readout == "verbalizer")
    if head is not None and head.config.backbone_digest != backbone.digest:
        raise ArtifactError(
            f"gradient.soft.head: '{soft.head}' was trained for {head.config.backbone}, not for {backbone.id}"
        )
    facts = facts_of(backbone)
    layers = 1 if soft.layers == "input" else backbone.layers
    zeros = np.zeros((layers, soft.prompt_length, backbone.hidden), dtype=np.float32)
    none = np.zeros((0, backbone.hidden), dtype=np.float32), np.zeros(0, dtype=np.float32)
    weights = (head.head_weight, head.head_bias) if head is not None else none
    places = placeholders_for(facts.vocabulary, soft.prompt_length, soft.placeholder, soft.repeat)
    return backbone, written_out(zeros, places, weights, (backbone.id, backbone.digest), soft.readout, soft.pooling)[0]
