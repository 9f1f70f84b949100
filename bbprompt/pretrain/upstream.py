"""Upstream data: which tasks, which of their examples, and what must be left out."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bbprompt.errors import DataError, UsageError
from bbprompt.pretrain.mixture import Upstream, is_fixed
from bbprompt.pretrain.tokens import FORMAT, stored
from bbprompt.tasks.data import DATA_VARIABLE, DataSource, data_digest, open_data
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import pool_uids
from bbprompt.tasks.recordfile import FORMATS
from bbprompt.tasks.task import Task, load_task, task_names
from bbprompt.texts.mrc import Encoded, Frame, Offsets, encode

__all__ = ["data_beside", "evaluation_inputs", "load_upstream", "upstream_tasks"]

#: Of so many training examples, or the rest of them, one at most is validated on, where there is no dev split.
_HELD_OUT = 5

log = logging.getLogger("bbprompt")


def upstream_tasks(wanted: Sequence[str] | str) -> list[Task]:
    """The tasks of a recipe.

    Args:
        wanted: Names and YAML files; "upstream" for every bundled task of the tracks `upstream` and `seen`; or a
            directory, for the `*.yaml` in it and the `task.yaml` in each folder of it.

    Raises:
        UsageError: There is no such task, two have one name, or one belongs to the evaluation side.
    """
    if wanted == "upstream":
        tasks = [load_task(name) for name in task_names()]
        return [task for task in tasks if task.track in ("upstream", "seen")]
    tasks = [load_task(name, "tasks") for name in _listed(wanted)]
    for task in tasks:
        if task.track in ("unseen", "unseen-relative"):
            raise UsageError(f"tasks: '{task.name}' is of track {task.track} and must not be trained on; remove it")
        if [other.name for other in tasks].count(task.name) > 1:
            raise UsageError(f"tasks: two tasks have the name '{task.name}'; rename one")
    return tasks


def data_beside(wanted: Sequence[str] | str) -> dict[str, Path]:
    """Data directories that lie beside the YAML files of a recipe, by the name of the task.

    A task's data are the folder of its YAML file, where that has a training file, or the folder of the task's name
    beside the YAML file.
    """
    places: dict[str, Path] = {}
    if wanted == "upstream":
        return places
    for name in _listed(wanted):
        if not name.endswith((".yaml", ".yml")):
            continue
        task, folder = load_task(name), Path(name).parent
        if any((folder / f"train{ending}").is_file() for ending in FORMATS):
            places[task.name] = folder
        elif (folder / task.folder).is_dir():
            places[task.name] = folder / task.folder
    return places


def _listed(wanted: Sequence[str] | str) -> list[str]:
    """Names and files of tasks."""
    if not isinstance(wanted, str):
        return list(wanted)
    folder = Path(wanted)
    if not folder.is_dir():
        raise UsageError(f"tasks: '{wanted}' is no directory; write 'upstream', a list, or a directory of task files")
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*/task.yaml")])
    if not files:
        raise UsageError(f"tasks: {folder} has no *.yaml and no */task.yaml")
    return [str(file) for file in files]


def load_upstream(
    tasks: Sequence[Task],
    data: Path | None,
    *,
    tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
    frame: Frame,
    option_limit: int,
    option_characters: int,
    spare_seeds: Sequence[int],
    cap: int,
    valid: int,
    seed: int,
    places: Mapping[str, Path] | None = None,
    cache: Path | None = None,
    tokenizer_digest: str = "",
    shuffle: bool = False,
) -> list[Upstream]:
    """Read every task's training examples and some to validate on, and turn them into tokens once.

    From a `seen` task the few-shot pools of `spare_seeds` are left out, so that tuning on them later is true
    few-shot; from every task, and from what is validated on, what a test split of the evaluation side holds as well
    (`evaluation_inputs`). Validation comes from the dev split, unless a `seen` task has no test split and is tested on
    that one; else a fifth at most, rounded up, of the shuffled training split is kept for it. Examples whose question
    and options alone do not fit are left out and counted.

    Args:
        tasks: The tasks.
        data: Directory of data directories; None for `BBPROMPT_DATA` and the hub.
        tokenize: Text to tokens.
        frame: What surrounds a text, and the length limit.
        option_limit: Most options that stay.
        option_characters: Most characters of options that stay.
        spare_seeds: Seeds whose few-shot pools are left out of `seen` tasks.
        cap: Most training examples of a task.
        valid: Validation examples of a task.
        seed: Of what is drawn.
        places: Data directories of tasks that `data` has no folder for.
        cache: Where tokens are kept; None for not at all.
        tokenizer_digest: Names the tokenizer in the cache.
        shuffle: Whether options are shuffled later.

    Raises:
        DataError: A task's data are missing or wrong, or nothing of a task is left.
    """
    loaded = []
    tested = evaluation_inputs(data)
    for task in tasks:
        source = _open(task, data, places or {})
        train = source.split("train")
        if task.track == "seen":
            spared = pool_uids(task, train, spare_seeds)
            train = [example for example in train if example.uid not in spared]
        clean = [example for example in train if _texts(example) not in tested]
        if len(clean) < len(train):
            log.info("%s: left out %d examples that stand in a test split", task.name, len(train) - len(clean))
        # Without a test split its dev split is what `tune` tests on.
        spent = task.track == "seen" and "test" not in source.splits
        dev = source.split("dev") if "dev" in source.splits and not spent else []
        unseen = [example for example in dev if _texts(example) not in tested]
        pool = _Pool(task, clean, unseen or None, tokenize, frame)
        limits, held = (option_limit, option_characters), pool.held_out(valid)

        def examples(
            notes: dict[str, int], pool: _Pool = pool, limits: tuple[int, int] = limits, held: int = held
        ) -> Iterator[tuple[int, Encoded, int]]:
            return pool.draw(notes, limits, cap, held, seed, shuffle)

        if cache is None:
            notes: dict[str, int] = {}
            keys, store = [key for key, _, _ in examples(notes)], None
        else:
            store = stored(cache, pool.digest(limits, cap, held, seed, shuffle, tokenizer_digest), examples)
            keys, notes = store.keys.tolist(), store.notes
        kept = tuple(pool.train[key] for key in keys[: notes["train"]])
        check = tuple(pool.checked[key] for key in keys[notes["train"] :])
        if not kept and not check:
            raise DataError(f"task {task.name}: no example fits {frame.limit} tokens; raise max_tokens")
        if not kept or not check:
            lacks = "validate" if kept else "train"
            raise DataError(
                f"task {task.name}: no example is left to {lacks} on; add examples or a dev split, or raise "
                f"max_tokens above {frame.limit}"
            )
        log.info("%s: %d of %d examples, %d to validate", task.name, len(kept), len(pool.train), len(check))
        loaded.append(Upstream(task, kept, check, store, source.where))
    return loaded


def _open(task: Task, data: Path | None, places: Mapping[str, Path]) -> DataSource:
    """The task's data: in `data`, beside its YAML file, or where `tune` would find them."""
    beside = places.get(task.name)
    if data is not None and ((data / task.folder).is_dir() or beside is None):
        source = open_data(task, data / task.folder)
    else:
        source = open_data(task, beside if beside is not None else "auto")
    if source.source == "sample":
        raise DataError(f"task {task.name}: pre-training needs the real data; give --data or set BBPROMPT_DATA")
    return source


