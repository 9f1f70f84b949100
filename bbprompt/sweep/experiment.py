"""Experiments: tasks x methods x variants x seeds, each cell of the grid a run of its own.

An experiment is a YAML file (`configs/experiments/*.yaml` or a user's own) or flags. What is not the grid is a
setting of `tune`, the same for all runs; a variant changes some of them and stands beside the plain method as
a row of its own. The few-shot split follows from task, seed and shots alone, so two methods with the same seed
are compared on the same examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bbprompt.config import (
    NAMED_PROMPTS,
    NO_PROMPTS,
    MethodConfig,
    TuneConfig,
    absolute,
    load_method,
    located,
    method_with,
)
from bbprompt.errors import UsageError
from bbprompt.possible import check_possible, known_prompts
from bbprompt.settings import Name
from bbprompt.tasks.task import load_task
from bbprompt.yamlfile import closest, read_yaml, validate

__all__ = ["Cell", "Experiment", "experiment_from", "experiment_names", "row_name"]

_BUNDLED = Path(__file__).parent.parent / "configs" / "experiments"
_GRID = ("summary", "source", "tasks", "methods", "seeds", "variants")
_AXES = ("task", "method", "seed")

_Name = Annotated[str, Field(min_length=1, strict=True)]
_Seed = Annotated[int, Field(ge=0, strict=True)]


class Experiment(BaseModel):
    """A grid of runs.

    Attributes:
        summary: One line.
        source: What it repeats, such as a table of a paper.
        tasks: Names, or paths of task YAMLs, in a file as seen from there.
        methods: Names, or paths of method YAMLs, likewise.
        seeds: Of few-shot split and search.
        variants: Name -> settings of `tune` that differ; empty for the plain methods alone. The name of the
            variant without changes, if there is one, is up to the file.
        settings: Settings of `tune` that all runs share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: str = ""
    source: str = ""
    tasks: tuple[_Name, ...] = Field(min_length=1)
    methods: tuple[_Name, ...] = Field(min_length=1)
    seeds: tuple[_Seed, ...] = Field(min_length=1)
    variants: Mapping[Name, Mapping[str, Any]] = Field(default_factory=dict)
    settings: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("tasks", "methods", "seeds"):
            values = getattr(self, key)
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"{key}: {value} stands twice")
        for label, changes in {"": self.settings, **self.variants}.items():
            for key in _AXES:
                if key in changes:
                    where = f"variants.{label}.{key}" if label else key
                    raise ValueError(f"{where}: the grid says it; use {'seeds' if key == 'seed' else f'{key}s'}")
        return self

    def cells(self) -> tuple[Cell, ...]:
        """Every run; seeds outermost, so that a sweep that is cut short has whole seeds.

        Raises:
            UsageError: A setting, task or method is wrong, or two runs would have one name.
        """
        cells: dict[str, Cell] = {}
        rows, unfit = self._rows(), self.unfit()
        for seed, task, row in itertools.product(self.seeds, self.tasks, rows):
            if (task, row.name) in unfit:
                continue
            config = self._config(row, task, seed)
            name = "-".join(part for part in (_stem(task), _stem(row.method), row.label, str(seed)) if part)
            if name in cells:
                raise UsageError(f"experiment: two runs would be called {name}; give tasks and methods other names")
            cells[name] = Cell(name, row.name, located(config))
        return tuple(cells.values())

    def unfit(self) -> dict[tuple[str, str], str]:
        """Task and row of the tables -> why there are no runs of it: the method cannot do the task.

        Raises:
            UsageError: A setting, task or method is wrong, or a row could do none of the tasks.
        """
        found: dict[tuple[str, str], str] = {}
        tasks = {name: load_task(name, "--tasks") for name in self.tasks}
        for row in self._rows():
            config = self._config(row, self.tasks[0], self.seeds[0])
            name = config.prompts or row.settings.prompts
            prompts = known_prompts(name)
            for task in self.tasks:
                try:
                    check_possible(row.settings, tasks[task], name, prompts)
                except UsageError as error:
                    found[task, row.name] = str(error)
            if all((task, row.name) in found for task in self.tasks):
                raise UsageError(found[self.tasks[0], row.name])
        return found

    def located(self) -> Experiment:
        """The same with every path absolute, so that the sweep goes on from anywhere."""
        axes = {"tasks": "task", "methods": "method"}
        lists = {key: tuple(absolute({of: name})[of] for name in getattr(self, key)) for key, of in axes.items()}
        variants = {label: absolute(changes) for label, changes in self.variants.items()}
        return self.model_copy(update={**lists, "variants": variants, "settings": absolute(self.settings)})

    def _rows(self) -> tuple[_Row, ...]:
        """The rows; wrong names are an error now, not after the hours that the runs before them take."""
        rows = []
        for name in self.methods:
            method = load_method(name, "--methods")
            for label, changes in (self.variants or {"": {}}).items():
                sets = {**(self.settings.get("set") or {}), **(changes.get("set") or {})}
                rows.append(_Row(name, label, method_with(method, sets), sets))
        return tuple(rows)

    def _config(self, row: _Row, task: str, seed: int) -> TuneConfig:
        """Settings of a run."""
        changes = self.variants.get(row.label, {})
        values = {**self.settings, **changes, "task": task, "method": row.method, "seed": seed, "set": row.sets}
        if row.settings.prompts == NO_PROMPTS and "prompts" not in changes:
            values["prompts"] = None  # the prompts of the experiment are for the methods that take some
        if row.settings.prompts == NAMED_PROMPTS and not values.get("prompts"):
            raise UsageError(f"--methods {row.method}: begins with a prompt artifact; name it with --prompts")
        return validate(TuneConfig, values, f"variant {row.label}" if row.label else "experiment")


