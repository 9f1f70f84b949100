"""Record files and data sources: one small fixture for each defect."""

from __future__ import annotations

import csv
import gzip
import itertools
import logging
import os
import sys
import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from depth import deep
from hypothesis import given, settings
from hypothesis import strategies as st
from toytask import RECORDS, fill, jsonl, toy

from bbprompt.errors import DataError, UsageError
from bbprompt.tasks import data, recordfile
from bbprompt.tasks.data import open_data
from bbprompt.tasks.recordfile import read_records
from bbprompt.tasks.task import load_task, task_names

# Record files that are read


def test_all_formats_give_the_same_examples(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [f"{r['text_a']},{r['text_b']},{r['label']}" for r in RECORDS]
    table = "text_a,text_b,label\n" + "\n".join(rows)
    a = fill(tmp_path / "a", train__jsonl=jsonl(RECORDS))
    b = fill(tmp_path / "b", train__jsonl__gz=gzip.compress(jsonl(RECORDS)))
    c = fill(tmp_path / "c", train__csv=table.replace("\n", "\r\n").encode())
    d = fill(tmp_path / "d", train__tsv=b"\xef\xbb\xbf" + table.replace(",", "\t").encode())
    e = fill(tmp_path / "e")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), e / "train.parquet")
    digests = {open_data(toy(), folder).digest("train") for folder in (a, b, c, d, e)}
    assert len(digests) == 1
    swapped = fill(tmp_path / "f", train__jsonl=jsonl(RECORDS[::-1]))
    assert open_data(toy(), swapped).digest("train") not in digests


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\ufeff", "\u200b", "\u202e"])
@pytest.mark.parametrize("ending", ["jsonl", "tsv", "csv"])
def test_odd_characters_are_data(tmp_path: Path, odd: str, ending: str) -> None:
    text = f"前{odd}后"
    record = {"text": text, "label": "0"}
    comma = {"tsv": "\t", "csv": ","}.get(ending, "")
    content = jsonl([record, record]) if not comma else f"text{comma}label\n{text}{comma}0\n{text}{comma}0\n".encode()
    (tmp_path / f"x.{ending}").write_bytes(content)
    assert [record for _, record in read_records(tmp_path / f"x.{ending}")] == [record, record]


def test_tsv_is_literal(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('text\tlabel\n"open\t0\n\'a"b\\t\t1\n', encoding="utf-8")
    assert list(read_records(tmp_path / "x.tsv")) == [
        (2, {"text": '"open', "label": "0"}),
        (3, {"text": "'a\"b\\t", "label": "1"}),
    ]


def test_csv_follows_its_quotes(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('text,label\n"a,""b""\nc",0\nd,1\n', encoding="utf-8")
    assert list(read_records(tmp_path / "x.csv")) == [
        (2, {"text": 'a,"b"\nc', "label": "0"}),
        (4, {"text": "d", "label": "1"}),
    ]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
NAMED = TEXTS.filter(str.strip)
TABLES = st.lists(NAMED, min_size=1, max_size=4, unique=True).flatmap(
    lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(names, TEXTS)), min_size=1, max_size=5)
)


@settings(max_examples=deep(1000), deadline=None)
@given(st.lists(st.dictionaries(TEXTS, TEXTS, min_size=1, max_size=4), min_size=1, max_size=4))
def test_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]) -> None:
    file = tmp_path_factory.getbasetemp() / "round.jsonl"
    file.write_bytes(jsonl(records))
    assert [record for _, record in read_records(file)] == records


@settings(max_examples=deep(1000), deadline=None)
@given(st.lists(TEXTS.filter(lambda text: not set(text) & set("\t\n\r")), min_size=1, max_size=5))
def test_tsv_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    file = tmp_path_factory.getbasetemp() / "round.tsv"
    file.write_bytes(("text\tlabel\n" + "".join(f"{text}\t0\n" for text in texts)).encode())
    assert [record["text"] for _, record in read_records(file)] == texts


