"""Few-shot splits: balanced, disjoint, and a function of content and seed alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_prompt
from depth import deep
from hypothesis import given, settings
from hypothesis import strategies as st

from bbprompt.errors import DataError, UsageError
from bbprompt.tasks.data import open_data
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import few_shot, pool_uids, sample, sizes
from bbprompt.tasks.task import Task


def labelled(n_labels: int, **keys: Any) -> Task:
    base: dict[str, Any] = {
        "name": "toy",
        "type": "single",
        "template": "{text}",
        "labels": {str(i): f"词{i}" for i in range(n_labels)},
        "metric": "accuracy",
        "sources": ["hand-written"],
    }
    return Task.model_validate(base | keys)


EXTRACTIVE = labelled(0, type="extractive", template="{context}", metric="f1")
CHOICE = labelled(0, type="choice", template="{query}")


def examples(task: Task, each: int) -> list[Example]:
    if task is EXTRACTIVE:
        records: list[dict[str, Any]] = [
            {"context": f"文{i}", "answers": [{"text": "文", "start": 0}]} for i in range(each)
        ]
    elif task is CHOICE:
        records = [{"query": f"问{i}", "choices": ["一", "二"], "label": i % 2} for i in range(each)]
    else:
        records = [{"text": f"{raw}号{i}", "label": raw} for raw in task.labels for i in range(each)]
    return [task.example(record) for record in records]


def counts(side: Sequence[Example]) -> list[int]:
    return [count for _, count in sorted(Counter(example.label for example in side).items())]


@pytest.mark.parametrize(
    ("n_labels", "expected"),
    [(2, [16, 16]), (3, [11, 11, 10]), (4, [8] * 4), (5, [7, 7, 6, 6, 6]), (6, [8] * 6), (30, [8] * 30)],
)
def test_the_papers_rule(n_labels: int, expected: list[int]) -> None:
    task = labelled(n_labels)
    split = sample(task, examples(task, 40), seed=8)
    assert counts(split.train) == counts(split.dev) == expected == list(sizes(task))


@pytest.mark.parametrize("task", [CHOICE, EXTRACTIVE])
def test_unlabelled_types_take_32_at_random(task: Task) -> None:
    split = sample(task, examples(task, 100), seed=8)
    assert len(split.train) == len(split.dev) == 32
    assert len({example.uid for example in split.train + split.dev}) == 64
    assert len(sample(task, examples(task, 100), seed=8, shots=5).dev) == 5


def test_shots_override() -> None:
    assert sizes(labelled(2), 3) == (3, 3)
    assert sizes(labelled(2, shots=4)) == (4, 4)
    assert sizes(labelled(2, shots=4), 3) == (3, 3)
    with pytest.raises(UsageError, match="--shots"):
        sizes(labelled(2), 0)
    with pytest.raises(UsageError, match="--seed"):
        sample(labelled(2), examples(labelled(2), 40), seed=-1)


@settings(max_examples=deep(40))
@given(
    n_labels=st.integers(2, 8),
    shots=st.none() | st.integers(1, 6),
    seed=st.integers(0, 2**63),
    order=st.randoms(use_true_random=False),
)
def test_balance_disjointness_and_order_independence(
    n_labels: int, shots: int | None, seed: int, order: random.Random
) -> None:
    task = labelled(n_labels)
    train = examples(task, 34)
    split = sample(task, train, seed, shots)
    assert counts(split.train) == counts(split.dev) == list(sizes(task, shots))
    uids = [example.uid for example in split.train + split.dev]
    assert len(set(uids)) == len(uids)
    assert {example.uid for example in train} >= set(uids)

    shuffled = train + order.choices(train, k=20)
    order.shuffle(shuffled)
    assert sample(task, shuffled, seed, shots) == split


def test_seeds_differ() -> None:
    task = labelled(2)
    train = examples(task, 200)
    assert len({sample(task, train, seed).digest for seed in (8, 13, 21, 42, 100)}) == 5


def test_the_draw_is_pinned() -> None:
    # A run that is resumed or repeated next year must find the same few-shot split.
    task = labelled(2)
    assert (
        sample(task, examples(task, 40), seed=42).digest
        == "b954b5c9513909b55f5b3ecaa0e7042bfc3d41ccbb37a48f4776886a5ea5a038"
    )


def test_repeats_are_never_on_both_sides() -> None:
    task = labelled(2)
    with pytest.raises(DataError, match="has 16 different training examples, but 32 are needed"):
        sample(task, examples(task, 16) * 4, seed=8)


def test_too_few_examples_of_a_label() -> None:
    task = labelled(3)
    train = [example for example in examples(task, 22) if example.label != 1] + examples(task, 9)
    with pytest.raises(DataError, match=r"'词1' has 9 different training examples, but 22 are needed \(11 to train"):
        sample(task, train, seed=8)
    with pytest.raises(DataError, match="the set has 10"):
        sample(CHOICE, examples(CHOICE, 10), seed=8)


def test_one_input_under_two_labels() -> None:
    task = labelled(2)
    train = [*examples(task, 40), *(task.example({"text": f"0号{i}", "label": "1"}) for i in range(7))]
    with pytest.raises(DataError, match="7 training inputs stand under two labels, such as '0号"):
        sample(task, train, seed=8)
    split = sample(task, train, seed=8, allow_conflicts=True)
    assert split == sample(task, examples(task, 40), seed=8)


def test_answers_that_differ_are_no_conflict() -> None:
    twice = {"context": "文0文", "answers": [{"text": "文", "start": 0}]}
    other = {"context": "文0文", "answers": [{"text": "文", "start": 2}]}
    train = [*examples(EXTRACTIVE, 64), *(EXTRACTIVE.example(record) for record in (other, twice))]
    assert sample(EXTRACTIVE, train, seed=8) == sample(EXTRACTIVE, train[::-1], seed=8)


def test_pool_uids_cover_every_seed() -> None:
    task = labelled(2)
    train = examples(task, 200)
    pool = pool_uids(task, train, [8, 13])
    for seed in (8, 13):
        split = sample(task, train, seed)
        assert {example.uid for example in split.train + split.dev} <= pool
    assert 64 < len(pool) <= 128
    assert pool_uids(task, train, []) == frozenset()


def test_a_split_that_the_data_fix_is_taken_as_it_is(tmp_path: Path) -> None:
    task = Task.model_validate(tiny_prompt.PAIR | {"few_shot": "given"})
    rows = tiny_prompt.pair_records(21, 5)
    splits = {"train": rows[:5], "dev": rows[5:12], "test": rows[12:]}
    data = open_data(task, str(tiny_prompt.data_dir(tmp_path / "whole", tiny_prompt.PAIR, splits)))
    few = few_shot(task, data, seed=1)
    assert [example.fields["text_a"] for example in few.train] == [row["text_a"] for row in rows[:5]]
    assert [example.fields["text_a"] for example in few.dev] == [row["text_a"] for row in rows[5:12]]
    assert few_shot(task, data, seed=2) == few
    with pytest.raises(UsageError, match=r"--shots 4: .* split of its own"):
        few_shot(task, data, seed=1, shots=4)
    untested = {"train": rows[:5], "dev": rows[5:12]}
    data = open_data(task, str(tiny_prompt.data_dir(tmp_path / "untested", tiny_prompt.PAIR, untested)))
    with pytest.raises(DataError, match="no test split"):
        few_shot(task, data, seed=1)
    shared = splits | {"dev": rows[4:12]}
    data = open_data(task, str(tiny_prompt.data_dir(tmp_path / "shared", tiny_prompt.PAIR, shared)))
    with pytest.raises(DataError, match="1 inputs stand in train and in dev"):
        few_shot(task, data, seed=1)