@dataclass(frozen=True, slots=True)
class _Row:
    """A method under a variant: its settings with the changes, and these."""

    method: str
    label: str
    settings: MethodConfig
    sets: Mapping[str, Any]

    @property
    def name(self) -> str:
        """How it is called in tables."""
        return row_name(_stem(self.method), self.label)


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a grid.

    Attributes:
        name: Of its directory.
        row: The row of a table that it belongs to: the method, and the variant if there is one.
        config: Its settings, paths absolute.
    """

    name: str
    row: str
    config: TuneConfig


def row_name(method: str, variant: str) -> str:
    """How a method under a variant is called in tables."""
    return f"{method} {variant}" if variant else method


def experiment_names() -> list[str]:
    """Names of the bundled experiments."""
    return sorted(file.stem for file in _BUNDLED.glob("*.yaml"))


def experiment_from(file: str | None, grid: Mapping[str, Any], settings: Mapping[str, Any]) -> Experiment:
    """An experiment from a file and flags, paths absolute; flags win.

    Args:
        file: A YAML file or the name of a bundled experiment; None for flags alone.
        grid: Keys of the grid; None values do not count.
        settings: Settings of `tune`; None values do not count. `set` is merged key by key.

    Raises:
        UsageError: There is no such file, or a key or value is wrong.
    """
    values: dict[str, Any] = {"settings": {}}
    where = "command line"
    if file is not None:
        where, values = _read(file)
    values |= {key: value for key, value in grid.items() if value is not None}
    own, changes = values["settings"], {key: value for key, value in settings.items() if value is not None}
    for holder in (own, *_mappings(values.get("variants"))):
        if not isinstance(holder.get("set", {}), dict):
            raise UsageError(f"{where}: set: expected a mapping of dotted keys to values, got {holder['set']!r}")
    merged = {**own.get("set", {}), **changes.pop("set", {})}
    values["settings"] = {**own, **changes, **({"set": merged} if merged else {})}
    for key in ("tasks", "methods", "seeds"):
        if key not in values:
            raise UsageError(f"--{key} is missing; give --tasks, --methods and --seeds, or --config")
    return validate(Experiment, values, where).located()


def _read(name: str) -> tuple[str, dict[str, Any]]:
    """Where an experiment stands and its keys, those of `tune` apart; a key may be spelled as the flag is."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = _BUNDLED / f"{name}.yaml"
        if name not in experiment_names():
            raise UsageError(f"--config {name}: no such file or bundled experiment{closest(name, experiment_names())}")
    values: dict[str, Any] = {"settings": {}}
    for key, value in read_yaml(path).items():
        plain = key.replace("-", "_")
        target = values if plain in _GRID else values["settings"]
        if plain in target:
            raise UsageError(f"{path}: the key '{plain}' stands twice, once as '{key}'")
        if plain not in _GRID and plain not in TuneConfig.model_fields:
            known = [*_GRID, *TuneConfig.model_fields]
            raise UsageError(f"{path}: unknown key '{key}'{closest(plain, known)}")
        target[plain] = value
    for key in ("tasks", "methods"):
        if isinstance(values.get(key), list):
            values[key] = [_beside(path, name) for name in values[key]]
    return str(path), values


def _beside(file: Path, name: Any) -> Any:
    """A relative path as seen from the file that says it; names, and paths that lead nowhere from there, stay."""
    if isinstance(name, str) and name.endswith((".yaml", ".yml")) and (file.parent / name).is_file():
        return str(file.parent / name)
    return name


def _mappings(variants: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(variants, dict):
        return ()
    return [changes for changes in variants.values() if isinstance(changes, dict)]


def _stem(name: str) -> str:
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name
