"""A baseline as a run: the same directory, few-shot data and result as a search, without prompt vectors.

Each way of reading the texts is a candidate: one call on train and one on dev, reserved and settled in the ledger
like any other. Fitting on what was read takes no further forward and so no call.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from bbprompt.baselines.calls import Calls
from bbprompt.baselines.choice import Model, approach_for, check_task, open_model
from bbprompt.baselines.features import Matrix
from bbprompt.baselines.labeller import Approach, Solved
from bbprompt.baselines.rules import candidates
from bbprompt.baselines.settings import AnyBaseline, BaselineConfig
from bbprompt.config import NO_PROMPTS, MethodConfig, TuneConfig
from bbprompt.connect import cores
from bbprompt.errors import UsageError
from bbprompt.metrics import accuracy, majority, standard_error
from bbprompt.opened import Watcher
from bbprompt.oracle import OracleInfo
from bbprompt.outcome import data_used, run_digest
from bbprompt.result import Before, Result, Seconds, StageResult, TestScore
from bbprompt.result import Calls as CallCounts
from bbprompt.store.curve import CurveClock
from bbprompt.store.ledger import Ledger
from bbprompt.store.manifest import manifest_of
from bbprompt.store.rundir import PROMPT, RESULT, RunDirectory
from bbprompt.tasks.data import DataSource
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import FewShot
from bbprompt.tasks.task import Task
from bbprompt.tensorfile import pack

__all__ = ["NO_MODEL", "PreparedBaseline", "prepare_baseline", "tune_baseline"]

_log = logging.getLogger("bbprompt")

NO_MODEL = OracleInfo(NO_PROMPTS, "", "", 0, 0, NO_PROMPTS, NO_PROMPTS, 0)
"""What stands for the model where none is read."""


@dataclass(frozen=True, slots=True)
class PreparedBaseline:
    """A run of a baseline with everything open; see `bbprompt.run.Prepared`.

    Attributes:
        reader: The frozen model that is read with.
        labels: How often each label stands in the whole training split; only the majority rule looks at it.
    """

    config: TuneConfig
    method: MethodConfig
    task: Task
    data: DataSource
    few: FewShot
    test: tuple[Example, ...]
    reader: Model
    labels: tuple[int, ...]
    threads: int
    load_seconds: float

    @property
    def baseline(self) -> AnyBaseline:
        """The method's settings."""
        if self.method.baseline is None:
            raise ValueError(f"method {self.method.name} is no baseline")
        return self.method.baseline

    @property
    def model(self) -> OracleInfo:
        """The frozen model, or what stands for none."""
        return self.reader.info if self.reader is not None else NO_MODEL

    def manifest(self) -> dict[str, Any]:
        """Everything that decides the result."""
        return manifest_of(self)

    def tune(self, directory: RunDirectory, watcher: Watcher) -> Result:
        """Fit in a directory and write the result; see `tune_baseline`."""
        return tune_baseline(self, directory, watcher)

    def close(self) -> None:
        """Let go of the model, if one is open."""
        if self.reader is not None:
            self.reader.close()


def prepare_baseline(
    config: TuneConfig,
    method: MethodConfig,
    task: Task,
    data: DataSource,
    few: FewShot,
    test: tuple[Example, ...],
    began: float,
) -> PreparedBaseline:
    """Open the model of a baseline; nothing is written and no call is made.

    Raises:
        UsageError: The rule does not fit the task, or prompts were asked for.
    """
    if method.baseline is None:
        raise ValueError(f"method {method.name} is no baseline")
    if config.prompts not in (None, NO_PROMPTS):
        raise UsageError(f"--prompts {config.prompts}: the method {method.name} uses no prompts; leave it out")
    check_task(method.baseline, task)
    if isinstance(method.baseline, BaselineConfig):
        needed = 2 * candidates(method.baseline.rule, task)
        if config.budget < needed:
            raise UsageError(f"--budget {config.budget}: method {method.name} needs {needed} calls on {task.name}")
    gold = [example.label for example in data.split("train")] if method.baseline.rule == "majority" else []
    counts = tuple(np.bincount(gold, minlength=len(task.options)).tolist()) if gold else ()
    if config.ray is not None or config.workers is not None:
        _log.warning("--ray and --workers do nothing here: the method %s reads each text once, itself", method.name)
    threads = config.threads or cores()
    # So that it is resumed with as many threads and tokens at once, wherever that is.
    config = config.model_copy(update={"threads": threads})
    reader = open_model(config, method)
    if reader is not None:
        config = config.model_copy(update={"batch_tokens": reader.info.batch_tokens})
    return PreparedBaseline(config, method, task, data, few, test, reader, counts, threads, time.monotonic() - began)