class _Pool:
    """What may be drawn of one task: training examples, and where there is a dev split what is validated on."""

    def __init__(
        self,
        task: Task,
        train: Sequence[Example],
        dev: Sequence[Example] | None,
        tokenize: Callable[[str], tuple[Sequence[int], Offsets]],
        frame: Frame,
    ) -> None:
        self.task, self.train, self.dev = task, list(train), dev
        self._tokenize, self._frame = tokenize, frame

    @property
    def checked(self) -> Sequence[Example]:
        """Where validation examples are drawn from."""
        return self.train if self.dev is None else self.dev

    def held_out(self, wanted: int) -> int:
        """How many examples are validated on, where so many are wanted."""
        return min(wanted, -(-len(self.train) // _HELD_OUT)) if self.dev is None else wanted

    def digest(self, *settings: object) -> str:
        """Names everything that decides what is drawn and how it is encoded."""
        parts = [self.task.model_dump_json(), data_digest(self.train), data_digest(self.dev or ()), self._frame]
        text = "\n".join(map(repr, (FORMAT, *parts, *settings)))
        return hashlib.sha256(text.encode()).hexdigest()

    def draw(
        self, notes: dict[str, int], limits: tuple[int, int], cap: int, valid: int, seed: int, shuffle: bool
    ) -> Iterator[tuple[int, Encoded, int]]:
        """Yield what is trained on, then what is validated on: index, tokens, right option."""
        check = list(self._fitting(self.checked, range(len(self.checked)), valid, 1, limits, seed, False))
        held = {self.train[index].uid for index, _, _ in check} if self.dev is None else set()
        rest = [index for index, example in enumerate(self.train) if example.uid not in held]
        notes["train"] = 0
        for item in self._fitting(self.train, rest, cap, 0, limits, seed, shuffle):
            notes["train"] += 1
            yield item
        yield from check

    def _fitting(
        self,
        examples: Sequence[Example],
        among: Sequence[int],
        size: int,
        salt: int,
        limits: tuple[int, int],
        seed: int,
        shuffle: bool,
    ) -> Iterator[tuple[int, Encoded, int]]:
        left = size
        for place in np.random.default_rng((seed, salt)).permutation(len(among)).tolist():
            if not left:
                return
            index = among[place]
            example = examples[index]
            worst = _longest_options(example, *limits)
            try:
                if worst is None:
                    continue
                # Where nothing is drawn, what is tried is what will be trained on.
                tried = example if is_fixed(example, *limits, shuffle) else worst
                encoded = encode(self.task.render(tried), self._tokenize, self._frame, tried.answers)
            except DataError:
                continue
            left -= 1
            yield index, encoded, example.label


def evaluation_inputs(data: Path | None) -> frozenset[tuple[str, ...]]:
    """The field contents of every example in the test splits of the tracks `seen` and `unseen`.

    Data sets share texts (two may be drawn from one site), so a training split may hold another task's test texts.
    Tasks whose data are not in `data` (None: `BBPROMPT_DATA`) are named in the log.

    Raises:
        DataError: A bundled evaluation task's data are wrong.
    """
    root = data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    inputs: set[tuple[str, ...]] = set()
    unknown = []
    for task in (load_task(name) for name in task_names()):
        if task.track not in ("seen", "unseen"):
            continue
        if root is None or not (root / task.folder).is_dir():
            unknown.append(task.name)
            continue
        inputs.update(_texts(example) for example in open_data(task, root / task.folder).split("test"))
    if unknown:
        log.warning("test texts of %s are not at hand: they cannot be left out of the training", ", ".join(unknown))
    return frozenset(inputs)


def _texts(example: Example) -> tuple[str, ...]:
    return tuple(sorted(example.fields.values()))


def _longest_options(example: Example, limit: int, characters: int) -> Example | None:
    """The example with the longest options that thinning may leave; None where two are too long already."""
    if not example.options:
        return example
    right = example.options[example.label]
    others = sorted((o for i, o in enumerate(example.options) if i != example.label), key=len, reverse=True)
    if len(right) + len(others[0]) > characters:
        return None
    kept, left = [right], characters - len(right)
    for option in others:
        if len(kept) < limit and len(option) <= left:
            kept.append(option)
            left -= len(option)
    return replace(example, options=tuple(kept), label=0)
