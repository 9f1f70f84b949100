"""How self-supervised examples are put to a model: as tasks, each format one.

A model without a language-model head answers them as machine reading with the options in the text, the rest of the
package's tasks alike; in a pattern of PPT (`bbprompt.texts.ppt.in_pattern`) a label word is read in a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bbprompt.tasks.task import Task
from bbprompt.texts.ppt import Format, Language, label_words

__all__ = ["span_task"]

_SPANS: Mapping[tuple[str, str], str] = {
    ("pair", "zh"): '意思判别："{text_a}"与"{text_b}"的关系是？选项：',
    ("pair", "en"): 'How does "{text_a}" relate to "{text_b}"? Options: ',
    ("choice", "zh"): '阅读选择："{query}"的下一句是？选项：',
    ("choice", "en"): 'What comes after "{query}"? Options: ',
    ("single", "zh"): '情感分析："{text}"的情感是？选项：',
    ("single", "en"): 'What is the sentiment of "{text}"? Options: ',
}


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
