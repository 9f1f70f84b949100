"""Where a descent begins: the frozen model, a prompt artifact or a prompt of zeros, and the task as they read it."""

from __future__ import annotations

import numpy as np

from bbprompt.backends.backbone import DEFAULT_BACKBONE, Backbone, load_backbone
from bbprompt.backends.encoder import check_family
from bbprompt.backends.scale import facts_of
from bbprompt.backends.smollm2 import SMOLLM2
from bbprompt.config import NAMED_PROMPTS, NO_PROMPTS, MethodConfig, TuneConfig
from bbprompt.descent_settings import GradientConfig, SoftPromptConfig
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.frozen import written_out
from bbprompt.possible import check_form
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.random_projection import placeholders_for
from bbprompt.tasks.task import Task
from bbprompt.texts.ppt import in_pattern

__all__ = ["start_of"]

#: Standard deviation of the first weights of an answer head from scratch, as BERT begins one.
_HEAD_STD = 0.02


def start_of(
    config: TuneConfig, method: MethodConfig, settings: GradientConfig, task: Task, options: int
) -> tuple[Backbone, ModularPrompt, Task]:
    """The model, where the descent begins, and the task with its texts as the method writes them.

    Args:
        config: Of the run.
        method: Its method.
        settings: The method's descent.
        task: Whose texts are written.
        options: Most options that an example has.

    Raises:
        UsageError: No prompts are named where some are needed, or the other way round, or they are of another kind or
            were pre-trained in another form; or the task cannot be written in the method's.
        ArtifactError: They cannot be loaded, or an answer head is of another model.
    """
    name = config.prompts or method.prompts
    if settings.soft is not None:
        if name != NO_PROMPTS:
            raise UsageError(f"--prompts {name}: the method {method.name} begins from scratch; leave it out")
        check_form(method, task, options, name, None)
        backbone, prompt = _from_scratch(config, settings.soft, settings.model is not None)
    else:
        if name in (NAMED_PROMPTS, NO_PROMPTS):
            made = f" (`bbprompt pretrain {settings.start}` makes one)" if settings.start else ""
            raise UsageError(f"--method {method.name}: begins with a prompt artifact; name it with --prompts{made}")
        prompt = ModularPrompt.load(resolve_prompts(name))
        if settings.start is not None and prompt.config.kind != settings.start:
            raise UsageError(
                f"--prompts {name}: of the kind {prompt.config.kind}, but the method {method.name} begins with one of "
                f"the kind {settings.start}"
            )
        check_form(method, task, options, name, prompt.config)
        model = config.backbone or prompt.config.backbone
        backbone = load_backbone(model, head=prompt.config.readout == "verbalizer")
    if settings.form is not None:
        task = in_pattern(task, settings.form, causal=backbone.head is not None and backbone.head.causal)
    return backbone, prompt, task


def _from_scratch(config: TuneConfig, soft: SoftPromptConfig, whole: bool) -> tuple[Backbone, ModularPrompt]:
    """The model and a prompt of zeros, with the answer head of another artifact where there is one.

    Args:
        config: Of the run.
        soft: The prompt.
        whole: Whether the model itself will be tuned.
    """
    spans = soft.readout == "span"
    head = ModularPrompt.load(resolve_prompts(soft.head)) if spans and soft.head is not None else None
    name = config.backbone or (head.config.backbone if head is not None else DEFAULT_BACKBONE)
    backbone = _encoder(name) if whole else load_backbone(name, head=soft.readout == "verbalizer")
    if head is not None and head.config.backbone_digest != backbone.digest:
        fix = "; --set gradient.soft.head=null takes a head from scratch" if whole else ""
        raise ArtifactError(
            f"gradient.soft.head: '{soft.head}' was trained for {head.config.backbone}, not for {backbone.id}{fix}"
        )
    facts = facts_of(backbone)
    layers = 1 if soft.layers == "input" else backbone.layers
    zeros = np.zeros((layers, soft.prompt_length, backbone.hidden), dtype=np.float32)
    rows = 2 if spans else 0
    fresh = np.random.default_rng(config.seed).normal(0, _HEAD_STD, (rows, backbone.hidden)), np.zeros(rows)
    weights = (head.head_weight, head.head_bias) if head is not None else fresh
    places = placeholders_for(facts.vocabulary, soft.prompt_length, soft.placeholder, soft.repeat)
    return backbone, written_out(zeros, places, weights, (backbone.id, backbone.digest), soft.readout, soft.pooling)[0]


def _encoder(name: str) -> Backbone:
    """A model whose weights can be tuned here."""
    refused = f"--backbone {name}: only encoders of the BERT family are tuned themselves"
    if name == SMOLLM2:
        raise ArtifactError(f"{refused} (a language model)")
    backbone = load_backbone(name)
    try:
        check_family(backbone.model)
    except ArtifactError as error:
        raise ArtifactError(f"{refused} ({error})") from None
    return backbone
