"""PPT's pattern-verbalizer pairs in two languages, for texts to pre-train on and for tasks alike.

A pattern is a text with a gap, behind the soft prompt (Gu et al. 2022, arXiv:2109.04332, equations 3 to 5 and the
tables of their appendix). `in_pattern` gives a task such a text as its `cloze`, so whatever reads tasks reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from bbprompt.errors import UsageError
from bbprompt.tasks.task import Task
from bbprompt.texts.forms import listed
from bbprompt.yamlfile import validate

__all__ = ["Format", "Language", "Pattern", "format_of", "in_pattern", "label_words", "language_of"]

#: What kind of text; a prompt is pre-trained for each.
Format = Literal["pair", "choice", "single"]
Language = Literal["zh", "en"]
#: "plain" and "hybrid", which adds a hard prompt, go by the type of a task; "unified" makes all of them choices.
Pattern = Literal["plain", "hybrid", "unified"]

_WORDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("pair", "en"): ("no", "maybe", "yes"),
    ("pair", "zh"): ("矛盾", "中立", "相似"),
    ("single", "en"): ("terrible", "bad", "maybe", "good", "great"),
    ("single", "zh"): ("差", "不好", "一般", "好", "赞"),
    ("choice", "en"): tuple("ABCDEFGHIJKLMNOP"),
    ("choice", "zh"): (*"一二三四五六七八九十", *(f"十{digit}" for digit in "一二三四五六")),
}
_SENTIMENTS = {2: (0, 4), 3: (0, 2, 4), 4: (0, 1, 3, 4), 5: (0, 1, 2, 3, 4)}

# (plain, hybrid with a hard prompt); {options} is the list of lettered options.
_PATTERNS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("pair", "en"): ("{text_a} {gap} .{text_b}", "Question: {text_a} ? {gap}. {text_b}"),
    ("pair", "zh"): ("{text_a}{gap}。{text_b}", "问题：{text_a}？{gap}。{text_b}"),
    ("choice", "en"): ("{query}? {options} Answer is {gap}.", "We ask {query} ? {options} The answer is {gap}."),
    ("choice", "zh"): ("{query}？{options}。答案是{gap}。", "问题：{query}？{options}。答案是：{gap}。"),
    ("single", "en"): ("{text}. {gap}.", "{text}. It was {gap}."),
    ("single", "zh"): ("{text}。{gap}。", "{text}。这很{gap}。"),
}
# A causal model reads only what stands before the gap, so the second text goes there (ours).
_CAUSAL_PAIRS: Mapping[str, tuple[str, str]] = {
    "en": ("{text_a}. {text_b} {gap}.", "Question: {text_a} ? {text_b} {gap}."),
    "zh": ("{text_a}。{text_b}{gap}。", "问题：{text_a}？{text_b}{gap}。"),
}
_LISTINGS: Mapping[str, tuple[str, str]] = {
    "en": ("{letter}.{option}. ", "{letter}. {option}. "),
    "zh": ("{letter}、{option} ", "{letter}、{option} "),
}
# Between the fields of a query or a text of several; the paper joins them, its code by a semicolon.
_JOINTS: Mapping[str, str] = {"en": "; ", "zh": "；"}


def label_words(form: Format, language: Language, count: int | None = None) -> tuple[str, ...]:
    """Label words in label order.

    Args:
        form: The format.
        language: Of the texts.
        count: Number of labels; None for all. Pairs of two labels take the outer words (no, yes); two to four
            sentiments take a subset of the five; options are numbered from the first.

    Raises:
        ValueError: There are not that many words.
    """
    words = _WORDS[form, language]
    count = len(words) if count is None else count
    if not 2 <= count <= len(words):
        raise ValueError(f"{count} labels: the format {form} has words for 2 to {len(words)}")
    if form == "pair" and count == 2:
        return words[0], words[2]
    if form == "single":
        return tuple(words[i] for i in _SENTIMENTS[count])
    return words[:count]


def format_of(task: Task, pattern: Pattern) -> Format:
    """The format that a pattern puts a task in.

    Raises:
        UsageError: The task asks for an answer in a context, for which there is none.
    """
    if task.type == "extractive":
        raise UsageError(
            f"task {task.name}: PPT's patterns have no gap for an answer that lies in a context; choose a method and "
            "--prompts with a span readout"
        )
    return "choice" if pattern == "unified" else task.type


def language_of(task: Task) -> Language:
    """The language of a task's patterns.

    Raises:
        UsageError: There are none in it.
    """
    languages: dict[str, Language] = {"zh": "zh", "en": "en"}
    language = languages.get(task.language.partition("-")[0].lower())
    if language is None:
        raise UsageError(f"task {task.name}: PPT's patterns are in zh and en; language is {task.language!r}")
    return language


def in_pattern(task: Task, pattern: Pattern, *, causal: bool = False) -> Task:
    """The task with a pattern as its cloze, and the words that may fill the gap.

    A pair of two or three labels has PPT's words where they are its options or `same` says which label is which. Else
    the words are the task's own, its `gap_words`. In the unified format they are letters, and the options stand in the
    text: those of a pair from no to yes (3.3).

    Args:
        task: Any task but an extraction.
        pattern: Which one.
        causal: For a model that reads only what stands before the gap.

    Raises:
        UsageError: The pattern cannot hold the task: its type, language, fields or number of options.
    """
    form, language = format_of(task, pattern), language_of(task)
    hard = pattern == "hybrid"
    text = (_CAUSAL_PAIRS[language] if causal and form == "pair" else _PATTERNS[form, language])[hard]
    if form == "pair" and set(task.field_names) != {"text_a", "text_b"}:
        raise UsageError(f"task {task.name}: PPT's pattern of a pair holds text_a and text_b and no other field")
    fields = _JOINTS[language].join(f"{{{name}}}" for name in task.field_names)
    slots, listing, words = {"query": fields, "text": fields}, None, _own_words(task, language)
    if task.type == "choice":
        words, listing = label_words("choice", language), _LISTINGS[language][hard]
    elif form == "choice":
        slots["options"], words = _lettered(task, words if task.type == "pair" else task.options, language)
    cloze = re.sub(r"\{(\w+)\}", lambda slot: slots.get(slot[1], slot[0]), text)
    labels = task.labels or map(str, range(len(words)))
    changes = {"cloze": cloze, "words": dict(zip(labels, words, strict=True)), "listing": listing}
    return validate(Task, task.model_dump() | changes, f"task {task.name}")


def _lettered(task: Task, options: Sequence[str], language: Language) -> tuple[str, Sequence[str]]:
    """Options of a labelled task as they stand in the unified format, and the letter of each label."""
    most = len(_WORDS["choice", language])
    if len(options) > most:
        raise UsageError(
            f"task {task.name}: PPT's unified format has letters for {most} options, not for {len(options)}; choose "
            "another method"
        )
    letters = label_words("choice", language, len(options))
    rank = {word: place for place, word in enumerate(label_words("pair", language))}
    order = sorted(options, key=rank.__getitem__) if rank.keys() >= set(options) else list(options)
    shown = listed(_LISTINGS[language][0], letters, order).replace("{", "{{").replace("}", "}}")
    return shown, [letters[order.index(option)] for option in options]


def _own_words(task: Task, language: Language) -> Sequence[str]:
    """Label words in label order."""
    if task.type == "pair" and len(task.labels) <= 3:
        words = label_words("pair", language, len(task.labels))
        if set(task.options) == set(words):
            return task.options
        if task.same is not None:
            return words if task.same == list(task.labels)[-1] else words[::-1]
    return task.gap_words
