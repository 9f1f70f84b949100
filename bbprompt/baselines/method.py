"""A baseline as a run: the same directory, few-shot data and result as a search, without a prompt.

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

from bbprompt.baselines.features import VIEWS, Matrix, Reader
from bbprompt.baselines.heads import frequencies
from bbprompt.baselines.rules import Fitted, Variant, fit, scores, variants
from bbprompt.config import NO_PROMPTS, BaselineConfig, MethodConfig, TuneConfig
from bbprompt.connect import cores, open_embedder
from bbprompt.embedding import Embedder
from bbprompt.errors import ResumeMismatch, UsageError
from bbprompt.metrics import accuracy, majority, standard_error
from bbprompt.oracle import OracleInfo
from bbprompt.result import Before, Calls, DataUsed, Result, Seconds, StageResult, TestScore
from bbprompt.run import Watcher, run_digest
from bbprompt.store.curve import CurveClock
from bbprompt.store.ledger import Kind, Ledger
from bbprompt.store.manifest import manifest_of
from bbprompt.store.rundir import PROMPT, RESULT, RunDirectory
from bbprompt.tasks.data import DataSource
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import FewShot
from bbprompt.tasks.task import Task
from bbprompt.tensorfile import pack

__all__ = ["NO_MODEL", "PreparedBaseline", "open_model", "prepare_baseline", "tune_baseline"]

_log = logging.getLogger("bbprompt")

NO_MODEL = OracleInfo(NO_PROMPTS, "", "", 0, 0, NO_PROMPTS, NO_PROMPTS, 0)
"""What stands for the model where none is read."""


@dataclass(frozen=True, slots=True)
class PreparedBaseline:
    """A run of a baseline with everything open; see `bbprompt.run.Prepared`.

    Attributes:
        labels: How often each label stands in the whole training split; only the majority rule looks at it.
    """

    config: TuneConfig
    method: MethodConfig
    task: Task
    data: DataSource
    few: FewShot
    test: tuple[Example, ...]
    embedder: Embedder | None
    labels: tuple[int, ...]
    threads: int
    load_seconds: float

    @property
    def baseline(self) -> BaselineConfig:
        """The method's settings."""
        if self.method.baseline is None:
            raise ValueError(f"method {self.method.name} is no baseline")
        return self.method.baseline

    @property
    def model(self) -> OracleInfo:
        """The frozen model, or what stands for none."""
        return self.embedder.info if self.embedder is not None else NO_MODEL

    def manifest(self) -> dict[str, Any]:
        """Everything that decides the result."""
        return manifest_of(self)

    def close(self) -> None:
        """Let go of the model, if one is open."""
        if self.embedder is not None:
            self.embedder.close()


def open_model(config: TuneConfig, rule: str, **use: Any) -> Embedder | None:
    """The model a rule reads with; None for the majority rule, which reads nothing."""
    if rule == "majority":
        return None
    settings = {key: getattr(config, key) for key in ("device", "dtype", "batch_tokens", "threads")} | use
    return open_embedder(config.backend, backbone=config.backbone, max_tokens=config.max_tokens, **settings)


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
    rule = method.baseline.rule
    variants(rule, task)
    gold = [example.label for example in data.split("train")] if rule == "majority" else []
    counts = tuple(np.bincount(gold, minlength=len(task.options)).tolist()) if gold else ()
    if config.ray is not None or config.workers is not None:
        _log.warning("--ray and --workers do nothing here: the method %s reads each text once, itself", method.name)
    threads = config.threads or cores()
    config = config.model_copy(update={"threads": threads})  # so that it is resumed with as many, wherever that is
    embedder = open_model(config, rule)
    return PreparedBaseline(config, method, task, data, few, test, embedder, counts, threads, time.monotonic() - began)


def tune_baseline(run: PreparedBaseline, directory: RunDirectory, watcher: Watcher) -> Result:
    """Fit a baseline in its directory and write its result; the errors are those of `bbprompt.run.tune`."""
    directory.check_manifest(run.manifest())
    clock = CurveClock(directory)
    ledger = Ledger(directory.journal(), run.config.budget)
    watcher.prepared(run)
    texts = (len(run.few.train) + len(run.few.dev) + len(run.test)) * (3 if run.task.type == "pair" else 1)
    read: Reader
    read = Reader(run.embedder, lambda: watcher.comparing(min(read.count, texts), texts))
    calls = _Calls(run, ledger, read)
    began = time.monotonic()
    rule = run.baseline.rule
    tried = [calls.fit(rule, variant) for variant in variants(rule, run.task)]
    best = min(tried, key=lambda fitted: fitted.dev_loss)
    if rule in ("majority", "zero-shot"):
        before = tried[0]
    else:
        before = calls.fit("zero-shot", variants("zero-shot", run.task)[0])
    directory.append_curve(ledger.asked, "fit", best.train_loss, best.dev, clock.row(replayed=False))
    fitted_in = time.monotonic() - began

    began = time.monotonic()
    final = _hits(run, best, read)
    untuned = final if before is best else _hits(run, before, read)
    watcher.testing(len(run.test), len(run.test))
    result = _result(run, before, best, untuned, final, ledger, read)
    tested = time.monotonic() - began
    seconds = Seconds(
        total=round(clock.total + run.load_seconds, 3),
        oracle=round(read.seconds, 3),
        optimizer=round(max(fitted_in + tested - read.seconds, 0.0), 3),
        load=round(run.load_seconds, 3),
        test=round(tested, 3),
    )
    stages = tuple(stage.model_copy(update={"seconds": round(fitted_in, 3)}) for stage in result.stages)
    result = result.model_copy(update={"seconds": seconds, "stages": stages})
    head = {
        "weight": best.head.weight,
        "bias": best.head.bias,
        "view": np.array(VIEWS.index(best.variant.view), dtype=np.int64),
    }
    directory.write_bytes(PROMPT, pack(head))
    directory.write_json(RESULT, result.model_dump(mode="json"))
    return result


