"""The machine-reading form on tokens: layout, spans, cutting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbprompt.errors import DataError
from bbprompt.tasks.example import Answer, Form, Part
from bbprompt.texts.cloze import encode_cloze
from bbprompt.texts.mrc import NO_TOKEN, SEPARATOR, Encoded, Frame, encode

FRAME = Frame(first=(1,), placeholders=(7, 8), last=(2,), limit=64)


def characters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """One token a character, its code point for an id; spaces have no token."""
    kept = [(i, char) for i, char in enumerate(text) if char != " "]
    return [ord(char) for _, char in kept], [(i, i + 1) for i, _ in kept]


def pairs(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A token for every two characters, whatever they are, as a subword vocabulary may do."""
    spans = [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
    return [sum(map(ord, text[a:b])) for a, b in spans], spans


def form(*parts: str | Part, options: Sequence[str] = (), context: int = -1) -> Form:
    made = tuple(Part(part, cut=False) if isinstance(part, str) else part for part in parts)
    return Form(made, tuple(options), context)


def long(text: str) -> Part:
    return Part(text, cut=True)


def read(encoded: Encoded, span: tuple[int, int]) -> str:
    return "".join(map(chr, encoded.ids[span[0] : span[1] + 1]))


def test_layout() -> None:
    encoded = encode(form("问：", long("甲乙"), options=["是", "不是"]), characters, FRAME)
    assert encoded.ids[:3] == (1, 7, 8)
    assert encoded.ids[-1] == 2
    assert "".join(map(chr, encoded.ids[3:-1])) == f"问：甲乙是{SEPARATOR}不是{SEPARATOR}"
    assert encoded.spans == ((7, 7), (9, 10))
    assert (encoded.context, encoded.offsets, encoded.cut) == ((0, 0), (), 0)


def test_frame_positions() -> None:
    assert (FRAME.prompt_start, FRAME.prompt_end, FRAME.text_start, FRAME.room) == (1, 3, 3, 60)


def test_a_prepended_prompt_stands_before_the_special_token() -> None:
    frame = replace(FRAME, placeholders=(NO_TOKEN, NO_TOKEN))
    assert (frame.prompt_start, frame.prompt_end, frame.text_start, frame.room) == (0, 2, 3, 60)
    text = form("问：", long("甲乙"), options=["是", "不是"])
    encoded = encode(text, characters, frame)
    assert encoded.ids[:3] == (NO_TOKEN, NO_TOKEN, 1)
    usual = encode(text, characters, FRAME)
    assert (encoded.ids[3:], encoded.spans) == (usual.ids[3:], usual.spans)
    gap = encode_cloze(replace(text, gap=1), characters, frame, (9,))
    assert gap.ids == (NO_TOKEN, NO_TOKEN, 1, *map(ord, "问："), 9, *map(ord, "甲乙"), 2)
    assert gap.spans == ((5, 5),)


words = st.text(st.sampled_from("甲乙丙丁abc123"), min_size=1, max_size=6)


@given(st.lists(words, min_size=1, max_size=4), st.lists(words, min_size=2, max_size=6))
def test_spans_are_the_options(parts: list[str], options: list[str]) -> None:
    roomy = Frame((1,), (7, 8), (2,), 200)
    encoded = encode(form(*map(long, parts), options=options), characters, roomy)
    assert [read(encoded, span) for span in encoded.spans] == options
    # Each option is closed by a comma of its own.
    assert all(chr(encoded.ids[last + 1]) == SEPARATOR for _, last in encoded.spans)


@given(st.lists(words, min_size=1, max_size=4), st.lists(words, min_size=2, max_size=6))
def test_no_two_options_share_a_token(parts: list[str], options: list[str]) -> None:
    encoded = encode(form(*map(long, parts), options=options), pairs, Frame((1,), (7,), (2,), 200))
    for (_, before), (after, _) in zip(encoded.spans, encoded.spans[1:], strict=False):
        assert before < after


def test_spans_of_the_tiny_bert(tiny_bert_dir: Path) -> None:
    from bbprompt.backends.backbone import load_backbone
    from bbprompt.backends.tokens import frame_for, tokenize_with

    tokenizer = load_backbone(str(tiny_bert_dir)).tokenizer
    frame = frame_for(tokenizer, (300, 301), 128)
    assert (frame.first, frame.last) == ((2,), (3,))
    options = ["房产", "abc", "3", "30", "体 育", "[SEP]"]
    encoded = encode(form("主题", long("天气 [SEP] 好"), "？选项：", options=options), tokenize_with(tokenizer), frame)
    shown = [
        "".join(tokenizer.convert_ids_to_tokens(encoded.ids[a : b + 1])).replace("##", "") for a, b in encoded.spans
    ]
    assert shown == ["房产", "abc", "3", "30", "体育", "[sep]"]
    assert encoded.ids.count(tokenizer.sep_token_id) == 1, "what a user writes is not a special token"


def test_the_longest_part_that_may_be_cut_is_cut_first() -> None:
    small = Frame((1,), (7,), (2,), 3 + 14)
    encoded = encode(form("问", long("甲乙丙丁戊己庚辛"), "与", long("一二三"), options=["是"]), characters, small)
    assert "".join(map(chr, encoded.ids[2:-1])) == f"问甲乙丙丁戊己庚与一二三是{SEPARATOR}"
    assert encoded.cut == 1
    smaller = Frame((1,), (7,), (2,), 3 + 8)
    encoded = encode(form("问", long("甲乙丙丁戊己庚辛"), "与", long("一二三"), options=["是"]), characters, smaller)
    assert "".join(map(chr, encoded.ids[2:-1])) == f"问甲乙与一二是{SEPARATOR}"
    assert encoded.cut == 7


@given(words, st.text("甲乙丙丁", min_size=1, max_size=40), words, st.lists(words, min_size=2, max_size=3))
def test_question_and_options_are_never_cut(before: str, middle: str, after: str, options: list[str]) -> None:
    rest = len(before) + len(after) + sum(map(len, options)) + len(options)
    tight = Frame((1,), (7, 8), (2,), 4 + rest + 5)
    encoded = encode(form(before, long(middle), after, options=options), characters, tight)
    text = "".join(map(chr, encoded.ids[3:-1]))
    kept = middle[:5] if len(middle) > 5 else middle
    assert text == before + kept + after + "".join(o + SEPARATOR for o in options)
    assert encoded.cut == len(middle) - len(kept)
    assert len(encoded.ids) <= tight.limit
    assert [read(encoded, span) for span in encoded.spans] == options


def test_what_cannot_be_cut_to_size_is_an_error() -> None:
    with pytest.raises(DataError, match=r"question and options alone take 12 of 9 tokens"):
        encode(form("一二三四五六七八九", long("甲乙"), options=["是非"]), characters, Frame((1,), (7, 8), (2,), 13))


def test_an_option_without_a_token_is_an_error() -> None:
    with pytest.raises(DataError, match="no token"):
        encode(form("问", options=["是", " "]), characters, FRAME)


def test_a_context_without_a_token_is_an_error() -> None:
    with pytest.raises(DataError, match="the context has no token"):
        encode(form("问", long("  "), context=1), characters, FRAME)


def test_context_and_answer() -> None:
    encoded = encode(
        form("文", long("甲乙丙丁戊"), "问", context=1), characters, FRAME, [Answer("丙丁", 2), Answer("戊", 4)]
    )
    assert encoded.context == (4, 9)
    assert encoded.offsets == tuple((i, i + 1) for i in range(5))
    assert [read(encoded, span) for span in encoded.spans] == ["丙丁", "戊"]


LONG = "".join(chr(0x4E00 + i) for i in range(40))


@given(st.integers(0, 39), st.integers(1, 8), st.integers(8, 39))
def test_the_window_holds_the_answer(start: int, size: int, room: int) -> None:
    text = LONG[start : start + size]
    tight = Frame((1,), (7,), (2,), 3 + 2 + room)
    encoded = encode(form("文", long(LONG), "问", context=1), characters, tight, [Answer(text, start)])
    assert len(encoded.ids) == tight.limit
    assert [read(encoded, span) for span in encoded.spans] == [text]
    (first, end), (a, b) = encoded.context, encoded.spans[0]
    assert end - first == room
    assert first <= a <= b < end
    at = encoded.offsets[a - first][0], encoded.offsets[b - first][1]
    assert at == (start, start + len(text)), "offsets count in the whole context"
    assert [LONG[x:y] for x, y in encoded.offsets] == list(map(chr, encoded.ids[first:end]))


def test_without_an_answer_the_beginning_is_kept() -> None:
    tight = Frame((1,), (7,), (2,), 3 + 2 + 10)
    encoded = encode(form("文", long(LONG), "问", context=1), characters, tight)
    assert encoded.offsets == tuple((i, i + 1) for i in range(10))
    assert (encoded.spans, encoded.cut) == ((), 30)


def test_an_answer_in_the_kept_beginning_moves_nothing() -> None:
    tight = Frame((1,), (7,), (2,), 3 + 2 + 10)
    encoded = encode(form("文", long(LONG), "问", context=1), characters, tight, [Answer(LONG[7:10], 7)])
    assert encoded.offsets[0] == (0, 1)
    assert [read(encoded, span) for span in encoded.spans] == [LONG[7:10]]


def test_an_answer_longer_than_the_window_is_an_error() -> None:
    tight = Frame((1,), (7,), (2,), 3 + 2 + 10)
    with pytest.raises(DataError, match="does not fit into 15 tokens"):
        encode(form("文", long(LONG), "问", context=1), characters, tight, [Answer(LONG[5:16], 5)])


def test_a_window_of_uneven_tokens_still_holds_the_answer() -> None:
    # The answer's first half is one long token: its middle character is far from its middle token.
    def tokenize(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets = characters(text)
        at = text.index("丙" * 20) if "丙" * 20 in text else None
        if at is None:
            return ids, offsets
        merged = [(a, b) for a, b in offsets if b <= at] + [(at, at + 20)]
        merged += [(a, b) for a, b in offsets if a >= at + 20]
        return [ord(text[a]) for a, _ in merged], merged

    context = "甲" * 12 + "丙" * 20 + "丁戊己庚辛" + "乙" * 12
    answer = Answer("丙" * 20 + "丁戊己庚辛", 12)
    encoded = encode(form(long(context), context=0), tokenize, Frame((1,), (7,), (2,), 3 + 6), [answer])
    assert [read(encoded, span) for span in encoded.spans] == ["丙丁戊己庚辛"]
