"""How an example is put to a model, by the readout that the model is asked through.

Span heads read the text with its options behind it (`Task.render`). Embedding models get the bare texts, their
options apart: nothing is asked. Models with a language model head get a cloze text with a gap.
"""

from __future__ import annotations

from bbprompt.errors import UsageError
from bbprompt.example import Example, Form, Part
from bbprompt.oracle import ReadoutKind
from bbprompt.task import Task

__all__ = ["embed_form", "write"]


def write(task: Task, example: Example, readout: ReadoutKind) -> Form:
    """Write `example` out for a readout.

    Raises:
        UsageError: The readout cannot serve tasks of this type.
    """
    if readout == "span":
        return task.render(example)
    if task.type == "extractive":
        raise UsageError(
            f"task {task.name}: a {readout} readout cannot find answers in a context; "
            "choose --prompts with a span readout"
        )
    return embed_form(task, example)


def embed_form(task: Task, example: Example) -> Form:
    """The bare fields of an example, for an embedding.

    A pair whose task says which label means `same` is two texts that are compared; every other text is the fields
    in the order of the template, joined by a comma, and is compared with its options.
    """
    cut = task.cut_fields
    if task.same is not None:
        both = tuple(Part(example.fields[name], cut=True) for name in ("text_a", "text_b"))
        return Form(both, example.options, -1, second=1, same=list(task.labels).index(task.same))
    parts: list[Part] = []
    for name in task.field_names:
        if parts:
            parts.append(Part("，", cut=False))
        parts.append(Part(example.fields[name], cut=name in cut))
    return Form(tuple(parts), example.options, -1)
