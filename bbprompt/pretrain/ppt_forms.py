"""How self-supervised examples are put to a model: patterns, label words and hard prompts in two languages.

`pattern_form` writes the pattern-verbalizer pairs of PPT (Table 2 and appendix), with a gap where the label word is
predicted and the soft prompt before everything; `span_task` puts the same examples as machine reading with the options
in the text, which a model without a language-model head can answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from bbprompt.tasks.example import Example, Form, Part
from bbprompt.tasks.task import Task

__all__ = ["Format", "Language", "label_words", "pattern_form", "span_task"]

Format = Literal["pair", "choice", "single"]
Language = Literal["zh", "en"]

_GAP = "<X>"

_WORDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("pair", "en"): ("no", "maybe", "yes"),
    ("pair", "zh"): ("矛盾", "中立", "相似"),
    ("single", "en"): ("terrible", "bad", "maybe", "good", "great"),
    ("single", "zh"): ("差", "不好", "一般", "好", "赞"),
    ("choice", "en"): tuple("ABCDEFGHIJKLMNOP"),
    ("choice", "zh"): (*"一二三四五六七八九十", *(f"十{digit}" for digit in "一二三四五六")),
}
_SENTIMENTS = {2: (0, 4), 3: (0, 2, 4), 4: (0, 1, 3, 4), 5: (0, 1, 2, 3, 4)}

# (plain, hybrid with a hard prompt), behind the soft prompt; {options} is the list of lettered options.
_PATTERNS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("pair", "en"): ("{text_a} <X> .{text_b}", "Question: {text_a} ? <X>. {text_b}"),
    ("pair", "zh"): ("{text_a}<X>。{text_b}", "问题：{text_a}？<X>。{text_b}"),
    ("choice", "en"): ("{query}? {options} Answer is <X>.", "We ask {query} ? {options} The answer is <X>."),
    ("choice", "zh"): ("{query}？{options}答案是<X>。", "问题：{query}？{options}答案是：<X>。"),
    ("single", "en"): ("{text}. <X>.", "{text}. It was <X>."),
    ("single", "zh"): ("{text}。<X>。", "{text}。这很<X>。"),
}
# A causal model reads only what stands before the gap, so the second text goes there (ours).
_CAUSAL_PAIRS: Mapping[str, tuple[str, str]] = {
    "en": ("{text_a}. {text_b} <X>.", "Question: {text_a} ? {text_b} <X>."),
    "zh": ("{text_a}。{text_b}<X>。", "问题：{text_a}？{text_b}<X>。"),
}
_SPANS: Mapping[tuple[str, str], str] = {
    ("pair", "zh"): '意思判别："{text_a}"与"{text_b}"的关系是？选项：',
    ("pair", "en"): 'How does "{text_a}" relate to "{text_b}"? Options: ',
    ("choice", "zh"): '阅读选择："{query}"的下一句是？选项：',
    ("choice", "en"): 'What comes after "{query}"? Options: ',
    ("single", "zh"): '情感分析："{text}"的情感是？选项：',
    ("single", "en"): 'What is the sentiment of "{text}"? Options: ',
}


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


def pattern_form(
    form: Format,
    language: Language,
    example: Example,
    words: Sequence[str],
    *,
    hybrid: bool = False,
    causal: bool = False,
) -> Form:
    """Write an example as a text with a gap for the label word.

    Args:
        form: The format.
        language: Of the texts.
        example: Fields `text_a` and `text_b`, `query`, or `text`; a choice also has options.
        words: The label words; of a choice at least as many as it has options.
        hybrid: With the hard prompt.
        causal: For a model that reads only what stands before the gap.
    """
    patterns = _CAUSAL_PAIRS[language] if causal and form == "pair" else _PATTERNS[form, language]
    parts: list[Part] = []
    gap = -1
    for piece in re.split(r"(\{\w+\}|<X>)", patterns[hybrid]):
        if piece == _GAP:
            gap = len(parts)
        elif piece == "{options}":
            parts.append(Part(_listed(language, example.options, words, hybrid), cut=False))
        elif piece.startswith("{"):
            parts.append(Part(example.fields[piece[1:-1]], cut=True))
        elif piece:
            parts.append(Part(piece, cut=False))
    count = len(example.options) if form == "choice" else len(words)
    return Form(tuple(parts), tuple(words[:count]), -1, gap=gap)


def _listed(language: Language, options: Sequence[str], words: Sequence[str], hybrid: bool) -> str:
    """Options behind their words."""
    pairs = list(zip(words, options, strict=False))
    if language == "zh":
        return " ".join(f"{word}、{option}" for word, option in pairs) + "。"
    dot = ". " if hybrid else "."
    return " ".join(f"{word}{dot}{option}." for word, option in pairs)


def span_task(form: Format, language: Language, words: Sequence[str] = (), source: str = "") -> Task:
    """The format as a task of machine reading: options in the text, the answer is a span.

    Args:
        form: The format.
        language: Of the texts.
        words: Label words of single sentences, where the annotator has its own.
        source: Where the texts come from.
    """
    labels = {} if form == "choice" else {str(i): w for i, w in enumerate(words or label_words(form, language))}
    return Task.model_validate(
        {
            "name": f"ppt-{form}",
            "type": form,
            "template": _SPANS[form, language],
            "labels": labels,
            "metric": "accuracy",
            "sources": [source or "raw text"],
            "language": language,
        }
    )
