"""How an example is put to a model, by the readout that the model is asked through.

Span heads read the text with its options behind it (`Task.render`). Embedding models get the bare texts, their
options apart: nothing is asked. Models with a language model head get a cloze text with a gap.
"""

from __future__ import annotations

from bbprompt.errors import UsageError
from bbprompt.oracle import ReadoutKind
from bbprompt.tasks.example import Example, Form, Part
from bbprompt.tasks.task import Task, parse_template

#: What stands for the options of a multiple choice in its text and in the gap (PPT, table 2).
_LETTERS = "ABCDEFGHIJKLMNOP"

__all__ = ["cloze_form", "embed_form", "write"]


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
    return embed_form(task, example) if readout == "prototype" else cloze_form(task, example)


def embed_form(task: Task, example: Example) -> Form:
    """The bare fields of an example, for an embedding.

    A pair whose task says which label means `same` is two texts that are compared; every other text is the fields
    in the order of the template, joined by a comma, and is compared with its options.
    """
    if task.same is not None:
        both = tuple(Part(example.fields[name], cut=True) for name in ("text_a", "text_b"))
        return Form(both, example.options, -1, second=1, same=list(task.labels).index(task.same))
    parts = _fields(task, example)
    pattern = task.prototype or "{option}。"
    options = example.options if task.type == "choice" else tuple(_filled(pattern, word) for word in example.options)
    return Form(tuple(parts), options, -1)


def cloze_form(task: Task, example: Example, pattern: str | None = None) -> Form:
    """An example as a text with a gap that an option word fills (pattern and verbalizer).

    The text is `pattern`, in which `{text}` stands for all fields where no field is called so; else `cloze` of the
    task; else its template up to the last question mark ("…的情感是？选项：" becomes "…的情感是" and the gap). A
    multiple choice lists its options behind letters, and a letter fills the gap (PPT, section 3.1); at most 16 of them.

    Raises:
        UsageError: A multiple choice of more than 16 options.
    """
    cut = task.cut_fields
    template = pattern or task.cloze or _bare(task.template)
    parts: list[Part] = []
    gap = -1
    for literal, name in parse_template(template):
        if literal:
            parts.append(Part(literal, cut=False))
        if name == "gap":
            gap = len(parts)
        elif name == "text" and name not in example.fields:
            parts += _fields(task, example)
        elif name is not None:
            parts.append(Part(example.fields[name], cut=name in cut))
    words = tuple(task.words.values()) or example.options
    if task.type == "choice":
        if len(words) > len(_LETTERS):
            raise UsageError(
                f"task {task.name}: a gap takes at most {len(_LETTERS)} options, an example has {len(words)}"
            )
        listed = "".join(f"{letter}、{word}；" for letter, word in zip(_LETTERS, words, strict=False))
        parts.append(Part(f"？{listed}答案是", cut=False))
        words, gap = tuple(_LETTERS[: len(words)]), len(parts)
    return Form(tuple(parts), words, -1, gap=len(parts) if gap < 0 else gap)


def _fields(task: Task, example: Example) -> list[Part]:
    """The fields in the order of the template, joined by a comma."""
    parts: list[Part] = []
    for name in task.field_names:
        if parts:
            parts.append(Part("，", cut=False))
        parts.append(Part(example.fields[name], cut=name in task.cut_fields))
    return parts


def _bare(template: str) -> str:
    """A template without the question mark that asks for options, and what follows it."""
    at = max(template.rfind("？"), template.rfind("?"))
    return template[:at] if at > template.rfind("}") else template.removesuffix("选项：").rstrip("，,")


def _filled(pattern: str, word: str) -> str:
    return "".join(literal + (word if name else "") for literal, name in parse_template(pattern))
