"""The bundled sample: its sizes and balance, and that its labels cannot be read off the surface.

Run: `pytest tests/test_sample.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

import bbprompt
from bbprompt.tasks.task import load_task

SAMPLE = Path(bbprompt.__file__).parent / "bundled" / "samples" / "lcqmc"
SIZES = {"train": 64, "dev": 64, "test": 320}
SPLITS = sorted(SIZES)

Record = dict[str, str]


def lines(split: str) -> list[str]:
    return (SAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()


def records(split: str) -> list[Record]:
    return [json.loads(line) for line in lines(split)]


def everything() -> list[Record]:
    return [record for split in SPLITS for record in records(split)]


def plain(sentence: str) -> str:
    """Fold case and drop everything but letters and digits, so that punctuation cannot hide a copy."""
    return "".join(character for character in sentence.casefold() if character.isalnum())


def sentences(split: str) -> set[str]:
    return {plain(record[field]) for record in records(split) for field in ("text_a", "text_b")}


def overlap(record: Record) -> float:
    """Jaccard index of the two questions' sets of character bigrams, in [0, 1]."""
    a, b = (
        {sentence[i : i + 2] for i in range(len(sentence) - 1)} for sentence in (record["text_a"], record["text_b"])
    )
    return len(a & b) / len(a | b)


def best_threshold(values: list[float], labels: list[str]) -> float:
    """Accuracy of the best rule `value >= t means one label`, either way round, chosen on the data itself."""
    best = 0.0
    for threshold in set(values):
        hits = sum((value >= threshold) == (label == "1") for value, label in zip(values, labels, strict=True))
        best = max(best, hits, len(values) - hits)
    return best / len(values)


@pytest.mark.parametrize("split", SPLITS)
def test_split_has_its_size_and_is_balanced(split: str) -> None:
    assert Counter(record["label"] for record in records(split)) == dict.fromkeys("01", SIZES[split] // 2)


@pytest.mark.parametrize("split", SPLITS)
def test_records_have_the_form_of_the_task(split: str) -> None:
    labels = set(load_task("lcqmc").labels)
    for record in records(split):
        assert list(record) == ["text_a", "text_b", "label"]
        assert record["label"] in labels


@pytest.mark.parametrize("split", SPLITS)
def test_files_hold_readable_characters(split: str) -> None:
    assert (SAMPLE / f"{split}.jsonl").read_bytes().endswith(b"}\n")
    assert not [line for line in lines(split) if "\\u" in line]


@pytest.mark.parametrize("split", SPLITS)
def test_lines_are_shuffled(split: str) -> None:
    labels = [record["label"] for record in records(split)]
    changes = sum(a != b for a, b in pairwise(labels))
    assert changes > len(labels) / 3


def test_sentences_are_short_and_trimmed() -> None:
    for record in everything():
        for field in ("text_a", "text_b"):
            assert 4 <= len(record[field]) <= 40, record
            assert record[field] == record[field].strip(), record


def test_no_sentence_occurs_twice() -> None:
    counts = Counter(plain(record[field]) for record in everything() for field in ("text_a", "text_b"))
    assert [sentence for sentence, n in counts.items() if n > 1] == []
    assert len(counts) == 2 * sum(SIZES.values())


@pytest.mark.parametrize(("one", "other"), [("train", "dev"), ("train", "test"), ("dev", "test")])
def test_splits_share_no_sentence(one: str, other: str) -> None:
    assert sentences(one).isdisjoint(sentences(other))


@pytest.mark.parametrize("split", SPLITS)
def test_hard_negatives_exist(split: str) -> None:
    other_intent = [overlap(record) for record in records(split) if record["label"] == "0"]
    assert sum(value >= 0.4 for value in other_intent) / len(other_intent) >= 0.35


@pytest.mark.parametrize("split", SPLITS)
def test_free_paraphrases_exist(split: str) -> None:
    same_intent = [overlap(record) for record in records(split) if record["label"] == "1"]
    assert sum(value < 0.2 for value in same_intent) / len(same_intent) >= 0.25


def test_surface_does_not_give_the_label_away() -> None:
    test = records("test")
    labels = [record["label"] for record in test]
    lengths = [(len(record["text_a"]), len(record["text_b"])) for record in test]
    assert best_threshold([overlap(record) for record in test], labels) <= 0.72
    assert best_threshold([float(abs(a - b)) for a, b in lengths], labels) <= 0.66
    assert best_threshold([float(a + b) for a, b in lengths], labels) <= 0.66