class _Calls:
    """Fits rules through the ledger: a fit is one call on train and one on dev."""

    def __init__(self, run: PreparedBaseline, ledger: Ledger, read: Reader) -> None:
        self._run, self._ledger, self._read = run, ledger, read

    def fit(self, rule: Any, variant: Variant) -> Fitted:
        """Reserve, fit, settle; what the journal holds already must come out again."""
        run = self._run
        if rule == "majority":  # reads labels alone: no call
            head = frequencies([label for label, count in enumerate(run.labels) for _ in range(count)], len(run.labels))
            return Fitted(variant, head, *_judged(head, run))
        ids: dict[Kind, str] = {kind: _id(rule, variant, kind) for kind in ("train", "dev")}
        for kind, call_id in ids.items():
            self._ledger.reserve([call_id], kind)
        fitted = fit(rule, variant, run.task, run.few.train, run.few.dev, self._read)
        values: dict[Kind, dict[str, float]] = {
            "train": {"loss": fitted.train_loss},
            "dev": {"loss": fitted.dev_loss, "metric": fitted.dev},
        }
        for kind, call_id in ids.items():
            known = self._ledger.settled(call_id)
            if known is not None and dict(known) != values[kind]:
                raise ResumeMismatch(
                    "the model gives other numbers than the journal holds: code, libraries or the processor differ "
                    "from those the run began with; start a new run"
                )
            self._ledger.settle([call_id], [values[kind]])
        return fitted


def _judged(head: Any, run: PreparedBaseline) -> tuple[float, float, float]:
    """Train loss, dev loss and dev accuracy of a head that looks at nothing."""
    from bbprompt.baselines.heads import accuracy_of, cross_entropy

    def both(examples: tuple[Example, ...]) -> tuple[Matrix, list[int]]:
        return head.scores(np.zeros((len(examples), 0))), [example.label for example in examples]

    train, dev = both(tuple(run.few.train)), both(tuple(run.few.dev))
    return cross_entropy(*train), cross_entropy(*dev), accuracy_of(*dev)


def _id(rule: str, variant: Variant, kind: str) -> str:
    return hashlib.sha256(f"{kind}:{rule}:{variant.view}:{variant.wording}".encode()).hexdigest()[:24]


def _hits(run: PreparedBaseline, fitted: Fitted, read: Reader) -> Matrix:
    """1 for each test example that is labelled rightly, else 0."""
    found = scores(fitted.variant.view, fitted.head, run.task, run.test, read)
    return accuracy(found.argmax(axis=1).tolist(), [example.label for example in run.test])


def _result(
    run: PreparedBaseline, before: Fitted, best: Fitted, untuned: Matrix, final: Matrix, ledger: Ledger, read: Reader
) -> Result:
    task, gold = run.task, [example.label for example in run.test]
    kinds = ledger.by_kind
    calls = Calls(train=kinds["train"], dev=kinds["dev"], test=1 if before is best else 2)
    value = float(final.mean())
    tensors = hashlib.sha256(best.head.weight.astype("<f8").tobytes() + best.head.bias.astype("<f8").tobytes())
    what = {"head": tensors.hexdigest(), "calls": calls.model_dump(), "dev": best.dev.hex(), "test": value.hex()}
    fitted = StageResult(
        name="fit",
        optimizer=f"{run.baseline.rule} ({best.variant})",
        calls=calls.train + calls.dev,
        train_loss=best.train_loss,
        dev=best.dev,
        test=value,
        seconds=0.0,
    )
    return Result(
        task=task.name,
        data=DataUsed(
            source=run.data.source,
            id=str(run.data.id),
            train=len(run.few.train),
            dev=len(run.few.dev),
            test=len(run.test),
        ),
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
        cut_tokens=read.cut,
        seconds=Seconds(total=0.0, oracle=0.0, optimizer=0.0, load=0.0, test=0.0),
        digest=run_digest(what),
    )