@settings(max_examples=deep(500), deadline=None)
@given(TABLES)
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]) -> None:
    file = tmp_path_factory.getbasetemp() / "round.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(records[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(records)
    assert [record for _, record in read_records(file)] == records


@settings(max_examples=deep(300), deadline=None)
@given(TABLES)
def test_parquet_round_trip(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    file = tmp_path_factory.getbasetemp() / "round.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), file)
    assert [record for _, record in read_records(file)] == records


# Record files that are refused

GOOD = '{"text": "好", "label": "0"}\n'


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("x.jsonl", b"", None, "the file is empty"),
        (
            "x.jsonl",
            GOOD.encode() + '{"text": "中文"}\n'.encode("gbk"),
            2,
            "not UTF-8 at byte 40 of the file (it looks like GBK)",
        ),
        ("x.tsv", "text\tlabel\n很好\t0\n".encode("gbk"), 2, "looks like GBK"),
        ("x.jsonl", GOOD.encode("utf-16"), 1, "looks like UTF-16"),
        ("x.jsonl", b'{"text": "caf\xe9 ok"}\n', 1, "not UTF-8 at byte 13 of the file; convert"),
        ("x.jsonl", b'{"text": "\xe4\xbd"}\n', 1, "not UTF-8 at byte 10"),
        ("x.jsonl", GOOD.encode() + b'{"text": }\n', 2, "not JSON at character 10"),
        ("x.jsonl", GOOD.encode() + b'{"text": "a"} {}\n', 2, "not JSON"),
        ("x.jsonl", b'["a"]\n', 1, "not a list"),
        ("x.jsonl", b'{"text": "a", "text": "b"}\n', 1, "'text' stands twice"),
        ("x.jsonl", b'{"text": NaN}\n', 1, "NaN is not a JSON number"),
        ("x.jsonl", b'{"n": ' + b"9" * 5000 + b"}\n", 1, "not acceptable JSON"),
        ("x.jsonl", b"[" * 100_000 + b"\n", 1, "nested too deep"),
        ("x.jsonl.gz", b"not gzip", None, "damaged gzip"),
        ("x.jsonl.gz", gzip.compress(GOOD.encode() * 99, mtime=0)[:-9], None, "damaged gzip"),
        ("x.tsv", b"text\tlabel\na\t0\tmore\n", 2, "3 columns, but the header has 2"),
        ("x.tsv", b"text\tlabel\na\t0\n\nb\t1\n", 3, "1 columns, but the header has 2"),
        ("x.tsv", b"text\ttext\na\t0\n", 1, "'text' of the header stands twice"),
        ("x.tsv", b"text\t\na\t0\n", 1, "'' of the header is blank"),
        ("x.csv", b'text,label\n"a"b,0\n', 2, "not CSV"),
        ("x.csv", b'text,label\na,0\n"open,0\nb,1\n', 3, "not CSV"),
        ("x.csv", b"text,label\na\n", 2, "1 columns"),
        ("x.parquet", b"PAR1 nothing PAR1", None, "damaged Parquet"),
        ("x.txt", b"a\n", None, "unknown kind of file"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes, line: int | None, words: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_records(file))
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert words in message
    assert "\n" not in message


def test_over_long_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordfile, "MAX_LINE", len(GOOD.encode()))
    (tmp_path / "x.jsonl").write_text(GOOD + " " + GOOD, encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl:2: the line is longer"):
        list(read_records(tmp_path / "x.jsonl"))


def test_a_file_of_many_lines_streams(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes(b"text\tlabel\n" + b"so it goes\tyes\n" * 100_000)
    tracemalloc.start()
    last = deque(read_records(tmp_path / "x.tsv"), maxlen=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert last == deque([(100_001, {"text": "so it goes", "label": "yes"})])
    assert peak < 500_000


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").mkdir()
    for name in ("x.jsonl", "y.jsonl"):
        with pytest.raises(DataError, match="not a regular file"):
            read_records(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "z.jsonl")


def test_devices_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to("/dev/zero")
    for read in (read_records, recordfile.read_texts):
        with pytest.raises(DataError, match="not a regular file"):
            read(tmp_path / "x.jsonl")


def test_a_gzip_bomb_ends_at_the_longest_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordfile, "MAX_LINE", 1_000_000)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b" " * 50_000_000))
    tracemalloc.start()
    with pytest.raises(DataError, match="the line is longer"):
        list(read_records(tmp_path / "x.jsonl.gz"))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_records_stream(tmp_path: Path) -> None:
    with (tmp_path / "x.jsonl").open("wb") as file:
        for _ in range(20):
            file.write(GOOD.encode() * 1_000)
    tracemalloc.start()
    assert sum(1 for _ in read_records(tmp_path / "x.jsonl")) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "é",
        "e\u0301",
        "\u202eabc",
        "👩‍👩‍👧‍👦",
        "\u200bnichts",
        "[MASK]",
        "{text_b}",
        "{{}}",
        "<mask></s>",
        "a\tb",
        "x\0y",
        "Ａ",
        "한글",
    ],
)
def test_texts_stay_as_they_are(tmp_path: Path, text: str) -> None:
    record = {"text_a": text, "text_b": "答", "label": "1"}
    fill(tmp_path, train__jsonl=jsonl([record, record]))
    first, again = open_data(toy(), tmp_path).split("train")
    assert first.fields["text_a"] == text
    assert first.uid == again.uid
    assert "".join(part.text for part in toy().render(first).parts) == text + "答"


