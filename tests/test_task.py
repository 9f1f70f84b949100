"""Tasks: the bundled ones are complete and sound; templates treat contents as inert."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbprompt.errors import DataError, UsageError
from bbprompt.tasks.example import Answer, input_uid
from bbprompt.tasks.task import Task, load_task, parse_template, task_names
from bbprompt.yamlfile import validate

SEEN = {"cmrc2018", "ccpm", "cmnli", "cote_mfw", "waimai", "bq_corpus", "thucnews"}
UNSEEN = {"drcd", "c3", "ocnli", "cote_bd", "chnsenticorp", "lcqmc", "tnews"}
SOURCES = ["hand-written"]


def make(**keys: Any) -> Task:
    base: dict[str, Any] = {
        "name": "toy",
        "type": "pair",
        "template": '"{text_a}"与"{text_b}"？',
        "labels": {"0": "矛盾", "1": "相似"},
        "metric": "accuracy",
        "sources": SOURCES,
    }
    return validate(Task, base | keys, "toy.yaml")


EXTRACTIVE: dict[str, Any] = {
    "type": "extractive",
    "template": '文本"{context}"问题"{question}"',
    "labels": {},
    "metric": "f1",
}
CHOICE: dict[str, Any] = {"type": "choice", "template": "{query}？", "labels": {}}


def synthetic(task: Task) -> dict[str, Any]:
    """Return a record that fits a task, with braces and placeholders in its texts."""
    record: dict[str, Any] = {name: f"甲{{{name}}}乙 {{}} {i}" for i, name in enumerate(task.field_names)}
    if task.type == "extractive":
        record["answers"] = [{"text": "乙", "start": record["context"].index("乙")}]
    elif task.type == "choice":
        record |= {"choices": ["一", "二", "三"], "label": 2}
    else:
        record["label"] = list(task.labels)[-1]
    return record


@pytest.mark.parametrize("name", task_names())
def test_every_bundled_task_renders(name: str) -> None:
    task = load_task(name)
    assert task.terms
    assert all(source.startswith("https://") for source in task.sources)
    record = synthetic(task)
    form = task.render(task.example(record))
    text = "".join(part.text for part in form.parts)
    for field in task.field_names:
        assert record[field] in text
    assert any(part.cut for part in form.parts)
    assert not form.parts[-1].cut
    if task.type == "extractive":
        assert form.parts[form.context].text == record["context"]
        assert form.options == ()
    else:
        assert form.context == -1
        assert len(form.options) == (3 if task.type == "choice" else len(task.labels))
        assert text.endswith("选项：" if task.language == "zh" else "Options: ")


def test_tracks_have_the_sizes_of_the_papers() -> None:
    tracks = Counter(load_task(name).track for name in task_names())
    assert tracks["upstream"] + tracks["seen"] == 38
    assert {name for name in task_names() if load_task(name).track == "seen"} == SEEN
    assert {name for name in task_names() if load_task(name).track == "unseen"} == UNSEEN
    assert tracks["unseen-relative"] == 5


def test_iflytek_label_lists_grow_by_fives() -> None:
    tasks = [load_task(f"iflytek_{n}") for n in (10, 15, 20, 25, 30)]
    assert [len(task.labels) for task in tasks] == [10, 15, 20, 25, 30]
    for small, large in itertools.pairwise(tasks):
        assert large.options[: len(small.options)] == small.options
    assert {task.folder for task in tasks} == {"iflytek"}


def test_overlapping_sets_are_not_bundled() -> None:
    kept_out = {"webank_pair", "triclue", "hotel_review", "online_shopping", "tnews_few", "ocnli_few"}
    assert not kept_out & set(task_names())


def test_a_task_comes_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        'name: mine\ntype: single\ntemplate: "{text}？"\nlabels: {a: 甲, b: 乙}\nmetric: accuracy\nsources: [me]\n',
        encoding="utf-8",
    )
    assert load_task(file) == load_task(str(file))
    assert load_task(file).options == ("甲", "乙")


@pytest.mark.parametrize("name", ["lcqm", "LCQMC", "..", "../tasks/lcqmc", "a\0", "x" * 300, "", "con%2e%2e"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        load_task(name)
    with pytest.raises(UsageError, match="did you mean 'lcqmc'"):
        load_task("lcqm")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"temlate": "x"}, "did you mean 'template'"),
        ({"name": "../x"}, "name: "),
        ({"template": "nothing"}, "no {field}"),
        ({"template": "{text_a}"}, "needs the placeholder {text_b}"),
        ({"template": "{text_a}{text_b}{label}"}, "show the model"),
        ({"template": "{text_a}{text_b}{"}, "character 17 opens no"),
        ({"template": "{text_a}{text_b}}"}, "character 17 closes nothing"),
        ({"template": "{text_a!r}{text_b}"}, "character 1 opens no"),
        ({"template": "{text_a.x}{text_b}"}, "character 1 opens no"),
        ({"template": "{}{text_b}"}, "character 1 opens no"),
        ({"labels": {"0": "矛盾"}}, "at least 2"),
        ({"labels": {"0": "矛盾", "1": "矛盾"}}, "stands for two labels"),
        ({"labels": {"0": "矛盾", "1": " 相似"}}, "white space"),
        ({"labels": {"0": "", "1": "相似"}}, "labels.0"),
        ({"labels": {"0": 1, "1": "相似"}}, "labels.0"),
        ({"words": {"0": "否"}}, "words: a word or a list of words for each label, in the same order"),
        ({"words": {"0": [], "1": "是"}}, "words: '0' needs a word or a list of words, not []"),
        ({"words": {"0": "否", "1": ["是", ""]}}, "words: '1' needs a word or a list of words, not ['是', '']"),
        ({"words": {"0": "否", "1": ["是", 1]}}, "words: '1' needs a word or a list of words"),
        ({"words": {"0": 0, "1": "是"}}, "words: '0' needs a word or a list of words, not 0"),
        ({"words": {"0": ["否", "不", "否"], "1": "是"}}, "words: '否' stands twice"),
        ({"words": {"0": ["否", "不"], "1": ["是", "不"]}}, "words: '不' stands twice"),
        ({"words": {"0": "是", "1": "是"}}, "words: '是' stands twice"),
        (
            CHOICE | {"words": {"0": "甲", "1": ["乙", "丙"]}},
            "words: in a choice each option has one letter, not a list",
        ),
        ({"metric": "f1"}, "scored by 'accuracy'"),
        ({"metric": "bleu"}, "metric"),
        ({"sources": []}, "sources"),
        ({"cut": ["text"]}, "not a field of the template; did you mean"),
        ({"shots": 0}, "shots"),
        ({"shots": True}, "shots"),
        ({"track": "sideways"}, "track"),
        (CHOICE | {"labels": {"0": "a", "1": "b"}}, "has none"),
        (CHOICE | {"only_listed_labels": True}, "only_listed_labels"),
        (EXTRACTIVE | {"template": "{context}{context}"}, "must stand once"),
        (EXTRACTIVE | {"metric": "accuracy"}, "scored by 'f1'"),
        ({"hub": {"path": "a/b", "split": {}}}, "did you mean 'splits'"),
    ],
)
def test_wrong_settings_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make(**keys)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "first", "all_"),
    [
        ({}, ("矛盾", "相似"), [("矛盾",), ("相似",)]),
        ({"words": {"0": "否", "1": "是"}}, ("否", "是"), [("否",), ("是",)]),
        ({"words": {"0": ["否"], "1": ["是", "对", "同"]}}, ("否", "是"), [("否",), ("是", "对", "同")]),
        (CHOICE, (), []),
        (CHOICE | {"words": {"0": "甲", "1": "乙"}}, ("甲", "乙"), [("甲",), ("乙",)]),
    ],
)
def test_words_of_labels(keys: dict[str, Any], first: tuple[str, ...], all_: list[tuple[str, ...]]) -> None:
    task = make(**keys)
    assert task.gap_words == first
    assert list(task.synonyms.items()) == list(zip(first, all_, strict=True))
    assert validate(Task, task.model_dump(mode="json"), "manifest") == task


FIRST_WORDS = {
    "sst2": "bad great",
    "agnews": "world sports business tech",
    "trec": "abbreviation definition thing person place number",
    "rte": "Yes No",
    "mrpc": "No Yes",
    "cb": "No Yes Maybe",
    "chnsenticorp": "负面 正面",
    "waimai": "负面 正面",
    "lcqmc": "矛盾 相似",
}


def test_the_first_words_are_those_of_methods_that_read_one() -> None:
    several = [name for name in task_names() if any(len(own) > 1 for own in load_task(name).synonyms.values())]
    assert {name: " ".join(load_task(name).gap_words) for name in several} == FIRST_WORDS


def test_templates_split_into_literals_and_fields() -> None:
    assert parse_template("a{{b}}{x}c{y_1}") == (("a{b}", "x"), ("c", "y_1"))
    assert parse_template("{x}") == (("", "x"),)
    assert parse_template("{x}}}") == (("", "x"), ("}", None))


@given(a=st.text(min_size=1), b=st.text(min_size=1))
def test_contents_are_inert(a: str, b: str) -> None:
    task = make()
    if not a.strip() or not b.strip():
        return
    form = task.render(task.example({"text_a": a, "text_b": b, "label": "0"}))
    assert "".join(part.text for part in form.parts) == f'"{a}"与"{b}"？'


def test_example_values() -> None:
    task = make()
    record = {"text_a": "甲", "text_b": "乙", "label": "1", "extra": 3}
    example = task.example(record)
    assert (example.label, example.options, dict(example.fields)) == (
        1,
        ("矛盾", "相似"),
        {"text_a": "甲", "text_b": "乙"},
    )
    assert example == pickle.loads(pickle.dumps(example))
    assert task.example({"text_a": "甲", "text_b": "乙"}, labelled=False).label == -1
    found = make(**EXTRACTIVE).example(
        {"context": "我在北京", "question": "哪", "answers": [{"text": "北京", "start": 2}]}
    )
    assert found.answers == (Answer("北京", 2),)
    keywords = make(type="single", template="{text}{keywords}")
    assert keywords.example({"text": "文", "keywords": ["一", "二"], "label": "0"}).fields["keywords"] == "一，二"


def test_uid_is_that_of_the_input() -> None:
    task, choice = make(), make(**CHOICE)
    uid = task.example({"text_a": "é", "text_b": "乙", "label": "1"}).uid
    # Pinned: a run made today must find its few-shot pool again tomorrow.
    assert uid == "6a17cb322abd933f"
    assert task.example({"text_b": "乙", "text_a": "é", "label": "0", "x": 1}).uid == uid
    assert task.example({"text_a": "e\u0301", "text_b": "乙", "label": "1"}).uid != uid
    assert task.example({"text_a": "乙", "text_b": "é", "label": "1"}).uid != uid
    query = {"query": "问", "choices": ["一", "二"], "label": 0}
    assert choice.example(query).uid == choice.example(query | {"label": 1}).uid
    assert choice.example(query).uid != choice.example(query | {"choices": ["二", "一"]}).uid
    assert input_uid({"ab": "c"}) != input_uid({"a": "bc"})


@pytest.mark.parametrize(
    ("keys", "record", "words"),
    [
        ({}, {"text_a": "甲", "label": "0"}, "'text_b' is missing"),
        ({}, {"text_a": "甲", "text_b": "乙"}, "'label' is missing"),
        (
            {},
            {"text_a": "甲", "text_b": "乙", "label": "2"},
            "unknown label '2'; the task toy knows '0', '1'",
        ),
        ({}, {"text_a": "甲", "text_b": "乙", "label": " 1"}, "unknown label ' 1'"),
        ({}, {"text_a": "甲", "text_b": "乙", "label": "1.0"}, "unknown label '1.0'"),
        ({}, {"text_a": "甲", "text_b": "乙", "label": "１"}, "unknown label '１'"),
        ({}, {"text_a": "甲", "text_b": "乙", "label": 1}, 'write it as the string "1"'),
        ({}, {"text_a": "甲", "text_b": "乙", "label": None}, "None is not a string"),
        ({}, {"text_a": "甲", "text_b": "", "label": "1"}, "'text_b' is empty"),
        ({}, {"text_a": " \u3000\n", "text_b": "乙", "label": "1"}, "'text_a' is empty"),
        ({}, {"text_a": 7, "text_b": "乙", "label": "1"}, "'text_a' is 7, not a string"),
        ({}, {"text_a": [], "text_b": "乙", "label": "1"}, "'text_a' is an empty list"),
        ({}, {"text_a": ["甲", 1], "text_b": "乙", "label": "1"}, "item 1 of 'text_a' is 1"),
        ({}, {"text_a": "\ud83d", "text_b": "乙", "label": "1"}, "half a surrogate pair"),
        (CHOICE, {"query": "问", "choices": ["一", "二"], "label": 2}, "out of range; there are 2"),
        (CHOICE, {"query": "问", "choices": ["一", "二"], "label": -1}, "out of range"),
        (CHOICE, {"query": "问", "choices": ["一", "二"], "label": True}, "whole number, got True"),
        (CHOICE, {"query": "问", "choices": ["一", "二"], "label": "1"}, "whole number, got '1'"),
        (CHOICE, {"query": "问", "choices": ["一"], "label": 0}, "at least 2"),
        (CHOICE, {"query": "问", "choices": ["一", ""], "label": 0}, "choice 1 is empty"),
        (CHOICE, {"query": "问", "label": 0}, "'choices' must be a list"),
        (EXTRACTIVE, {"context": "北京", "question": "哪"}, "'answers' must be a list"),
        (EXTRACTIVE, {"context": "北京", "question": "哪", "answers": []}, "at least one answer"),
        (EXTRACTIVE, {"context": "北京", "question": "哪", "answers": ["北"]}, "'text' and 'start'"),
        (
            EXTRACTIVE,
            {"context": "北京", "question": "哪", "answers": [{"text": "京", "start": 0}]},
            "answer 0 is '京', but at character 0 of the context stands '北'",
        ),
        (
            EXTRACTIVE,
            {"context": "北京", "question": "哪", "answers": [{"text": "京", "start": -1}]},
            "must be a character offset",
        ),
        (
            EXTRACTIVE,
            {"context": "北京", "question": "哪", "answers": [{"text": "", "start": 0}]},
            "the text of answer 0 is empty",
        ),
    ],
)
def test_wrong_records_are_refused(keys: dict[str, Any], record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        make(**keys).example(record)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_escape_and_shorten_what_they_quote() -> None:
    record = {"text_a": "甲", "text_b": "乙", "label": "\x1b[31m" + "x" * 10_000}
    with pytest.raises(DataError) as caught:
        make().example(record)
    assert len(str(caught.value)) < 200
    assert "\x1b" not in str(caught.value)


def test_declared_skips() -> None:
    record = {"text_a": "甲", "text_b": "乙", "label": "9"}
    assert make(only_listed_labels=True).skips(record)
    assert not make().skips(record)
    assert not make(only_listed_labels=True).skips(record | {"label": "1"})
    assert not make(only_listed_labels=True).skips(record | {"label": 9})
    assert make(skip_empty=True).skips(record | {"text_a": " "})
    assert not make().skips(record | {"text_a": " "})


def test_cut_fields() -> None:
    assert make().cut_fields == {"text_a", "text_b"}
    assert make(cut=["text_b"]).cut_fields == {"text_b"}
    assert make(cut=[]).cut_fields == frozenset()
    assert make(**CHOICE).cut_fields == {"query"}
    assert make(**CHOICE | {"template": "{context}{query}"}).cut_fields == {"context"}
    assert make(**EXTRACTIVE).cut_fields == {"context"}
    assert make(type="single", template="{head}在{text}").cut_fields == {"text"}
