"""Orders of demonstrations, and which of them fit."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny_prompt

from bbprompt.errors import DataError
from bbprompt.tasks.example import Form, Part
from bbprompt.tasks.task import Task
from bbprompt.texts.demonstrations import draw_order, write_demonstrations


def characters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]


def shown(text: str, right: int) -> tuple[Form, int]:
    return Form((Part(text, True), Part(" is ", False), Part(".", False)), ("bad", "good"), -1, gap=2), right


def test_orders_are_balanced_from_the_front() -> None:
    task = Task.model_validate(tiny_prompt.SINGLE)
    records = [record for record in tiny_prompt.single_records(28, 1) if record["label"] != "l6"][:23]
    examples = [task.example(record) for record in records]
    orders = [draw_order(examples, 10, number) for number in range(3)]
    for order in orders:
        assert sorted(order) == list(range(23))
        for turn in range(3):
            part = Counter(examples[i].label for i in order[6 * turn : 6 * turn + 6])
            assert part == dict.fromkeys(range(6), 1)
    assert len({*orders, draw_order(examples, 11, 0)}) == 4
    assert draw_order(examples, 10, 0) == orders[0]


def test_whole_demonstrations_up_to_the_first_that_does_not_fit() -> None:
    given = [shown("it", 1), shown("a", 0), shown("something long", 1), shown("b", 0)]
    texts = ["it is good.\n", "a is bad.\n", "something long is good.\n", "b is bad.\n"]
    for room, count in ((11, 0), (12, 1), (21, 1), (22, 2), (40, 2), (46, 3), (55, 3), (56, 4)):
        found = write_demonstrations(given, characters, room)
        assert "".join(map(chr, found.ids)) == "".join(texts[:count])
        assert len(found.gaps) == count
    for gap, word in zip(found.gaps, (" good", " bad", " good", " bad"), strict=True):
        assert "".join(map(chr, found.ids[gap : gap + len(word)])) == word


def test_a_text_without_a_gap_is_refused() -> None:
    with pytest.raises(DataError, match="no gap"):
        write_demonstrations([(Form((Part("a", True),), ("x", "y"), -1), 0)], characters, 10)
