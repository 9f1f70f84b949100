"""Tasks in PPT's patterns: each text, string for string, and what no pattern can hold."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_prompt

from bbprompt.errors import UsageError
from bbprompt.tasks.task import Task, load_task, task_names
from bbprompt.texts.forms import write
from bbprompt.texts.ppt import Pattern, in_pattern

EN, ZH = {"language": "en"}, {"language": "zh"}
TEXT = {"text": "s"}
BOTH = {"text_a": "s1", "text_b": "s2"}


def task_of(kind: str, labels: list[str] | None, **keys: Any) -> Task:
    template = {"single": "{text}?", "pair": "{text_a}{text_b}?", "choice": "{query}?"}[kind]
    values = {"name": "mine", "type": kind, "template": template, "metric": "accuracy", "sources": ["made up"]}
    named = {"labels": {f"l{i}": word for i, word in enumerate(labels)}} if labels else {}
    return Task.model_validate(values | named | keys)


def shown(task: Task, record: dict[str, Any], pattern: Pattern, causal: bool = False) -> tuple[str, tuple[str, ...]]:
    """The text with <X> for its gap, and the words in label order."""
    written = in_pattern(task, pattern, causal=causal)
    form = write(written, written.example(record, labelled=False), "verbalizer")
    texts = [part.text for part in form.parts]
    assert {part.text for part in form.parts if part.cut} <= set(record.values() if "choices" not in record else ["q"])
    return "".join([*texts[: form.gap], "<X>", *texts[form.gap :]]), form.options


NLI = ["no", "maybe", "yes"]
CLEAR = ["矛盾", "中立", "相似"]
OPTIONS: dict[str, Any] = {"query": "q", "choices": ["a", "b", "c"]}

PATTERNS: list[tuple[str, list[str] | None, dict[str, Any], dict[str, Any], Pattern, str, list[str]]] = [
    # Equations 3 to 5 of the paper, and those of its appendix B.
    ("pair", NLI, EN, BOTH, "plain", "s1 <X> .s2", NLI),
    ("pair", CLEAR, ZH, BOTH, "plain", "s1<X>。s2", CLEAR),
    ("choice", None, EN, OPTIONS, "plain", "q? A.a. B.b. C.c. Answer is <X>.", ["A", "B", "C"]),
    ("choice", None, ZH, OPTIONS, "plain", "q？一、a 二、b 三、c。答案是<X>。", ["一", "二", "三"]),
    ("single", ["bad", "great"], EN, TEXT, "plain", "s. <X>.", ["bad", "great"]),
    ("single", ["差", "赞"], ZH, TEXT, "plain", "s。<X>。", ["差", "赞"]),
    # The hard prompts of appendix D.
    ("pair", NLI, EN, BOTH, "hybrid", "Question: s1 ? <X>. s2", NLI),
    ("pair", CLEAR, ZH, BOTH, "hybrid", "问题：s1？<X>。s2", CLEAR),
    ("choice", None, EN, OPTIONS, "hybrid", "We ask q ? A. a. B. b. C. c. The answer is <X>.", ["A", "B", "C"]),
    ("choice", None, ZH, OPTIONS, "hybrid", "问题：q？一、a 二、b 三、c。答案是：<X>。", ["一", "二", "三"]),
    ("single", ["bad", "great"], EN, TEXT, "hybrid", "s. It was <X>.", ["bad", "great"]),
    ("single", ["差", "赞"], ZH, TEXT, "hybrid", "s。这很<X>。", ["差", "赞"]),
    # Section 3.3: one format for all, options of a pair from no to yes whatever the order of its labels.
    ("pair", NLI, EN, BOTH, "unified", "s1; s2? A.no. B.maybe. C.yes. Answer is <X>.", ["A", "B", "C"]),
    ("pair", ["yes", "no"], EN, BOTH, "unified", "s1; s2? A.no. B.yes. Answer is <X>.", ["B", "A"]),
    ("pair", CLEAR, ZH, BOTH, "unified", "s1；s2？一、矛盾 二、中立 三、相似。答案是<X>。", ["一", "二", "三"]),
    ("choice", None, EN, OPTIONS, "unified", "q? A.a. B.b. C.c. Answer is <X>.", ["A", "B", "C"]),
    ("choice", None, ZH, OPTIONS, "unified", "q？一、a 二、b 三、c。答案是<X>。", ["一", "二", "三"]),
    ("single", ["world", "tech"], EN, TEXT, "unified", "s? A.world. B.tech. Answer is <X>.", ["A", "B"]),
    ("single", ["房产", "体育"], ZH, TEXT, "unified", "s？一、房产 二、体育。答案是<X>。", ["一", "二"]),
]


@pytest.mark.parametrize(("kind", "labels", "keys", "record", "pattern", "text", "words"), PATTERNS)
def test_patterns(
    kind: str,
    labels: list[str] | None,
    keys: dict[str, Any],
    record: dict[str, Any],
    pattern: Pattern,
    text: str,
    words: list[str],
) -> None:
    assert shown(task_of(kind, labels, **keys), record, pattern) == (text, tuple(words))


@pytest.mark.parametrize(
    ("labels", "keys", "words"),
    [
        (["相似", "矛盾"], {}, ("相似", "矛盾")),
        (["无关", "一般", "相关"], {"same": "l2"}, ("矛盾", "中立", "相似")),
        (["相关", "无关"], {"same": "l0"}, ("相似", "矛盾")),
        (["甲", "乙"], {}, ("甲", "乙")),  # nothing says which is which
        (["甲", "乙"], {"words": {"l0": "丙", "l1": "丁"}}, ("丙", "丁")),
        (["甲", "乙", "丙", "丁"], {"same": "l3"}, ("甲", "乙", "丙", "丁")),
        (["Yes", "No"], {"language": "en-GB", "same": "l0"}, ("yes", "no")),
    ],
)
def test_the_words_of_pairs(labels: list[str], keys: dict[str, Any], words: tuple[str, ...]) -> None:
    assert shown(task_of("pair", labels, **keys), BOTH, "hybrid")[1] == words


def test_what_a_task_holds_is_taken_as_it_is() -> None:
    fields = task_of("single", ["{query}", "{options}"], template="{text}{query}?", language="en")
    record: dict[str, Any] = {"text": "{options}", "query": "{gap}"}
    text = "{options}; {gap}? A.{query}. B.{options}. Answer is <X>."
    assert shown(fields, record, "unified") == (text, ("A", "B"))
    reading = task_of("choice", None, template="{context}{query}?", **ZH)
    written = in_pattern(reading, "plain")
    record = {"context": "{gap}", "query": "q", "choices": ["{options}", "b"]}
    form = write(written, written.example(record, labelled=False), "verbalizer")
    assert "".join(part.text for part in form.parts) == "{gap}；q？一、{options} 二、b。答案是。"
    assert [part.text for part in form.parts if part.cut] == ["{gap}"], "the passage is cut, the question is not"


def test_a_causal_model_reads_pairs_before_the_gap() -> None:
    pair = task_of("pair", CLEAR, **ZH)
    assert shown(pair, BOTH, "hybrid", causal=True)[0] == "问题：s1？s2<X>。"
    assert shown(pair, BOTH, "plain", causal=True)[0] == "s1。s2<X>。"
    assert shown(pair, BOTH, "unified", causal=True) == shown(pair, BOTH, "unified")


@pytest.mark.parametrize("name", task_names())
def test_bundled_tasks(name: str) -> None:
    """Every one is in each pattern, or refused for a reason; the labels stay."""
    task = load_task(name)
    patterns: tuple[Pattern, ...] = ("plain", "hybrid", "unified")
    for pattern in patterns:
        if task.type == "extractive" or (pattern == "unified" and len(task.labels) > 16):
            with pytest.raises(UsageError, match=f"task {name}: PPT's"):
                in_pattern(task, pattern)
            continue
        written = in_pattern(task, pattern)
        assert written.labels == task.labels
        assert len(set(written.words.values())) == len(written.words)
        assert Task.model_validate(written.model_dump(mode="json")) == written, "a manifest holds all of it"


@pytest.mark.parametrize(
    ("task", "pattern", "message"),
    [
        (Task.model_validate(tiny_prompt.EXTRACT), "hybrid", "no gap for an answer that lies in a context"),
        (task_of("single", ["a", "b"], language="fr"), "plain", "in zh and en; language is 'fr'"),
        (task_of("single", [str(i) for i in range(17)]), "unified", "letters for 16 options, not for 17"),
        (task_of("pair", CLEAR, template="{text_a}{text_b}{hint}?"), "plain", "no other field"),
        (task_of("single", ["a", "b"], template="{gap}?"), "plain", "task mine: cloze: "),
    ],
)
def test_what_no_pattern_can_hold(task: Task, pattern: Pattern, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        in_pattern(task, pattern)


@pytest.mark.parametrize(
    "keys",
    [
        {"cloze": "{query}{context}{options}{options}{gap}"},
        {"words": {"0": "一", "2": "二"}},
        {"listing": "{letter}"},
        {"listing": "{letter}{option}{option}"},
    ],
)
def test_wrong_choices_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(keys))}: "):
        Task.model_validate(tiny_prompt.CHOICE | keys)
    with pytest.raises(ValueError, match="listing: "):
        Task.model_validate(tiny_prompt.SINGLE | {"listing": "{letter}{option}"})


def test_a_choice_of_more_options_than_letters_is_refused() -> None:
    task = Task.model_validate(tiny_prompt.CHOICE | {"words": {"0": "甲", "1": "乙"}})
    example = task.example({"context": "c", "query": "q", "choices": ["a", "b", "c"]}, labelled=False)
    with pytest.raises(UsageError, match="at most 2 options, an example has 3"):
        write(task, example, "verbalizer")
