"""Self-supervised tasks from raw text, their parts: documents, sentences, pairs, choices, patterns."""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinytrain import corpus

from bbprompt.errors import DataError
from bbprompt.pretrain.ppt_corpus import documents, sentences, usable, windows
from bbprompt.pretrain.ppt_examples import (
    CHOICE,
    Caps,
    around_gap,
    choice,
    pair,
    pseudo_labelled,
    unified_caps,
)
from bbprompt.pretrain.ppt_forms import span_task
from bbprompt.tasks.example import Example, Form
from bbprompt.texts.forms import cloze_form
from bbprompt.texts.ppt import in_pattern, label_words

# ---------------------------------------------------------------------------------------------- the corpus


def test_documents_are_blocks_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n一。\n 二。\n\n\n三。\n", encoding="utf-8")
    packed = corpus(tmp_path / "b.txt.gz", 3)
    found = list(documents([file, packed]))
    assert found[::2][:2] == [(f"{file}:2", ["一。", "二。"]), (f"{file}:6", ["三。"])]
    # In turn, and those of the longer file at the end.
    assert [where.rpartition(":")[0] for where, _ in found] == [str(f) for f in (file, packed, file, packed, packed)]
    file.write_bytes("一。\n".encode() + "二".encode("gbk"))
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8"):
        list(documents([file]))
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match="no text"):
        list(documents([file]))


def test_documents_are_streamed(tmp_path: Path) -> None:
    file = corpus(tmp_path / "large.txt", 4000)
    whole = [sentences(lines, "zh") for _, lines in documents([file])]
    size = sum(sys.getsizeof(sentence) for document in whole for sentence in document)
    del whole
    tracemalloc.start()
    stream = (sentences(lines, "zh") for _, lines in documents([file]))
    assert sum(1 for _ in windows(stream, 16, np.random.default_rng(0))) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Python itself keeps some thousand freed tuples.
    assert peak < 0.2 * size


@pytest.mark.parametrize(
    ("language", "line", "expected"),
    [
        ("zh", "他说：“走吧！”然后走了。真的？？好…… 完", ("他说：“走吧！”", "然后走了。", "真的？？", "好……", "完")),
        ("zh", "版本 2.0 来了。", ("版本 2.0 来了。",)),
        ("en", 'It is 2.0 now. Fine! "Go." He went.', ("It is 2.0 now.", "Fine!", '"Go."', "He went.")),
    ],
)
def test_sentences(language: str, line: str, expected: tuple[str, ...]) -> None:
    assert sentences([line], language) == expected


def test_usable_documents() -> None:
    assert usable(["一二三四五"] * 9, len) is None, "repeated sentences count once"
    document = [f"一二三四{i}" for i in range(5)]
    assert usable([*document, "短"], len) == tuple(document)
    assert usable(document[:4], len) is None


@given(st.integers(0, 40), st.integers(2, 9), st.integers(0, 99))
def test_a_window_gives_each_document_once(count: int, size: int, seed: int) -> None:
    stream = ((f"{i}",) for i in range(count))
    seen = []
    for number, document, others in windows(stream, size, np.random.default_rng(seed)):
        assert document == (f"{number}",)
        assert document not in others
        assert len(others) == min(size, count) - 1
        seen.append(number)
    assert sorted(seen) == list(range(count))


# ------------------------------------------------------------------------------------------------ examples


def document(name: str, count: int = 12) -> tuple[str, ...]:
    return tuple(f"{name}{i:02}" for i in range(count))


OTHERS = [document(name) for name in "BCDEFG"]


def place(sentence: str) -> tuple[str, int]:
    return sentence[0], int(sentence[1:3])


def test_pairs() -> None:
    rng = np.random.default_rng(0)
    found = [example for _ in range(3000) if (example := pair(document("A"), OTHERS, len, rng))]
    labels = Counter(example.label for example in found)
    assert all(abs(labels[label] / len(found) - 1 / 3) < 0.04 for label in (0, 1, 2))
    before = 0
    for example in found:
        (one, i), (two, j) = place(example.fields["text_a"]), place(example.fields["text_b"])
        assert one == "A"
        assert (example.label == 0) == (two != "A")
        if two == "A":
            assert (example.label == 2) == (abs(i - j) == 1)
            assert i != j
            before += example.label == 2 and j < i
    assert 0.4 < before / labels[2] < 0.6, "the previous sentence as often as the next"


