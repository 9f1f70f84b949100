"""True few-shot splits: a small train and an equally small dev set, both drawn from the training split.

The papers' rule (Perez et al. 2021, arXiv:2105.11447, for the true few-shot setting; sizes as in PPT,
arXiv:2109.04332, and MP2):

* up to 5 labels: 32 examples on each side in all, balanced: 32 // n a label, and one more for the first
  labels in the task's order until it is 32 (three labels: 11, 11, 10);
* more than 5 labels: 8 a label on each side;
* choice and extraction: 32 on each side at random.

The draw depends on the content of the examples and the seed, not on the order of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bbprompt.errors import DataError, UsageError
from bbprompt.tasks.data import DataSource, data_digest
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import Task

__all__ = ["FewShot", "check_apart", "few_shot", "given", "pool_uids", "sample", "sizes"]

_TOTAL = 32
_MANY_LABELS = 5
_SHOTS_MANY = 8


@dataclass(frozen=True, slots=True)
class FewShot:
    """A few-shot split.

    Attributes:
        train: Examples to score prompts on.
        dev: As many others, to choose among prompts.
        digest: SHA-256 (hex) of both sides, in order, with their labels and answers.
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    digest: str


def sizes(task: Task, shots: int | None = None) -> tuple[int, ...]:
    """Return how many examples go to each side: one number a label, or a single one for the whole.

    Args:
        task: The task; its own `shots` counts where the argument is None.
        shots: Examples a label on each side (choice and extraction: in all); None: the task's, else the rule.

    Raises:
        UsageError: `shots` is below 1.
    """
    shots = task.shots if shots is None else shots
    if shots is not None and shots < 1:
        raise UsageError(f"--shots: must be at least 1, got {shots}")
    n_labels = len(task.options)
    if not task.labelled:
        return (shots or _TOTAL,)
    if shots is not None:
        return (shots,) * n_labels
    if n_labels > _MANY_LABELS:
        return (_SHOTS_MANY,) * n_labels
    base, extra = divmod(_TOTAL, n_labels)
    return tuple(base + (i < extra) for i in range(n_labels))


def sample(
    task: Task,
    train: Sequence[Example],
    seed: int,
    shots: int | None = None,
    allow_conflicts: bool = False,
) -> FewShot:
    """Draw a few-shot split from a training split.

    An input that stands several times counts once, so that it is never on both sides.

    Args:
        task: The task.
        train: The whole training split, in any order.
        seed: Of the draw; not negative.
        shots: As in `sizes`.
        allow_conflicts: Accept an input that stands under two labels (the lower label is taken).

    Returns:
        The split; each side is shuffled.

    Raises:
        DataError: Too few examples of a label, or an input under two labels.
        UsageError: A negative seed or `shots` below 1.
    """
    if seed < 0:
        raise UsageError(f"--seed: must not be negative, got {seed}")
    wanted = sizes(task, shots)
    pool = _distinct(task, train, allow_conflicts)
    rng = np.random.Generator(np.random.PCG64(seed))
    sides: tuple[list[Example], list[Example]] = ([], [])
    for label, size in enumerate(wanted):
        group = [example for example in pool if example.label == label] if task.labelled else pool
        if len(group) < 2 * size:
            what = f"the label {task.options[label]!r}" if task.labelled else "the set"
            raise DataError(
                f"task {task.name}: {what} has {len(group)} different training examples, but {2 * size} are "
                f"needed ({size} to train and {size} for dev); add data or lower --shots"
            )
        order = rng.permutation(len(group))
        sides[0].extend(group[i] for i in order[:size])
        sides[1].extend(group[i] for i in order[size : 2 * size])
    few, dev = (tuple(side[i] for i in rng.permutation(len(side))) for side in sides)
    return FewShot(few, dev, _digest(few, dev))


def given(task: Task, train: Sequence[Example], dev: Sequence[Example]) -> FewShot:
    """Take two sets as they are, as some benchmarks fix them (FewGLUE, FewCLUE).

    Raises:
        DataError: An input stands in both, or one under two labels.
    """
    for side in (train, dev):
        _distinct(task, side, allow_conflicts=False)
    if both := {example.uid for example in train} & {example.uid for example in dev}:
        raise DataError(
            f"task {task.name}: {len(both)} inputs stand in train and in dev, which `few_shot: given` takes as they "
            "are; remove them from one"
        )
    return FewShot(tuple(train), tuple(dev), _digest(train, dev))


def few_shot(task: Task, data: DataSource, seed: int, shots: int | None = None) -> FewShot:
    """The few-shot split of a task: drawn by the seed, or the data's own.

    Raises:
        DataError: As `sample` and `given`; or the split is given, and there is no test split beside it.
        UsageError: As `sample`; or `shots` of a given split.
    """
    if task.few_shot == "drawn":
        train = data.split("train")
        try:
            return sample(task, train, seed, shots)
        except DataError as error:
            raise DataError(f"{data.id}, train: {error}") from error
    if shots is not None:
        raise UsageError(f"--shots {shots}: the task {task.name} has a few-shot split of its own; leave it out")
    if "test" not in data.splits:
        raise DataError(
            f"{data.id}: no test split; dev is used up by the few-shot split that {task.name} takes as given"
        )
    return given(task, data.split("train"), data.split("dev"))


def check_apart(task: Task, few: FewShot, test: Sequence[Example]) -> None:
    """See that no few-shot input stands in the test split.

    Raises:
        DataError: Some do; the first five are shown.
    """
    tested = {example.uid for example in test}
    both = [example for example in (*few.train, *few.dev) if example.uid in tested]
    if both:
        shown = "; ".join(repr(" | ".join(example.fields.values()))[:60] for example in both[:5])
        raise DataError(
            f"task {task.name}: {len(both)} of {len(few.train) + len(few.dev)} few-shot inputs stand in the test split "
            f"too: {shown}; remove them from train, take another --seed, or pass --allow-overlap"
        )


def pool_uids(
    task: Task,
    train: Sequence[Example],
    seeds: Iterable[int],
    shots: int | None = None,
    allow_conflicts: bool = False,
) -> frozenset[str]:
    """Return the uids of all that `sample` draws over some seeds, for pre-training to leave out.

    A uid is that of the input, so leaving out all examples with these uids leaves out repeats as well.
    """
    splits = (sample(task, train, seed, shots, allow_conflicts) for seed in seeds)
    return frozenset(example.uid for split in splits for example in (*split.train, *split.dev))


def _digest(train: Sequence[Example], dev: Sequence[Example]) -> str:
    return hashlib.sha256(f"{data_digest(train)} {data_digest(dev)}".encode()).hexdigest()


def _distinct(task: Task, train: Sequence[Example], allow_conflicts: bool) -> list[Example]:
    """Return one example an input, sorted by content."""
    ordered = sorted(train, key=lambda example: (example.uid, example.label, _answer_key(example)))
    pool: list[Example] = []
    conflicts: list[Example] = []
    for example in ordered:
        if pool and pool[-1].uid == example.uid:
            if pool[-1].label != example.label:
                conflicts.append(example)
            continue
        pool.append(example)
    if conflicts and not allow_conflicts:
        shown = "; ".join(repr(" | ".join(example.fields.values())[:50]) for example in conflicts[:5])
        raise DataError(
            f"task {task.name}: {len(conflicts)} training inputs stand under two labels, such as {shown}; "
            "correct them, or allow conflicts"
        )
    return pool


def _answer_key(example: Example) -> tuple[tuple[int, str], ...]:
    return tuple((answer.start, answer.text) for answer in example.answers)
