"""Searches on the toy oracle, without files of a model: what the tests of the tuner and of recovery share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny_prompt

from bbprompt.config import MethodConfig, TuneConfig, load_method, method_with
from bbprompt.oracle import Oracle, Scores
from bbprompt.prompts import PromptSpace
from bbprompt.readout import Readout
from bbprompt.result import Result
from bbprompt.run import Prepared, Watcher, tune
from bbprompt.scoring import Labelled, labelled
from bbprompt.search.evaluate import Evaluator
from bbprompt.search.tuner import Found, Look, search
from bbprompt.store.disk import Disk, RealDisk
from bbprompt.store.journal import Journal, canonical_json
from bbprompt.store.ledger import Ledger
from bbprompt.store.rundir import CURVE, JOURNAL, MANIFEST, PROMPT, RESULT, RunDirectory
from bbprompt.tasks.data import DataSource, data_digest
from bbprompt.tasks.fewshot import FewShot
from bbprompt.tasks.task import Task
from bbprompt.testing import ToyOracle

TASK = Task.model_validate(tiny_prompt.PAIR)


def space(layers: int = 3, modules: int = 3, dim: int = 4, tasks: int = 2) -> PromptSpace:
    """Random modules and upstream routers that fit a toy oracle of the same size."""
    rng = np.random.default_rng(0)
    names = tuple(f"task{i}" for i in range(tasks))
    return PromptSpace(rng.normal(size=(layers, modules, dim)), rng.normal(size=(tasks, layers, modules)), names)


def data(count: int, seed: int, task: Task = TASK) -> Labelled:
    """A batch of pairs."""
    records = tiny_prompt.pair_records(count, seed)
    return labelled(task, [task.example(record) for record in records], for_loss=True)


class Recorder:
    """An oracle that writes down what it is asked."""

    def __init__(self, inner: Oracle | None = None) -> None:
        self.inner = inner or ToyOracle()
        self.batches: list[int] = []
        self.texts: set[str] = set()

    @property
    def info(self) -> Any:
        return self.inner.info

    @property
    def calls(self) -> int:
        """Candidates scored."""
        return sum(self.batches)

    def score(self, batch: Any, points: Any, *more: Any) -> Scores:
        self.batches.append(len(points))
        self.texts.update("".join(part.text for part in form.parts) for form in batch.forms)
        return self.inner.score(batch, points, *more)

    def close(self) -> None:
        self.inner.close()


#: Cheap: no Gaussian process unless a test asks for it.
METHODS: dict[str, MethodConfig] = {
    "layerwise": method_with(
        load_method("mp2-deep"), {"router": None, "prompt.patience": None, "calibrate": False, "tempered": False}
    ),
    "joint": method_with(
        load_method("mp2-shallow"), {"router": None, "prompt.patience": None, "calibrate": False, "tempered": False}
    ),
    "all-time": method_with(load_method("mp2-deep-code"), {"router": None, "prompt.popsize": 6}),
    "router": method_with(
        load_method("mp2-deep"),
        {
            "prompt": None,
            "router.calls": 16,
            "router.random": 8,
            "router.warm_start": False,
            "calibrate": False,
        },
    ),
    "both": method_with(
        load_method("mp2-deep"),
        {
            "router.calls": 12,
            "router.random": 4,
            "router.warm_start": False,
            "prompt.popsize": 6,
            "prompt.dev_every": 20,
            "prompt.patience": None,
            "calibrate": False,
        },
    ),
    "upstream": method_with(
        load_method("mp2-deep"), {"prompt": None, "router.calls": 8, "router.random": 4, "calibrate": False}
    ),
    "nothing": method_with(load_method("mp2-deep"), {"router": None, "prompt": None, "calibrate": False}),
    "calibrated": method_with(load_method("mp2-deep"), {"router": None, "prompt.patience": None}),
}


class Remembering:
    """An oracle that answers what it was asked before from memory, so that a run can be repeated by the hundred."""

    def __init__(self, inner: Oracle) -> None:
        self.inner = inner
        self.known: dict[Any, Scores] = {}

    @property
    def info(self) -> Any:
        return self.inner.info

    def score(self, batch: Any, points: Any, *more: Any) -> Scores:
        key = (batch, points.tobytes(), *more)
        if key not in self.known:
            self.known[key] = self.inner.score(batch, points, *more)
        return self.known[key]

    def close(self) -> None:
        self.inner.close()


class Toy(Prepared):
    """A run whose manifest, which asks for the versions of many packages, is made only once."""

    def manifest(self) -> dict[str, Any]:
        key = f"{self.config!r} {self.method!r} {self.oracle.info!r}"
        if key not in _MANIFESTS:
            _MANIFESTS[key] = Prepared.manifest(self)
        return _MANIFESTS[key]


_MANIFESTS: dict[str, dict[str, Any]] = {}


def prepared(method: MethodConfig, budget: int, *, seed: int = 1, oracle: Oracle | None = None) -> Prepared:
    """A whole run, everything open, without the files of a model."""
    oracle = oracle or Remembering(ToyOracle())
    config = TuneConfig(task=TASK.name, method=method.name, budget=budget, seed=seed, threads=1)
    examples = [TASK.example(record) for record in tiny_prompt.pair_records(40, 1)]
    few = FewShot(tuple(examples[:12]), tuple(examples[12:22]), data_digest(examples[:22]))
    return Toy(
        config=config,
        method=method,
        task=TASK,
        data=DataSource(TASK, "path", "toy", {}),
        few=few,
        test=tuple(examples[22:30]),
        prompt=tiny_prompt.artifact(Path("toy"), "toy", layers=3),
        oracle=oracle,
        threads=1,
        load_seconds=0.0,
    )


def tuned(run: Prepared, path: Path, disk: Disk | None = None, watcher: Watcher | None = None) -> Result:
    """Begin the run in its directory, or go on with it, to its end."""
    disk = disk or RealDisk()
    begun = disk.exists(path) and MANIFEST in disk.names(path)
    with RunDirectory.open(path, disk) if begun else RunDirectory.create(path, run.manifest(), disk) as directory:
        return tune(run, directory, watcher)


def outcome(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Of the files of a finished run what must not depend on its fate: all but the seconds it took."""
    kept = {name: files[name] for name in (MANIFEST, JOURNAL, PROMPT)}
    kept[CURVE] = b"\n".join(row.rsplit(b",", 2)[0] for row in files[CURVE].splitlines())
    result = json.loads(files[RESULT])
    del result["seconds"]
    for stage in result["stages"]:
        del stage["seconds"]
    kept[RESULT] = canonical_json(result)
    return kept


def run(
    folder: Path,
    method: MethodConfig,
    budget: int,
    *,
    oracle: Oracle | None = None,
    seed: int = 1,
    report: Any = lambda status: None,
    sizes: tuple[int, int] = (12, 10),
) -> tuple[Found, Ledger, Recorder]:
    """Search with a journal in `folder`, going on with what it holds."""
    recorder = Recorder(oracle)
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / "journal.log", "toy")
    try:
        ledger = Ledger(journal, budget)
        evaluator = Evaluator(
            recorder,
            ledger,
            Readout(method.support, method.legacy_decision, tempered=method.tempered),
            TASK,
            data(sizes[0], 1),
            data(sizes[1], 2),
            calibrates=method.calibrate,
        )
        found = search(method, space(), evaluator, seed, report)
    finally:
        journal.close()
    return found, ledger, recorder


def looks_of(found: Found) -> list[Look]:
    return [found.before, *(trace.chosen for trace in found.stages)]
