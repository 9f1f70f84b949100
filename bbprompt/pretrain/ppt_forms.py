"""How self-supervised examples are put to a model: patterns, label words and hard prompts in two languages.

`pattern_text` writes the pattern-verbalizer pairs of PPT (Table 2 and appendix), with `<X>` where the label word is
predicted and `<P>` where the soft prompt stands; `span_task` puts the same examples as machine reading with the
options in the text, which a model without a language-model head can answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from bbprompt.tasks.task import Task

__all__ = ["MASK", "PROMPT", "Format", "Language", "label_words", "pattern_text", "span_task"]

Format = Literal["pair", "choice", "single"]
Language = Literal["zh", "en"]

MASK = "<X>"
"""Where the label word is predicted."""

PROMPT = "<P>"
"""Where the soft prompt stands."""

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
    ("pair", "en"): ("<P>{text_a} <X> .{text_b}", "<P>Question: {text_a} ? <X>. {text_b}"),
    ("pair", "zh"): ("<P>{text_a}<X>。{text_b}", "<P>问题：{text_a}？<X>。{text_b}"),
    ("choice", "en"): ("<P>{query}? {options} Answer is <X>.", "<P>We ask {query} ? {options} The answer is <X>."),
    ("choice", "zh"): ("<P>{query}？{options}答案是<X>。", "<P>问题：{query}？{options}答案是：<X>。"),
    ("single", "en"): ("<P>{text}. <X>.", "<P>{text}. It was <X>."),
    ("single", "zh"): ("<P>{text}。<X>。", "<P>{text}。这很<X>。"),
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


def pattern_text(
    form: Format,
    language: Language,
    fields: Mapping[str, str],
    options: Sequence[str] = (),
    hybrid: bool = False,
) -> str:
    """Write an example as a cloze, with `<P>` for the soft prompt and `<X>` for the label word.

    Args:
        form: The format.
        language: Of the texts.
        fields: `text_a` and `text_b`, `query`, or `text`.
        options: Of a choice.
        hybrid: With the hard prompt.
    """
    listed = ""
    if form == "choice":
        words = label_words(form, language, len(options))
        if language == "zh":
            listed = " ".join(f"{word}、{option}" for word, option in zip(words, options, strict=True)) + "。"
        else:
            dot = ". " if hybrid else "."
            listed = " ".join(f"{word}{dot}{option}." for word, option in zip(words, options, strict=True))
    contents = {**fields, "options": listed}
    # In one pass: what a text holds is never taken for a field.
    return re.sub(r"\{(\w+)\}", lambda field: contents[field[1]], _PATTERNS[form, language][hybrid])


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
