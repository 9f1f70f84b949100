"""Whether a method can do a task, as far as their settings tell: before any data are read or a model is loaded.

A run asks this as it opens what it needs, a sweep of its whole grid before the first run.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ValidationError

from bbprompt.baselines.choice import check_task
from bbprompt.config import MethodConfig
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.oracle import ReadoutKind
from bbprompt.prompts import PromptConfig, bundled_prompts, read_config
from bbprompt.tasks.task import Task
from bbprompt.texts.forms import check_readout
from bbprompt.texts.ppt import Format, Language, format_of, in_pattern, language_of

__all__ = ["check_form", "check_graded", "check_loss", "check_possible", "check_router", "known_prompts"]

_ENUMERATED = 16  # entries of a router, all of whose 2^16 settings can still be listed


class _Trained(BaseModel):
    """What of its texts the recipe of a PPT prompt says, see `bbprompt.pretrain.recipe.PptSettings`."""

    formats: list[Format]
    language: Language
    hybrid: bool
    options: tuple[int, int]


def known_prompts(name: str) -> PromptConfig | None:
    """The settings of an artifact; None where it is not here, or not yet, or damaged: its run will say so."""
    path = Path(name) if Path(name).is_dir() else bundled_prompts().get(name)
    try:
        return None if path is None else read_config(path)
    except ArtifactError:
        return None


def check_possible(method: MethodConfig, task: Task, name: str, prompts: PromptConfig | None) -> None:
    """Refuse a task that a method cannot do.

    Args:
        method: With the changes of `--set`.
        task: The task.
        name: Of the prompts that it begins with.
        prompts: Their settings; None where it has none, or they are not known.

    Raises:
        UsageError: It cannot; the message is that of the run.
    """
    if method.baseline is not None:
        check_task(method.baseline, task)
        return
    check_loss(method, task)
    check_form(method, task, len(task.options), name, prompts)
    if method.gradient is not None and method.gradient.form is not None:
        in_pattern(task, method.gradient.form)
    if prompts is not None:
        check_router(method, prompts)
    own = method.own_prompt or prompts
    if own is not None:
        check_readout(task, own.readout)
        check_graded(method, task, own.readout)


def check_loss(method: MethodConfig, task: Task) -> None:
    """Refuse a loss over options where there are none.

    Raises:
        UsageError: It is so.
    """
    if method.loss == "hinge" and task.type == "extractive":
        raise UsageError(f"--set loss=hinge: the task {task.name} has no options to keep apart; use loss=ce")


def check_router(method: MethodConfig, prompts: PromptConfig) -> None:
    """Refuse to list all routers where there are too many.

    Raises:
        UsageError: It is so.
    """
    entries = prompts.layers * prompts.modules
    if method.router is not None and method.router.optimizer == "enumerate" and entries > _ENUMERATED:
        raise UsageError(
            f"--set router.optimizer=enumerate: takes at most {_ENUMERATED} router entries, these prompts have "
            f"{entries}; take bo, or prompts at the input alone"
        )


def check_graded(method: MethodConfig, task: Task, readout: ReadoutKind) -> None:
    """Refuse a descent on pairs of texts that are compared with each other.

    Raises:
        UsageError: It is one.
    """
    if method.gradient is not None and readout == "prototype" and task.same is not None:
        raise UsageError(
            f"--method {method.name}: under prototypes the task {task.name} compares texts by a threshold that no "
            "gradient here fits; use prompts with a span head"
        )


def check_form(method: MethodConfig, task: Task, options: int, name: str, prompts: PromptConfig | None) -> None:
    """See that words in a gap are read where a descent writes PPT's patterns, and as its prompts were pre-trained.

    Args:
        method: Looked at where it has a `gradient.form`.
        task: Whose texts are written.
        options: Most options that an example has, as far as that is known.
        name: Of the prompts that it begins with.
        prompts: Their settings; None where it has none, or they are not known.

    Raises:
        UsageError: They are not; names what differs and what to add or to pre-train.
    """
    settings = method.gradient
    if settings is None or settings.form is None:
        return
    if settings.soft is not None:
        if settings.soft.readout != "verbalizer":
            raise UsageError(
                f"--set gradient.form={settings.form}: writes texts with a gap for a word, which a "
                f"{settings.soft.readout} readout does not fill; add --set gradient.soft.readout=verbalizer and "
                "--backbone"
            )
        return
    if prompts is None:
        return
    if prompts.readout != "verbalizer":
        raise UsageError(
            f"--prompts {name}: a {prompts.readout} readout fills no gap in a text, so --method {method.name} "
            'has no place for its pattern; name prompts that were pre-trained with readout: "verbalizer", or take '
            "--method ppt, whose texts hold question and options"
        )
    if prompts.kind != "ppt":
        return
    try:
        trained = _Trained.model_validate(prompts.training["recipe"]["ppt"])
    except (KeyError, TypeError, ValidationError):
        raise UsageError(
            f"--prompts {name}: do not say in which form they were pre-trained, and --method {method.name} writes a "
            "form of its own; name prompts that `bbprompt pretrain ppt` made"
        ) from None
    form, language = format_of(task, settings.form), language_of(task)
    count = options if form == "choice" else 0
    wrong = {
        "formats": (trained.formats, [form], form not in trained.formats),
        "language": (trained.language, language, trained.language != language),
        # A hard prompt may be added to what was pre-trained, but not left out.
        "hybrid": (trained.hybrid, False, trained.hybrid and settings.form != "hybrid"),
        "options": (list(trained.options), [2, count], count > trained.options[1]),
    }
    for key, (held, wanted, differs) in wrong.items():
        if differs:
            raise UsageError(
                f"--prompts {name}: pre-trained with ppt.{key}: {json.dumps(held)}, but --method {method.name} writes "
                f"the task {task.name} as with ppt.{key}: {json.dumps(wanted)}; name prompts that were pre-trained so"
            )