def test_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"bbprompt\[data\]"):
        list(read_records(tmp_path / "x.parquet"))


# Sources


def test_a_directory_with_all_splits(tmp_path: Path) -> None:
    fill(
        tmp_path,
        train__jsonl=jsonl(RECORDS),
        dev__tsv=b"text_a\ttext_b\tlabel\na\tb\t1\n",
        test__jsonl=jsonl(RECORDS[:1]),
    )
    found = open_data(toy(), tmp_path)
    assert (found.source, found.id, found.splits) == ("path", str(tmp_path), ("train", "dev", "test"))
    assert [len(found.split(name)) for name in found.splits] == [4, 1, 1]
    assert found.split("train")[1].fields["text_a"] == "问1"


def test_dev_stands_in_for_a_missing_test(tmp_path: Path) -> None:
    fill(tmp_path, train__jsonl=jsonl(RECORDS), dev__jsonl=jsonl(RECORDS[:1]))
    found = open_data(toy(), tmp_path)
    assert found.split("test") == found.split("dev")
    assert found.digest("test") == found.digest("dev")
    assert found.report().overlaps == {"train/dev": 1}


def test_a_single_file_is_the_test_split(tmp_path: Path) -> None:
    fill(tmp_path, mine__jsonl=jsonl(RECORDS))
    found = open_data(toy(), tmp_path / "mine.jsonl")
    assert len(found.split("test")) == 4
    with pytest.raises(DataError, match=r"is missing; there is test; one file is a test split alone, .* train\.jsonl"):
        found.split("train")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"train__jsonl": jsonl([RECORDS[0], RECORDS[1] | {"label": "2"}])},
            "train.jsonl:2: unknown label '2'",
        ),
        ({"train__tsv": b"text_a\ttext_b\tlabel\na\tb\t 1\n"}, "train.tsv:2: unknown label ' 1'"),
        (
            {"train__jsonl": b'{"text_a": "a", "label": "0"}\n'},
            "train.jsonl:1: the field 'text_b' is missing",
        ),
        ({"train__tsv": b"text_a\ttext_b\tlabel\n"}, "the split 'train' of task toy has no records"),
        ({"train__jsonl": b"\n \n"}, "has no records"),
        ({"dev__jsonl": jsonl(RECORDS)}, "the split 'train' of task toy is missing; there is dev"),
        ({"train__jsonl": jsonl(RECORDS), "train__tsv": b"x"}, "twice, train.jsonl and train.tsv"),
        ({"train__txt": b"x"}, "no train, dev or test file; known endings"),
        ({}, "no train, dev or test file"),
    ],
)
def test_defects_of_a_directory(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    fill(tmp_path, **files)
    with pytest.raises(DataError) as caught:
        open_data(toy(), tmp_path).split("train")
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_directory_above_is_recognised(tmp_path: Path) -> None:
    fill(tmp_path / "toy", train__jsonl=jsonl(RECORDS))
    with pytest.raises(DataError, match=r"did you mean .*toy"):
        open_data(toy(), tmp_path)


def test_report_counts(tmp_path: Path) -> None:
    other = {"text_a": "x", "text_b": "y", "label": "9"}
    fill(
        tmp_path,
        train__jsonl=jsonl([*RECORDS, RECORDS[0], other]),
        dev__jsonl=jsonl([RECORDS[1]]),
        test__jsonl=jsonl([RECORDS[1] | {"label": "0"}, RECORDS[2]]),
    )
    report = open_data(toy(only_listed_labels=True), tmp_path).report()
    assert report.examples == {"train": 5, "dev": 1, "test": 2}
    assert report.skipped == {"train": 1}
    assert report.duplicates == {"train": 1}
    assert report.overlaps == {"train/dev": 1, "train/test": 2, "dev/test": 1}
    assert str(report) == (
        "train 5, dev 1, test 2; skipped: train 1; repeated inputs: train 1; "
        "inputs in two splits: train/dev 1, train/test 2, dev/test 1"
    )


def test_a_split_of_skipped_records_says_so(tmp_path: Path) -> None:
    fill(tmp_path, train__jsonl=jsonl([RECORDS[0] | {"label": "9"}]))
    with pytest.raises(DataError, match="has no records, 1 were skipped"):
        open_data(toy(only_listed_labels=True), tmp_path).split("train")


def test_auto_takes_the_first_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="bbprompt")
    fill(tmp_path / "data" / "folder", train__jsonl=jsonl(RECORDS))
    fill(tmp_path / "empty")
    monkeypatch.setattr(data, "_SAMPLES", tmp_path / "samples")
    task = toy(data="folder")
    here = {"BBPROMPT_DATA": str(tmp_path / "data")}
    assert open_data(task, env=here).source == "path"
    assert "found through BBPROMPT_DATA" in caplog.messages[-1]
    with pytest.raises(UsageError, match="no data for task toy: BBPROMPT_DATA is not set"):
        open_data(task, env={})
    with pytest.raises(UsageError, match="BBPROMPT_DATA has no folder"):
        open_data(task, env={"BBPROMPT_DATA": str(tmp_path / "empty")})
    with pytest.raises(UsageError, match="is not a directory"):
        open_data(task, env={"BBPROMPT_DATA": str(tmp_path / "typo")})
    with pytest.raises(UsageError, match="no sample of task toy is bundled, only none"):
        open_data(task, "sample", env={})

    fill(tmp_path / "samples" / "folder", train__jsonl=jsonl(RECORDS[:2]))
    sample = open_data(task, env={})
    assert (sample.source, sample.id, len(sample.split("train"))) == ("sample", "folder", 2)
    assert len(caplog.messages) == 2
    assert open_data(task, "sample", env=here).source == "sample"
    assert open_data(task, env=here).source == "path"
    with pytest.raises(UsageError, match="no such file or directory"):
        open_data(task, tmp_path / "missing", env=here)


@pytest.mark.skipif("BBPROMPT_DATA" not in os.environ, reason="BBPROMPT_DATA names no data")
def test_the_first_records_of_every_bundled_task_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Callable[..., Any] = data.read_records
    monkeypatch.setattr(data, "read_records", lambda file: itertools.islice(whole(file), 200))
    for name in task_names():
        task = load_task(name)
        found = open_data(task)
        assert found.source == "path", name
        for split in found.splits:
            examples = found.split(split)
            assert examples
            assert all(task.render(example).parts for example in examples)
