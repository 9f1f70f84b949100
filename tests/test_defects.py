"""Data files with a defect each, made here: an error that names the place and the remedy, or the text as it stands."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_prompt

from bbprompt.errors import DataError
from bbprompt.tasks.data import open_data
from bbprompt.tasks.fewshot import check_apart, sample
from bbprompt.tasks.task import Task

TASK = Task.model_validate(tiny_prompt.PAIR)
HEADER = ["text_a", "text_b", "label"]


def tsv(rows: list[list[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in [HEADER, *rows])


def comma(rows: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([HEADER, *rows])
    return out.getvalue()


def lines(rows: list[list[str]]) -> str:
    return "".join(json.dumps(dict(zip(HEADER, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)


FORMATS: dict[str, Callable[[list[list[str]]], str]] = {"tsv": tsv, "csv": comma, "jsonl": lines}
SOUND = ["花呗怎么还款", "如何还花呗", "1"]
CHINESE = [SOUND, ["借呗在哪里开通", "怎么开通借呗", "0"]]

#: Bytes of a file in some encoding, and what is said of them; None where it is read.
ENCODED: dict[str, tuple[Callable[[str], bytes], str | None]] = {
    "GBK": (lambda text: text.encode("gbk"), "looks like GBK"),
    "UTF-16": (lambda text: text.encode("utf-16"), "looks like UTF-16"),
    "UTF-16 without a mark": (lambda text: text.encode("utf-16-le"), ""),
    "Latin-1": (lambda text: ("café " + text).encode("latin-1", "replace"), "not UTF-8 at byte 3"),
    "cut in a character": (lambda text: text.encode()[:-8] + b"\xe8\n", "not UTF-8"),
    "half a surrogate": (lambda text: text.replace("花", "\ud800", 1).encode("utf-8", "surrogatepass"), "not UTF-8"),
    "overlong": (lambda text: text.encode().replace("花".encode(), b"\xc0\xaf", 1), "not UTF-8"),
    "byte order mark": (lambda text: b"\xef\xbb\xbf" + text.encode(), None),
    "CR LF": (lambda text: text.replace("\n", "\r\n").encode(), None),
    "no last line end": (lambda text: text.rstrip("\n").encode(), None),
}


def read(folder: Path, name: str, data: bytes) -> list[tuple[str, str, int]]:
    path = folder / name
    path.write_bytes(data)
    found = open_data(TASK, path).split("test")
    return [(example.fields["text_a"], example.fields["text_b"], example.label) for example in found]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("encoding", ENCODED)
def test_encodings(tmp_path: Path, ending: str, encoding: str) -> None:
    encode, said = ENCODED[encoding]
    data = encode(FORMATS[ending](CHINESE))
    if said is None:
        assert read(tmp_path, f"test.{ending}", data) == [(a, b, int(label)) for a, b, label in CHINESE]
        return
    with pytest.raises(DataError) as raised:
        read(tmp_path, f"test.{ending}", data)
    assert str(raised.value).startswith(f"{tmp_path / 'test'}.{ending}:")
    assert said in str(raised.value)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("label", ["2", " 1", "1 ", "1.0", "１", "", "-1", "01", "相似", "true"])
def test_labels_are_not_coerced(tmp_path: Path, ending: str, label: str) -> None:
    with pytest.raises(DataError, match=rf"test\.{ending}:{2 if ending == 'jsonl' else 3}: unknown label") as raised:
        read(tmp_path, f"test.{ending}", FORMATS[ending]([SOUND, [*SOUND[:2], label]]).encode())
    assert "'0', '1'" in str(raised.value)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("text", ["", " ", "\u3000", "\xa0", "\x0b"])
def test_texts_of_nothing(tmp_path: Path, ending: str, text: str) -> None:
    with pytest.raises(DataError, match="'text_b' is empty"):
        read(tmp_path, f"test.{ending}", FORMATS[ending]([[SOUND[0], text, "1"]]).encode())


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        *(
            "a\u2028b",
            "a\x85b",
            "a\x0bb",
            "a\x0cb",
            '"',
            '"a',
            'a"',
            "'a'",
            "{text_a}",
            "{{}}",
            "{0}",
            "[MASK]",
            "</s>",
        ),
        *(
            "é",
            "e\u0301",
            "שלום",
            "\u202eabc",
            "👩\u200d👩\u200d👧",
            "a\u200bb",
            "\ufeff a",
            "a\0b",
            "#a",
            "=1+1",
            "NA",
            "null",
        ),
    ],
)
def test_texts_stay_as_they_are(tmp_path: Path, ending: str, text: str) -> None:
    rows = [[text, SOUND[1], "0"], SOUND]
    found = read(tmp_path, f"test.{ending}", FORMATS[ending](rows).encode())
    assert found == [(text, SOUND[1], 0), (*SOUND[:2], 1)]
    first = open_data(TASK, tmp_path / f"test.{ending}").split("test")[0]
    form = TASK.render(first)
    assert [part.text for part in form.parts if part.cut] == [text, SOUND[1]]


STRUCTURE = {
    "empty": (b"", "the file is empty"),
    "header only": (b"text_a\ttext_b\tlabel\n", "has no records"),
    "no label column": (b"text_a\ttext_b\na\tb\n", "'label' is missing"),
    "a column too many": (b"text_a\ttext_b\tlabel\na\tb\t0\tx\n", "test.tsv:2: 4 columns"),
    "a column too few": (b"text_a\ttext_b\tlabel\na\tb\n", "test.tsv:2: 2 columns"),
    "a column twice": (b"text_a\ttext_a\tlabel\na\tb\t0\n", "stands twice"),
    "a blank column": (b"text_a\t\tlabel\na\tb\t0\n", "is blank"),
    "a blank line": (b"text_a\ttext_b\tlabel\n\na\tb\t0\n", "test.tsv:2: 1 columns"),
}


@pytest.mark.parametrize("defect", STRUCTURE)
def test_structure(tmp_path: Path, defect: str) -> None:
    data, said = STRUCTURE[defect]
    with pytest.raises(DataError) as raised:
        read(tmp_path, "test.tsv", data)
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_a_class_with_too_few_examples(tmp_path: Path) -> None:
    rows = [[f"a{n}", f"b{n}", str(int(n < 4))] for n in range(40)]
    (tmp_path / "train.tsv").write_text(tsv(rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"'相似' has 4 different training examples, but 32 are needed"):
        sample(TASK, open_data(TASK, tmp_path).split("train"), 1)


def test_repeats_and_overlaps_are_counted_and_contradictions_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = [[f"a{n}", f"b{n}", str(n % 2)] for n in range(70)]
    (tmp_path / "train.tsv").write_text(tsv([*rows, *rows[:3]]), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text(tsv(rows[:5]), encoding="utf-8")
    report = open_data(TASK, tmp_path).report()
    assert (report.duplicates, report.overlaps) == ({"train": 3}, {"train/dev": 5})
    contradicting = [[a, b, str(1 - int(label))] for a, b, label in rows[:7]]
    (tmp_path / "train.tsv").write_text(tsv([*rows, *contradicting]), encoding="utf-8")
    with pytest.raises(DataError, match="7 training inputs stand under two labels") as raised:
        sample(TASK, open_data(TASK, tmp_path).split("train"), 1)
    assert str(raised.value).count(" | ") == 5


def test_few_shot_inputs_that_are_tested_too_are_refused(tmp_path: Path) -> None:
    rows = [[f"a{n}", f"b{n}", str(n % 2)] for n in range(64)]
    (tmp_path / "train.tsv").write_text(tsv(rows), encoding="utf-8")
    (tmp_path / "test.tsv").write_text(tsv([*rows[:6], ["c", "d", "1"]]), encoding="utf-8")
    data = open_data(TASK, tmp_path)
    few = sample(TASK, data.split("train"), 1)
    with pytest.raises(
        DataError, match=r"6 of 64 few-shot inputs stand in the test split too: .*--allow-overlap"
    ) as raised:
        check_apart(TASK, few, data.split("test"))
    assert str(raised.value).count(" | ") == 5
    check_apart(TASK, few, data.split("test")[6:])