def test_pairs_of_very_different_length_are_left_out() -> None:
    rng = np.random.default_rng(0)
    found = [pair(("甲", "乙" * 101), [("丙",)], len, rng) for _ in range(200)]
    assert {example.fields["text_b"] for example in found if example} == {"丙"}


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 80), st.booleans())
def test_an_over_long_pair_keeps_what_is_nearest_to_its_gap(one: int, other: int, room: int, last: bool) -> None:
    before, behind = "".join(map(chr, range(200, 200 + one))), "".join(map(chr, range(400, 400 + other)))
    example = Example({"text_a": before, "text_b": behind}, (), 2, (), "uid")
    found = around_gap(example, room, lambda text: (range(len(text)), [(i, i + 1) for i in range(len(text))]), last)
    a, b = found.fields["text_a"], found.fields["text_b"]
    if one + other <= room:
        assert found is example
        return
    assert len(a) + len(b) == room
    assert before.endswith(a)
    assert behind.endswith(b) if last else behind.startswith(b)
    assert min(len(a), len(b)) >= 1
    assert len(a) == 1 or len(b) == 1 or abs(len(a) / room - one / (one + other)) <= 0.5 / room + 1e-9, "in proportion"
    assert found.label == 2
    assert found.uid != "uid"


def test_the_schedule_of_the_unified_format() -> None:
    # Options: query cap, option cap, wrong options from the same document.
    published = {
        (2, 3, 4): (400, 50, 1),
        (5,): (400, 40, 1),
        (6,): (300, 40, 1),
        (7,): (250, 30, 2),
        (8, 9): (200, 30, 2),
        (10,): (150, 20, 2),
        (11, 12, 13, 14, 15, 16): (150, 20, 3),
    }
    assert sorted(n for counts in published for n in counts) == list(range(2, 17))
    for counts, caps in published.items():
        for n in counts:
            assert unified_caps(n) == Caps(*caps)
    assert Caps(389, 86, 1) == CHOICE
    for n in (1, 17):
        with pytest.raises(ValueError, match="2 to 16"):
            unified_caps(n)
    assert Caps(400, 50, 1).scaled(0.25) == Caps(100, 12, 1)
    assert Caps(400, 50, 1).scaled(3.0) == Caps(400, 50, 1)


@given(st.integers(2, 16), st.integers(0, 999))
def test_choices(n: int, seed: int) -> None:
    caps = unified_caps(n)
    example = choice(document("A"), OTHERS, n, caps, lambda text, most: text[:most], np.random.default_rng(seed))
    assert example is not None
    name, at = place(example.fields["query"])
    assert name == "A"
    assert len(example.options) == len(set(example.options)) == n
    assert place(example.options[example.label]) == ("A", at + 1), "the right one comes next"
    wrong = [place(option) for i, option in enumerate(example.options) if i != example.label]
    same = [i for name, i in wrong if name == "A"]
    assert len(same) == min(caps.same, n - 1)
    assert all(abs(i - at) > 1 for i in same)
    apart = Counter(name for name, _ in wrong if name != "A")
    assert len(apart) <= 4
    assert not apart or max(apart.values()) - min(apart.values()) <= 1, "spread evenly"


def test_choices_are_cut_and_stand_anywhere() -> None:
    rng = np.random.default_rng(0)
    places = Counter()
    long = tuple(f"A{i:02}" + "长" * 40 for i in range(9))
    for _ in range(300):
        example = choice(long, OTHERS, 4, Caps(10, 5, 1), lambda text, most: text[:most], rng)
        assert example is not None
        assert len(example.fields["query"]) == 10
        assert max(map(len, example.options)) == 5
        places[example.label] += 1
    assert min(places.values()) > 50
    assert choice(long, OTHERS, 4, Caps(10, 1, 1), lambda text, most: text[:most], rng) is None, "equal when cut"
    assert choice(long, [], 16, CHOICE, lambda text, most: text[:most], rng) is None, "nothing to choose from"