def tune_baseline(run: PreparedBaseline, directory: RunDirectory, watcher: Watcher) -> Result:
    """Fit a baseline in its directory and write its result; the errors are those of `bbprompt.run.tune`."""
    directory.check_manifest(run.manifest())
    clock = CurveClock(directory)
    ledger = Ledger(directory.journal(), run.config.budget)
    watcher.prepared(run)
    approach: Approach
    approach = approach_for(
        run.baseline,
        run.task,
        run.reader,
        run.labels,
        run.config.seed,
        lambda: watcher.comparing(min(approach.meter.count, most), most),
    )
    most = approach.most(run.few, len(run.test))
    began = time.monotonic()
    before, best = approach.solve(run.few, Calls(ledger))
    directory.append_curve(ledger.asked, "fit", best.train_loss, best.dev, clock.row(False, approach.meter.seconds))
    fitted_in = time.monotonic() - began

    began = time.monotonic()
    final = _hits(run, best)
    untuned = final if before is best else _hits(run, before)
    watcher.testing(len(run.test), len(run.test))
    tensors = best.labeller.tensors()
    result = _result(run, before, best, untuned, final, ledger, approach.meter.cut, tensors)
    tested = time.monotonic() - began
    seconds = Seconds(
        total=round(clock.total + run.load_seconds, 3),
        oracle=round(clock.oracle(approach.meter.seconds), 3),
        optimizer=round(max(fitted_in + tested - approach.meter.seconds, 0.0), 3),
        load=round(run.load_seconds, 3),
        test=round(tested, 3),
    )
    stages = tuple(stage.model_copy(update={"seconds": round(fitted_in, 3)}) for stage in result.stages)
    result = result.model_copy(update={"seconds": seconds, "stages": stages})
    directory.write_bytes(PROMPT, pack(tensors))
    directory.write_json(RESULT, result.model_dump(mode="json"))
    return result


def _hits(run: PreparedBaseline, solved: Solved) -> Matrix:
    """1 for each test example that is labelled rightly, else 0."""
    found = solved.labeller.scores(run.test)
    return accuracy(found.argmax(axis=1).tolist(), [example.label for example in run.test])


def _result(
    run: PreparedBaseline,
    before: Solved,
    best: Solved,
    untuned: Matrix,
    final: Matrix,
    ledger: Ledger,
    cut: int,
    tensors: dict[str, Any],
) -> Result:
    task, gold = run.task, [example.label for example in run.test]
    kinds = ledger.by_kind
    calls = CallCounts(train=kinds["train"], dev=kinds["dev"], test=1 if before is best else 2)
    value = float(final.mean())
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
    what = {"head": sha.hexdigest(), "calls": calls.model_dump(), "dev": best.dev.hex(), "test": value.hex()}
    fitted = StageResult(
        name="fit",
        optimizer=f"{run.baseline.rule} ({best.reads})",
        calls=calls.train + calls.dev,
        train_loss=best.train_loss,
        dev=best.dev,
        test=value,
        seconds=0.0,
        ended="calls",
    )
    return Result(
        task=task.name,
        data=data_used(run),
        method=run.method.name,
        backbone=run.model.backbone,
        prompts=NO_PROMPTS,
        backend=run.config.backend,
        seed=run.config.seed,
        budget=run.config.budget,
        calls=calls,
        before=Before(
            metric=task.metric,
            dev=before.dev,
            test=float(untuned.mean()),
            majority=majority(gold, len(task.options)) if task.labelled else 0.0,
        ),
        stages=(fitted,),
        dev=best.dev,
        test=TestScore(metric=task.metric, value=value, stderr=standard_error(final), n=len(final)),
        cut_tokens=cut,
        seconds=Seconds(total=0.0, oracle=0.0, optimizer=0.0, load=0.0, test=0.0),
        digest=run_digest(what),
    )
