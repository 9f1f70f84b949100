"""The upstream mixture: several tasks in every step, options shuffled and thinned out, texts kept short."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import DataError
from bbprompt.pretrain.model import Batch, SpanBatch, collate
from bbprompt.pretrain.schedule import positions, visits
from bbprompt.pretrain.tokens import TokenStore
from bbprompt.tasks.data import data_digest
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import Task
from bbprompt.texts.mrc import Encoded, Frame, Offsets, encode

__all__ = ["Batches", "Mixture", "Upstream", "is_fixed", "thin_options"]


class Batches(Protocol):
    """Where training and validation batches come from."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks; a batch speaks of them by index."""
        ...

    @property
    def sources(self) -> tuple[str, ...]:
        """A line for each with where its texts come from, under which terms."""
        ...

    @property
    def digests(self) -> dict[str, str]:
        """Task -> digest of the examples that are trained and validated on."""
        ...

    def batch(self, step: int, part: int = 0) -> Batch:
        """Slice `part` of the batch of `step` (both from 0); depends on nothing else."""
        ...

    def valid(self, index: int, limit: int, size: int) -> Sequence[Batch]:
        """Validation batches of one task: its first `limit` validation examples, `size` a batch."""
        ...


@dataclass(frozen=True, slots=True)
class Upstream:
    """One upstream task with what may be trained on and what checks it.

    Attributes:
        task: The task.
        train: Training examples.
        valid: Validation examples.
        encoded: `train`, then `valid`, as tokens; None to encode them when they are drawn.
        where: File and line of the example with this uid, for messages.
    """

    task: Task
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    encoded: TokenStore | None = None
    where: Callable[[str], str] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what is trained and validated on, and of how it is put."""
        text = f"{self.task.template}\n{data_digest(self.train)}\n{data_digest(self.valid)}"
        return hashlib.sha256(text.encode()).hexdigest()


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


def is_fixed(example: Example, limit: int, characters: int, shuffle: bool) -> bool:
    """Whether `thin_options` gives this example back unchanged, whatever is drawn."""
    options = example.options
    if not options:
        return True
    return not shuffle and (len(options) == 2 or (len(options) <= limit and sum(map(len, options)) <= characters))


class Mixture:
    """Draws batches of `tasks_per_step` tasks with `per_task` examples each.

    Tasks are visited in random order, each as often in a round as its weight says (1 where none is given); within a
    task examples are visited in random order, epoch after epoch. Everything follows from the seed and the step, so a
    resumed training sees the same batches. A step may have several `slices` of that size: part p of a step holds
    every `slices`-th example of each of its tasks, from the p-th on.
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
        slices: int = 1,
        bucket: int = 1,
    ) -> None:
        self.tasks = tuple(tasks)
        self._copies = [(weights or {}).get(upstream.task.name, 1) for upstream in self.tasks]
        self._tokenize, self._frame = tokenize, frame
        self._seed, self._per_step, self._size = seed, tasks_per_step, per_task * slices
        self._slices, self._bucket = slices, bucket
        self._thin = (option_limit, option_characters)
        self._shuffle = shuffle_options
        self._valid: dict[tuple[int, int, int], list[SpanBatch]] = {}
        self._lengths = [self._sizes(upstream) for upstream in self.tasks]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(upstream.task.name for upstream in self.tasks)

    @property
    def sources(self) -> tuple[str, ...]:
        """A line for each task: where its records come from, and their terms."""
        return tuple(f"{u.task.name}: {', '.join(u.task.sources)} ({u.task.terms})" for u in self.tasks)

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each task's examples."""
        return {upstream.task.name: upstream.digest for upstream in self.tasks}

    def batch(self, step: int, part: int = 0) -> SpanBatch:
        """Part `part` of the batch of `step` (both from 0)."""
        rows = [
            (*self._encoded(index, at, self.tasks[index].train[at], example), index, example.uid)
            for index, at, example in self.drawn(step, part)
        ]
        return _collate(rows)

    def drawn(self, step: int, part: int = 0) -> Iterator[tuple[int, int, Example]]:
        """What a part of a step is made of: task, place in its training examples, and the example, thinned out."""
        rng = np.random.default_rng((self._seed, step))
        for index, visit in visits(self._seed, step, self._per_step, self._copies):
            train, lengths = self.tasks[index].train, self._lengths[index]
            chosen = positions(self._seed, index, visit, lengths, self._size, self._bucket)
            for number, at in enumerate(chosen):
                # Drawn for all parts, encoded for this one: parts together are one large batch.
                example = thin_options(train[at], *self._thin, self._shuffle, rng)
                if number % self._slices == part:
                    yield index, at, example

    def checked(self, index: int, limit: int) -> list[Example]:
        """The first `limit` validation examples of a task, thinned out.

        Which distractors stay depends on the example alone, so that every validation sees the same.
        """
        return [
            thin_options(whole, *self._thin, False, np.random.default_rng(int(whole.uid, 16)))
            for whole in self.tasks[index].valid[:limit]
        ]

    def valid(self, index: int, limit: int, size: int) -> list[SpanBatch]:
        """Validation batches of one task: its first `limit` validation examples, `size` a batch."""
        key = (index, limit, size)
        if key not in self._valid:
            upstream = self.tasks[index]
            rows = []
            for number, example in enumerate(self.checked(index, limit)):
                whole = upstream.valid[number]
                encoded = self._encoded(index, len(upstream.train) + number, whole, example, shuffled=False)
                rows.append((*encoded, index, example.uid))
            self._valid[key] = [_collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        return self._valid[key]

    def _sizes(self, upstream: Upstream) -> NDArray[np.int64]:
        if upstream.encoded is not None:
            return upstream.encoded.lengths[: len(upstream.train)]
        rendered = (upstream.task.render(example) for example in upstream.train)
        return np.asarray([sum(len(part.text) for part in form.parts) for form in rendered])

    def _encoded(
        self, index: int, at: int, whole: Example, example: Example, shuffled: bool | None = None
    ) -> tuple[Encoded, int]:
        """Tokens of an example and which option is right, from the store where drawing changes nothing."""
        upstream = self.tasks[index]
        shuffle = self._shuffle if shuffled is None else shuffled
        if upstream.encoded is not None and is_fixed(whole, *self._thin, shuffle):
            return upstream.encoded[at]
        while True:
            try:
                form = upstream.task.render(example)
                return encode(form, self._tokenize, self._frame, example.answers), example.label
            except DataError as error:
                # What was drawn may be longer in tokens than what was tried, though not in characters.
                if len(example.options) <= 2:
                    where = upstream.where(example.uid) if upstream.where else f"example {example.uid}"
                    raise DataError(f"{where}: task {upstream.task.name}: {error}") from error
            drop = len(example.options) - 1 - (example.label == len(example.options) - 1)
            options = example.options[:drop] + example.options[drop + 1 :]
            example = replace(example, options=options, label=example.label - (drop < example.label))


def _collate(rows: Sequence[tuple[Encoded, int, int, str]]) -> SpanBatch:
    encoded, gold, members, uids = zip(*rows, strict=True)
    return collate(encoded, gold, members, uids)