def test_unsure_pseudo_labels_are_left_out() -> None:
    probabilities = np.array([[0.95, 0.05], [0.6, 0.4], [0.1, 0.9]])
    found = list(pseudo_labelled(["a", "b", "c"], probabilities, 0.9))
    assert [(example.fields["text"], example.label) for example in found] == [("a", 0), ("c", 1)]


# --------------------------------------------------------------------------------------------------- forms


def test_label_words() -> None:
    assert label_words("pair", "en") == ("no", "maybe", "yes")
    assert label_words("pair", "zh", 2) == ("矛盾", "相似")
    assert label_words("single", "en", 2) == ("terrible", "great")
    assert label_words("single", "zh") == ("差", "不好", "一般", "好", "赞")
    assert label_words("choice", "en", 6) == tuple("ABCDEF")
    assert label_words("choice", "zh")[:6] == tuple("一二三四五六")
    for language in ("zh", "en"):
        assert len(set(label_words("choice", language))) == 16  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 to 5"):
        label_words("single", "en", 6)


@pytest.mark.parametrize(
    ("form", "language", "hybrid", "expected"),
    [
        ("pair", "en", False, "s1 <X> .s2"),
        ("pair", "en", True, "Question: s1 ? <X>. s2"),
        ("pair", "zh", False, "s1<X>。s2"),
        ("pair", "zh", True, "问题：s1？<X>。s2"),
        ("choice", "en", False, "q? A.a. B.b. Answer is <X>."),
        ("choice", "en", True, "We ask q ? A. a. B. b. The answer is <X>."),
        ("choice", "zh", False, "q？一、a 二、b。答案是<X>。"),
        ("choice", "zh", True, "问题：q？一、a 二、b。答案是：<X>。"),
        ("single", "en", False, "{query}. <X>."),
        ("single", "en", True, "{query}. It was <X>."),
        ("single", "zh", False, "{query}。<X>。"),
        ("single", "zh", True, "{query}。这很<X>。"),
    ],
)
def test_patterns(form: Any, language: Any, hybrid: bool, expected: str) -> None:
    # What a text holds is never taken for a field.
    fields = {"pair": {"text_a": "s1", "text_b": "s2"}, "choice": {"query": "q"}, "single": {"text": "{query}"}}[form]
    options = ("a", "b") if form == "choice" else ()
    words = label_words(form, language)
    task = in_pattern(span_task(form, language), "hybrid" if hybrid else "plain")
    written = cloze_form(task, Example(fields, options, 0, (), ""))
    assert with_gap(written) == expected
    assert written.options == (words[:2] if form == "choice" else words)
    assert {part.text for part in written.parts if part.cut} == set(fields.values())


def with_gap(form: Form) -> str:
    texts = [part.text for part in form.parts]
    return "".join([*texts[: form.gap], "<X>", *texts[form.gap :]])


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("form", ["pair", "choice", "single"])
def test_a_causal_model_reads_everything_before_the_gap(form: Any, language: Any, hybrid: bool) -> None:
    fields = {"text_a": "s1", "text_b": "s2", "query": "q", "text": "t"}
    example = Example(fields, ("a", "b"), 0, (), "")
    task = in_pattern(span_task(form, language), "hybrid" if hybrid else "plain", causal=True)
    written = cloze_form(task, example)
    before, after = with_gap(written).split("<X>")
    assert after in {"。", "."}
    for text in {"pair": ("s1", "s2"), "choice": ("q", "a", "b"), "single": ("t",)}[form]:
        assert text in before


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("form", ["pair", "choice", "single"])
def test_span_tasks_are_tasks(form: Any, language: Any) -> None:
    task = span_task(form, language)
    assert task.type == form
    assert task.language == language
    assert span_task("single", "en", ("bad", "good")).options == ("bad", "good")
