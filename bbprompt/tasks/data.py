"""Data sources: where the examples of a task come from, and what is in them.

A source is a directory with a file per split, a data set on the Hugging Face hub, or the sample bundled with
the package. Where there is no test split, dev is the test split; the few-shot dev set is always drawn from
train (`bbprompt.tasks.fewshot`), so the two never meet.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bbprompt.errors import DataError, OracleError, UsageError
from bbprompt.tasks.example import Example
from bbprompt.tasks.hub import SPLITS, Reader, SplitName, hub_readers, place_of
from bbprompt.tasks.recordfile import FORMATS, read_records
from bbprompt.tasks.task import Task

__all__ = ["DATA_VARIABLE", "DataSource", "Report", "SplitName", "data_digest", "open_data"]

DATA_VARIABLE = "BBPROMPT_DATA"
"""Environment variable that names a directory of task directories."""

_SAMPLES = Path(__file__).parent.parent / "bundled" / "samples"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """What a source holds.

    Attributes:
        examples: Split -> number of examples.
        skipped: Split -> number of records left out by a rule of the task; only where there are any.
        duplicates: Split -> number of examples whose input stood before in the same split; where any.
        overlaps: Pair of splits, such as `train/test` -> number of inputs that stand in both; where any.
    """

    examples: Mapping[str, int]
    skipped: Mapping[str, int]
    duplicates: Mapping[str, int]
    overlaps: Mapping[str, int]

    def __str__(self) -> str:
        """Return the report as one line."""
        parts = [", ".join(f"{name} {count}" for name, count in self.examples.items())]
        for what, counts in (
            ("skipped", self.skipped),
            ("repeated inputs", self.duplicates),
            ("inputs in two splits", self.overlaps),
        ):
            if counts:
                parts.append(f"{what}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        return "; ".join(parts)


class DataSource:
    """The splits of one task from one place, read on first use and kept.

    Attributes:
        source: Kind of place.
        id: The place: directory or file as given, hub id with revision, or name of the bundled sample.
    """

    def __init__(
        self,
        task: Task,
        source: Literal["path", "hub", "sample"],
        id: str,
        readers: Mapping[SplitName, Reader],
    ) -> None:
        self.source = source
        self.id = id
        self._task = task
        self._readers = dict(readers)
        self._read: dict[SplitName, tuple[tuple[Example, ...], int]] = {}

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """The splits that are there by their own name."""
        return tuple(name for name in SPLITS if name in self._readers)

    def split(self, name: SplitName) -> list[Example]:
        """Return the examples of a split in the order of the file; `test` is dev where there is no test.

        Raises:
            DataError: There is no such split, it is empty, or a record is wrong; names file and line.
        """
        return list(self._load(self._actual(name))[0])

    def digest(self, name: SplitName) -> str:
        """Return `data_digest` of a split."""
        return data_digest(self._load(self._actual(name))[0])

    def where(self, uid: str) -> str:
        """Return where the record with this input stands, for messages; reads the files again."""
        for name in self.splits:
            for where, record in self._readers[name]():
                if not self._task.skips(record) and self._task.example(record).uid == uid:
                    return where
        return self.id

    def report(self) -> Report:
        """Read all splits and return what is in them.

        Raises:
            DataError: As `split`.
        """
        loaded = {name: self._load(name) for name in self.splits}
        inputs = {name: {example.uid for example in examples} for name, (examples, _) in loaded.items()}
        overlaps = {f"{a}/{b}": len(inputs[a] & inputs[b]) for a, b in itertools.combinations(inputs, 2)}
        return Report(
            examples={name: len(examples) for name, (examples, _) in loaded.items()},
            skipped=_positive({name: skipped for name, (_, skipped) in loaded.items()}),
            duplicates=_positive({name: len(loaded[name][0]) - len(inputs[name]) for name in loaded}),
            overlaps=_positive(overlaps),
        )

    def _actual(self, name: SplitName) -> SplitName:
        if name == "test" and "test" not in self._readers and "dev" in self._readers:
            return "dev"
        if name not in self._readers:
            have = ", ".join(self.splits) or "none"
            what = f"the split {name!r} of task {self._task.name}"
            add = f"; add {name}.jsonl, {name}.tsv or the like, or give another --data" if self.source != "hub" else ""
            if Path(self.id).is_file():
                add = f"; one file is a test split alone, so give a folder with {name}.jsonl, {name}.tsv or the like"
            raise DataError(f"{self.id}: {what} is missing; there is {have}{add}")
        return name

    def _load(self, name: SplitName) -> tuple[tuple[Example, ...], int]:
        if name not in self._read:
            examples: list[Example] = []
            skipped = 0
            for where, record in self._readers[name]():
                if self._task.skips(record):
                    skipped += 1
                    continue
                try:
                    examples.append(self._task.example(record))
                except DataError as error:
                    raise DataError(f"{where}: {error}") from None
            if not examples:
                left_out = f", {skipped} were skipped by a rule of the task" if skipped else ""
                what = f"the split {name!r} of task {self._task.name}"
                raise DataError(f"{self.id}: {what} has no records{left_out}")
            self._read[name] = (tuple(examples), skipped)
        return self._read[name]


def open_data(task: Task, source: str | Path = "auto", env: Mapping[str, str] | None = None) -> DataSource:
    """Find the data of a task, and log one line that says which they are.

    Args:
        task: The task; its `folder` names its directory or bundled sample, its `hub` the hub data set.
        source: `auto`, `hub`, `sample`, or a path: a directory with a file per split (`train.jsonl`,
            `dev.tsv`, ...), or one file, which is then the test split. `auto` is the first there is of:
            the task's directory in `BBPROMPT_DATA`, the hub where the task names a data set, the sample. A hub out
            of reach is passed over, and a warning says so.
        env: Environment; None: that of the process.

    Raises:
        UsageError: Nothing is found, or a package is missing.
        DataError: The place has no split, or one twice, or the hub has no such data set.
        OracleError: The hub is out of reach, and there is nothing else.
    """
    environ = os.environ if env is None else env
    if source == "auto":
        found, why = _auto(task, environ.get(DATA_VARIABLE, ""))
    elif source == "hub":
        found, why = _from_hub(task), "as asked"
    elif source == "sample":
        found, why = _from_sample(task), "as asked"
    else:
        found, why = _from_path(task, Path(source)), "as asked"
    _log.info("data of task %s: %s %s (%s)", task.name, found.source, found.id, why)
    return found


def data_digest(examples: Sequence[Example]) -> str:
    """Return the SHA-256 (hex) of examples in their order: inputs, labels, answers; not the file format."""
    digest = hashlib.sha256()
    for example in examples:
        answers = [(answer.text, answer.start) for answer in example.answers]
        digest.update(f"{example.uid} {example.label} {answers!r}\n".encode())
    return digest.hexdigest()


def _auto(task: Task, root: str) -> tuple[DataSource, str]:
    if root:
        if not Path(root).is_dir():
            raise UsageError(f"{DATA_VARIABLE}: {root} is not a directory; correct or unset the variable")
        folder = Path(root) / task.folder
        if folder.is_dir():
            return _from_path(task, folder), f"found through {DATA_VARIABLE}"
    missing = f"{DATA_VARIABLE} has no {task.folder}" if root else f"{DATA_VARIABLE} is not set"
    if task.hub is not None:
        try:
            return _from_hub(task), missing
        except (OracleError, UsageError) as error:
            if not (_SAMPLES / task.folder).is_dir():
                raise
            if isinstance(error, OracleError):
                _log.warning("%s; the bundled sample is taken instead", error)
                missing += ", the hub is out of reach"
            else:
                missing += ", the hub needs the package datasets (pip install 'bbprompt[data]')"
    if (_SAMPLES / task.folder).is_dir():
        return _from_sample(task), f"{missing}; a small sample, good for trying things out only"
    raise UsageError(
        f"--data: no data for task {task.name}: {missing}, the task names no hub data set, and there is no "
        f"bundled sample; give --data DIR or set {DATA_VARIABLE}"
    )


def _from_path(task: Task, path: Path) -> DataSource:
    if not path.is_dir():
        if not path.exists():
            raise UsageError(f"--data: {path}: no such file or directory")
        return DataSource(task, "path", str(path), {"test": _file_reader(path)})
    readers: dict[SplitName, Reader] = {}
    for name in SPLITS:
        files = [path / f"{name}{ending}" for ending in FORMATS if (path / f"{name}{ending}").exists()]
        if len(files) > 1:
            both = " and ".join(file.name for file in files)
            raise DataError(f"{path}: the split {name!r} is there twice, {both}; remove one")
        if files:
            readers[name] = _file_reader(files[0])
    if not readers:
        inside = path / task.folder
        hint = f"; did you mean {inside}?" if inside.is_dir() else f"; known endings are {', '.join(FORMATS)}"
        raise DataError(f"{path}: no train, dev or test file{hint}")
    return DataSource(task, "path", str(path), readers)


def _from_sample(task: Task) -> DataSource:
    folder = _SAMPLES / task.folder
    if not folder.is_dir():
        names = sorted(entry.name for entry in _SAMPLES.iterdir()) if _SAMPLES.is_dir() else []
        have = ", ".join(names) or "none"
        raise UsageError(f"--data: no sample of task {task.name} is bundled, only {have}; give --data DIR")
    found = _from_path(task, folder)
    return DataSource(task, "sample", task.folder, found._readers)


def _file_reader(file: Path) -> Reader:
    return lambda: ((f"{file}:{number}", record) for number, record in read_records(file))


def _from_hub(task: Task) -> DataSource:
    if task.hub is None:
        raise UsageError(f"--data hub: the task {task.name} names no hub data set; add a `hub` key to its YAML")
    return DataSource(task, "hub", place_of(task.hub), hub_readers(task, task.hub))


def _positive(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
