"""The upstream mixture: several tasks in every step, options shuffled and thinned out, texts kept short."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bbprompt.errors import DataError
from bbprompt.example import Example
from bbprompt.mrc import Encoded, Frame, Offsets, encode
from bbprompt.pretrain.model import SpanBatch, collate
from bbprompt.task import Task

__all__ = ["Mixture", "Upstream", "thin_options"]


@dataclass(frozen=True, slots=True)
class Upstream:
    """One upstream task with what may be trained on and what checks it."""

    task: Task
    train: tuple[Example, ...]
    valid: tuple[Example, ...]


def thin_options(example: Example, limit: int, characters: int, shuffle: bool, rng: np.random.Generator) -> Example:
    """Keep the right option and as many others as the limits allow, in random order with `shuffle`.

    Tasks of many or long options would otherwise fill the sequence with them, and a fixed order would let a
    router learn positions instead of words.

    Args:
        example: Any example; one without options is returned as it is.
        limit: Most options that stay, at least 2.
        characters: Most characters of options that stay; two options stay in any case.
        shuffle: Put what stays in random order.
        rng: Where chance comes from.
    """
    if not example.options:
        return example
    kept = [example.label]
    left = characters - len(example.options[example.label])
    for other in rng.permutation(len(example.options)).tolist():
        size = len(example.options[other])
        if other != example.label and len(kept) < limit and (size <= left or len(kept) == 1):
            kept.append(other)
            left -= size
    kept = rng.permutation(kept).tolist() if shuffle else sorted(kept)
    options = tuple(example.options[i] for i in kept)
    return replace(example, options=options, label=kept.index(example.label))


class Mixture:
    """Draws batches of `tasks_per_step` tasks with `per_task` examples each.

    Tasks are visited in random order, each as often in a round as its weight says (1 where none is given); within a
    task examples are visited in random order, epoch after epoch. Everything follows from the seed and the step, so a
    resumed training sees the same batches.
    """

    def __init__(
        self,
        tasks: Sequence[Upstream],
        tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
        frame: Frame,
        *,
        seed: int,
        tasks_per_step: int,
        per_task: int,
        option_limit: int,
        option_characters: int,
        shuffle_options: bool,
        weights: Mapping[str, int] | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        copies = [(weights or {}).get(upstream.task.name, 1) for upstream in self.tasks]
        # What a round goes through: (task, how often it stands in a round, which of these times it is).
        self._round = [(index, times, copy) for index, times in enumerate(copies) for copy in range(times)]
        self._tokenize, self._frame = tokenize, frame
        self._seed, self._per_step, self._per_task = seed, tasks_per_step, per_task
        self._thin = (option_limit, option_characters)
        self._shuffle = shuffle_options

    def batch(self, step: int) -> SpanBatch:
        """The batch of `step` (from 0)."""
        rng = np.random.default_rng((self._seed, step))
        encoded: list[Encoded] = []
        gold: list[int] = []
        members: list[int] = []
        for index, visit in self._drawn(step):
            for example in self._examples(index, visit, rng):
                encoded.append(self._encode(index, example))
                gold.append(example.label)
                members.append(index)
        return collate(encoded, gold, members)

    def valid(self, index: int, limit: int, size: int) -> list[SpanBatch]:
        """Validation batches of one task: its first `limit` validation examples, `size` a batch."""
        items = [
            # Which distractors stay depends on the example alone, so that every validation sees the same.
            thin_options(e, *self._thin, False, np.random.default_rng(int(e.uid, 16)))
            for e in self.tasks[index].valid[:limit]
        ]
        return [
            collate(
                [self._encode(index, e) for e in items[i : i + size]],
                [e.label for e in items[i : i + size]],
                [index] * len(items[i : i + size]),
            )
            for i in range(0, len(items), size)
        ]

    def _drawn(self, step: int) -> list[tuple[int, int]]:
        """Tasks of this step and how often each was drawn before: rounds through all in random orders."""
        size = len(self._round)
        drawn = []
        for position in range(step * self._per_step, (step + 1) * self._per_step):
            number, place = divmod(position, size)
            order = np.random.default_rng((self._seed, 1, number)).permutation(size)
            index, times, copy = self._round[int(order[place])]
            drawn.append((index, number * times + copy))
        return drawn

    def _examples(self, index: int, visit: int, rng: np.random.Generator) -> list[Example]:
        train = self.tasks[index].train
        chosen = []
        for position in range(visit * self._per_task, (visit + 1) * self._per_task):
            epoch, place = divmod(position, len(train))
            order = np.random.default_rng((self._seed, 2, index, epoch)).permutation(len(train))
            chosen.append(thin_options(train[int(order[place])], *self._thin, self._shuffle, rng))
        return chosen

    def _encode(self, index: int, example: Example) -> Encoded:
        task = self.tasks[index].task
        try:
            return encode(task.render(example), self._tokenize, self._frame, example.answers)
        except DataError as error:
            raise DataError(f"task {task.name}, example {example.uid}: {error}") from error
