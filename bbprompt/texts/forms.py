"""How an example is put to a model, by the readout that the model is asked through.

Span heads read the text with its options behind it (`Task.render`). Embedding models get the bare texts, their
options apart: nothing is asked. Models with a language model head get a cloze text with a gap.
"""

from __future__ import annotations

from collections.abc import Sequence

from bbprompt.errors import UsageError
from bbprompt.oracle import ReadoutKind
from bbprompt.tasks.example import Example, Form, Part
from bbprompt.tasks.task import Task, parse_template

#: What stands for the options of a multiple choice in its text and in the gap, where its task does not say.
_LETTERS = tuple("ABCDEFGHIJKLMNOP")
_LISTING = "{letter}、{option}；"

__all__ = ["check_readout", "cloze_form", "embed_form", "listed", "write"]


def write(task: Task, example: Example, readout: ReadoutKind) -> Form:
    """Write `example` out for a readout.

    Raises:
        UsageError: The readout cannot serve tasks of this type.
    """
    check_readout(task, readout)
    if readout == "span":
        return task.render(example)
    return embed_form(task, example) if readout == "prototype" else cloze_form(task, example)


def check_readout(task: Task, readout: ReadoutKind) -> None:
    """Refuse a readout of options for answers that lie in a context.

    Raises:
        UsageError: It is one.
    """
    if readout != "span" and task.type == "extractive":
        raise UsageError(
            f"task {task.name}: a {readout} readout cannot find answers in a context; "
            "choose --prompts with a span readout"
        )


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
    multiple choice lists its options behind letters where `{options}` stands, else at the end, and a letter fills the
    gap (PPT, section 3.2.2); the letters are the task's `words`, else the first 16.

    Raises:
        UsageError: A multiple choice of more options than there are letters.
    """
    cut, words, shown = task.cut_fields, task.gap_words, ""
    if task.type == "choice":
        letters = task.gap_words or _LETTERS
        if len(example.options) > len(letters):
            raise UsageError(
                f"task {task.name}: a gap takes at most {len(letters)} options, an example has {len(example.options)}"
            )
        words = letters[: len(example.options)]
        shown = listed(task.listing or _LISTING, words, example.options)
    template = pattern or task.cloze or _bare(task.template)
    parts: list[Part] = []
    gap = -1
    for literal, name in parse_template(template):
        if literal:
            parts.append(Part(literal, cut=False))
        if name == "gap":
            gap = len(parts)
        elif name == "options" and shown:
            parts.append(Part(shown, cut=False))
            shown = ""
        elif name == "text" and name not in example.fields:
            parts += _fields(task, example)
        elif name is not None:
            parts.append(Part(example.fields[name], cut=name in cut))
    if shown:
        parts.append(Part(f"？{shown}答案是", cut=False))
        gap = len(parts)
    return Form(tuple(parts), words, -1, gap=len(parts) if gap < 0 else gap)


def listed(listing: str, letters: Sequence[str], options: Sequence[str]) -> str:
    """Options behind their letters, each as `listing` has it, without white space at the end."""
    pieces = parse_template(listing)
    each = [{"letter": a, "option": b} for a, b in zip(letters, options, strict=True)]
    return "".join(literal + (names[name] if name else "") for names in each for literal, name in pieces).rstrip()


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
