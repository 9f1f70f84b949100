"""Where a descent begins: the frozen model, a prompt artifact or a prompt of zeros, and the task as they read it."""

from __future__ import annotations

import json

import numpy as np
from pydantic import ValidationError

from bbprompt.backends.backbone import DEFAULT_BACKBONE, Backbone, load_backbone
from bbprompt.backends.encoder import check_family
from bbprompt.backends.scale import facts_of
from bbprompt.backends.smollm2 import SMOLLM2
from bbprompt.config import NAMED_PROMPTS, NO_PROMPTS, MethodConfig, TuneConfig
from bbprompt.descent_settings import GradientConfig, SoftPromptConfig
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.frozen import written_out
from bbprompt.pretrain.recipe import PptSettings
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.random_projection import placeholders_for
from bbprompt.tasks.task import Task
from bbprompt.texts.ppt import Pattern, format_of, in_pattern, language_of

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
        if settings.form is not None and settings.soft.readout != "verbalizer":
            raise UsageError(
                f"--set gradient.form={settings.form}: writes texts with a gap for a word, which a "
                f"{settings.soft.readout} readout does not fill; add --set gradient.soft.readout=verbalizer and "
                "--backbone"
            )
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
        if settings.form is not None:
            _check_form(name, method, prompt, task, settings.form, options)
        model = config.backbone or prompt.config.backbone
        backbone = load_backbone(model, head=prompt.config.readout == "verbalizer")
    if settings.form is not None:
        task = in_pattern(task, settings.form, causal=backbone.head is not None and backbone.head.causal)
    return backbone, prompt, task


def _check_form(
    name: str, method: MethodConfig, prompt: ModularPrompt, task: Task, pattern: Pattern, options: int
) -> None:
    """See that prompts read words in a gap and were pre-trained in the format, the language and the options.

    Raises:
        UsageError: They were not; names what differs and what to pre-train.
    """
    if prompt.config.readout != "verbalizer":
        raise UsageError(
            f"--prompts {name}: a {prompt.config.readout} readout fills no gap in a text, so --method {method.name} "
            'has no place for its pattern; name prompts that were pre-trained with readout: "verbalizer", or take '
            "--method ppt, whose texts hold question and options"
        )
    if prompt.config.kind != "ppt":
        return
    try:
        trained = PptSettings.model_validate(prompt.config.training["recipe"]["ppt"])
    except (KeyError, TypeError, ValidationError):
        raise UsageError(
            f"--prompts {name}: do not say in which form they were pre-trained, and --method {method.name} writes a "
            "form of its own; name prompts that `bbprompt pretrain ppt` made"
        ) from None
    form, language = format_of(task, pattern), language_of(task)
    count = options if form == "choice" else 0
    wrong = {
        "formats": (trained.formats, [form], form not in trained.formats),
        "language": (trained.language, language, trained.language != language),
        # A hard prompt may be added to what was pre-trained, but not left out.
        "hybrid": (trained.hybrid, False, trained.hybrid and pattern != "hybrid"),
        "options": (list(trained.options), [2, count], count > trained.options[1]),
    }
    for key, (held, wanted, differs) in wrong.items():
        if differs:
            raise UsageError(
                f"--prompts {name}: pre-trained with ppt.{key}: {json.dumps(held)}, but --method {method.name} writes "
                f"the task {task.name} as with ppt.{key}: {json.dumps(wanted)}; name prompts that were pre-trained so"
            )


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
