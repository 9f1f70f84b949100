"""A run from settings to result: open everything, search, score the test split, write the result.

Resuming is replay: the same search runs again from the manifest's settings, and what the journal holds is not
asked for a second time. So a run that was killed ends with the result it would have had.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbprompt.advice import warn_of_idle_workers, warn_of_seen_examples, warn_of_shorter_input, warn_of_single_words
from bbprompt.config import (
    NAMED_PROMPTS,
    NO_PROMPTS,
    MethodConfig,
    TuneConfig,
    load_method,
    located,
    method_with,
)
from bbprompt.connect import cores, is_vllm, measure_backbone, open_oracle, server_kind
from bbprompt.errors import DataError, ResumeMismatch, UsageError
from bbprompt.frozen import frozen_tensors
from bbprompt.language import language_backbone
from bbprompt.opened import Opened, Watcher
from bbprompt.oracle import Oracle, OracleInfo, precisions_of
from bbprompt.outcome import outcome, run_digest
from bbprompt.possible import check_loss, check_router
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.random_projection import random_prompt
from bbprompt.readable import NamingOracle, check_readable, named
from bbprompt.readout import Readout
from bbprompt.result import BaselineScore, Calls, Result, Seconds, read_result
from bbprompt.scoring import labelled, score_split
from bbprompt.search.evaluate import Evaluator
from bbprompt.search.tuner import Found, Status, search
from bbprompt.store.curve import CurveClock
from bbprompt.store.ledger import Ledger
from bbprompt.store.manifest import manifest_of
from bbprompt.store.rundir import CHECKPOINT, MANIFEST, PROMPT, RESULT, RunDirectory
from bbprompt.synonyms import check_synonyms, with_synonyms
from bbprompt.tasks.data import DataSource, open_data
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import FewShot, check_apart, few_shot
from bbprompt.tasks.task import Task, load_task
from bbprompt.tensorfile import pack
from bbprompt.texts.forms import write
from bbprompt.yamlfile import validate

__all__ = [
    "Prepared",
    "Watcher",
    "default_directory",
    "finished_result",
    "limited",
    "prepare",
    "reopen",
    "run_digest",
    "tune",
]

log = logging.getLogger("bbprompt")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run with everything open."""

    config: TuneConfig
    method: MethodConfig
    task: Task
    data: DataSource
    few: FewShot
    test: tuple[Example, ...]
    prompt: ModularPrompt
    oracle: Oracle
    threads: int
    load_seconds: float

    @property
    def readout(self) -> Readout:
        """How the method reads scores."""
        return Readout(
            self.method.support, self.method.legacy_decision, loss=self.method.loss, tempered=self.method.tempered
        )

    @property
    def model(self) -> OracleInfo:
        """What the frozen model says of itself."""
        return self.oracle.info

    @property
    def reader(self) -> Oracle:
        """What reads the texts: the model, asked about all words of a label where the method says so."""
        return with_synonyms(self.oracle, self.method, self.task)

    def manifest(self) -> dict[str, Any]:
        """Everything that decides the result: settings, digests, versions, threads."""
        return manifest_of(self)

    def tune(self, directory: RunDirectory, watcher: Watcher) -> Result:
        """Search in a directory and write the result; see `tune`."""
        return _tune(self, directory, watcher)

    def close(self) -> None:
        """Let go of the model."""
        self.oracle.close()


def prepare(config: TuneConfig, moved: str | None = None) -> Opened:
    """Open task, data, prompts and model; nothing is written and no call is made.

    Args:
        config: The run's settings.
        moved: Where the server is now, if it is no longer where the settings say.

    Raises:
        UsageError: A setting is wrong, or the budget does not hold one population.
        DataError: Data or artifact are wrong, or an example does not fit a model that is here.
    """
    run = _opened(config, server_of(config.backend, moved))
    try:
        warn_of_shorter_input(run.config.max_tokens, run.model)
        known = (*run.few.train, *run.few.dev)
        check_readable(run.reader, run.model.readout, run.task, run.data, known, run.test)
    except BaseException:
        run.close()
        raise
    return run


def server_of(began: str, now: str | None) -> str:
    """Where the model of a run is: where it began, or at another server of the same kind.

    Raises:
        UsageError: It began with a model here, or is asked for at another kind of server.
    """
    if now is None:
        return began
    if began == "local":
        raise UsageError(f"--backend {now}: the run began with a model here, and goes on with it; leave it out")
    if server_kind(began) != server_kind(now):
        raise UsageError(f"--backend {now}: the run began at {began}; it goes on at a server of the same kind only")
    return now


def _opened(config: TuneConfig, backend: str) -> Opened:
    """What `prepare` opens, with the model at `backend`."""
    began = time.monotonic()
    config = located(config)
    task = load_task(config.task)
    method = method_with(load_method(config.method), config.set)
    if config.budget < method.least_budget:
        searched = ["the untuned prompt", "one population", "one look at dev", *["a calibration"] * method.calibrate]
        what = "" if method.baseline or method.gradient else f" ({', '.join(searched[:-1])} and {searched[-1]})"
        raise UsageError(
            f"--budget {config.budget}: method {method.name} needs at least {method.least_budget} calls{what}"
        )
    if method.reads_words and config.backbone is None and (backend == "local" or is_vllm(backend)):
        # Into the manifest: what is installed later must not change a run.
        config = config.model_copy(update={"backbone": language_backbone(task)})
    check_loss(method, task)
    data = open_data(task, config.data)
    few = few_shot(task, data, config.seed, config.shots)
    if not config.allow_overlap:
        check_apart(task, few, data.split("test"))
    test = limited(data.split("test"), config.test_limit, config.seed)
    if method.baseline is not None:
        from bbprompt.baselines.method import prepare_baseline

        return prepare_baseline(config, method, task, data, few, test, began)
    if method.gradient is not None:
        from bbprompt.gradient.method import prepare_gradient

        return prepare_gradient(config, method, task, data, few, test, began)
    # Written into the manifest, so that a run goes on with the threads it began with, wherever that is. Said before
    # the states that scale a random projection are measured, for their last bits depend on it.
    threads = config.threads or (cores() if config.ray is None else 1)
    config = config.model_copy(update={"threads": threads})
    with named(data, few.train):
        prompt = _prompt(config, backend, method, task, few)
    check_router(method, prompt.config)
    check_synonyms(method, prompt.config.readout)
    warn_of_seen_examples(config, task, prompt)
    warn_of_single_words(method, task)
    oracle = open_oracle(
        backend,
        prompt,
        backbone=config.backbone,
        device=config.device,
        dtype=config.dtype,
        batch_tokens=config.batch_tokens,
        max_tokens=config.max_tokens,
        threads=threads,
        ray=config.ray,
        workers=config.workers,
        resend=config.resends,
    )
    warn_of_idle_workers(config.workers, method, oracle)
    if backend == "local":
        # As with threads: "auto" is another precision on a cluster or on another processor, and fewer tokens at once
        # where less memory is free.
        config = config.model_copy(update={"dtype": oracle.info.precision, "batch_tokens": oracle.info.batch_tokens})
    return Prepared(config, method, task, data, few, test, prompt, oracle, threads, time.monotonic() - began)


def _prompt(config: TuneConfig, backend: str, method: MethodConfig, task: Task, few: FewShot) -> ModularPrompt:
    """The artifact that the settings name, or the random subspace that the method asks for."""
    name = config.prompts or method.prompts
    settings = method.projection
    if (name == NO_PROMPTS) != (settings is not None):
        if settings is not None:
            wanted = "takes no artifact; leave it out or say --prompts none"
        else:
            own = "" if method.prompts == NAMED_PROMPTS else f", or leave it out for {method.prompts}"
            wanted = f"needs a prompt artifact; name one{own}"
        raise UsageError(f"--prompts {name}: the method {method.name} {wanted}")
    if settings is None:
        return ModularPrompt.load(resolve_prompts(name))
    if settings.readout == "span" and settings.head is None and settings.start is None:
        raise UsageError(
            f"--method {method.name}: projection.head is missing; the span readout needs a trained answer head, "
            "so name a prompt artifact with --set projection.head=NAME"
        )
    head = ModularPrompt.load(resolve_prompts(settings.head)) if settings.head is not None else None
    start = ModularPrompt.load(resolve_prompts(settings.start)) if settings.start is not None else None
    if start is not None:
        settings = settings.model_copy(update={"prompt_length": start.config.prompt_length})
    trained = head or start
    facts = measure_backbone(
        backend,
        [write(task, example, settings.readout) for example in few.train],
        settings,
        backbone=config.backbone or (trained.config.backbone if trained is not None else None),
        max_tokens=config.max_tokens,
        threads=config.threads,
    )
    return random_prompt(settings, facts, config.seed, head, start)


def limited(examples: Sequence[Example], limit: int | None, seed: int) -> tuple[Example, ...]:
    """At most `limit` examples, drawn by the seed and kept in their order; all of them without a limit."""
    if limit is None or limit >= len(examples):
        return tuple(examples)
    order = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return tuple(examples[i] for i in sorted(order.tolist()))


def default_directory(run: Opened) -> Path:
    """`runs/<task>-<method>-<seed>-<digest>`."""
    digest = run_digest(run.manifest())[:8]
    return Path("runs") / f"{run.task.name}-{run.method.name}-{run.config.seed}-{digest}"


def reopen(path: Path, *, writable: bool) -> tuple[RunDirectory, TuneConfig]:
    """Open a run directory with the settings it began with.

    Raises:
        ResumeMismatch: The manifest was written by a version with other settings.
    """
    directory = RunDirectory.open(path, writable=writable)
    try:
        return directory, validate(TuneConfig, directory.manifest.get("config"), str(directory.path / MANIFEST))
    except UsageError as error:
        directory.close()
        raise ResumeMismatch(f"{error}; the run was begun by another version of bbprompt") from error


def tune(run: Opened, directory: RunDirectory, watcher: Watcher | None = None) -> Result:
    """Run, or go on with, a run in its directory and write its result; a finished one only has it read.

    Raises:
        DiskError: A file cannot be written, or the result is damaged.
        ResumeMismatch: The directory's run began with other settings, data, model or code.
        DataError: The model cannot read an example; where that comes out at once, the directory is free again.
        Interrupted: The watcher asked to stop.
    """
    if directory.finished:
        directory.check_manifest(run.manifest())
        return finished_result(directory)
    try:
        return run.tune(directory, watcher or Watcher())
    except DataError:
        directory.withdraw()  # other data are another run: this one would never end
        raise


def finished_result(directory: RunDirectory) -> Result:
    """The result of a finished run; a checkpoint that a kill just before the end left there goes.

    Raises:
        DiskError: The result is damaged, or the checkpoint cannot be removed.
    """
    result = read_result(directory)
    directory.remove(CHECKPOINT)
    return result


def _tune(run: Prepared, directory: RunDirectory, watcher: Watcher) -> Result:
    directory.check_manifest(run.manifest())
    clock = CurveClock(directory)
    ledger = Ledger(directory.journal(), run.config.budget)
    replayed = ledger.reserved - len(ledger.in_doubt)
    kind = run.oracle.info.readout
    train = labelled(run.task, run.few.train, for_loss=True, readout=kind)
    dev = labelled(run.task, run.few.dev, for_loss=True, readout=kind)
    charge = not run.config.resends
    oracle = NamingOracle(run.reader, run.task, run.data, (*run.few.train, *run.few.dev, *run.test))
    evaluator = Evaluator(
        oracle, ledger, run.readout, run.task, train, dev, charge=charge, calibrates=run.method.calibrate
    )
    watcher.prepared(run)

    def report(status: Status) -> None:
        directory.append_curve(
            status.calls,
            status.stage,
            status.train_loss,
            status.dev_metric,
            clock.row(status.calls <= replayed, evaluator.oracle_seconds),
        )
        watcher.status(status)

    found = search(run.method, run.prompt.space, evaluator, run.config.seed, report)
    searched = time.monotonic()
    points, which = np.unique(found.points.astype(np.float32), axis=0, return_inverse=True)
    score = score_split(
        oracle,
        [(int(row), look.readout) for row, look in zip(which.flatten(), found.looks, strict=True)],
        run.task,
        run.test,
        points,
        lambda done: watcher.testing(done, len(run.test)),
    )
    ended = time.monotonic()
    seconds = Seconds(
        total=round(clock.total + run.load_seconds, 3),
        oracle=round(clock.oracle(evaluator.oracle_seconds), 3),
        optimizer=round(found.optimizer_seconds, 3),
        load=round(run.load_seconds, 3),
        test=round(ended - searched, 3),
    )
    calls = Calls(train=ledger.by_kind["train"], dev=ledger.by_kind["dev"], test=len(points))
    point = found.chosen.incumbent.point.astype("<f4").tobytes()
    cut = evaluator.cut + score.cut
    result = outcome(run, found.before, found.stages, found.chosen, score.values, calls, cut, seconds, point)
    told = {"precisions": precisions_of(run.oracle), "baselines": _baselines(run, watcher)}
    result = result.model_copy(update=told)
    directory.write_bytes(PROMPT, pack(_tensors(run, found)))
    directory.write_json(RESULT, result.model_dump(mode="json"))
    return result


def _baselines(run: Prepared, watcher: Watcher) -> tuple[BaselineScore, ...]:
    """The cheap methods on the same data, for the table alone: nothing is chosen by them, and no call is charged."""
    if not run.config.baselines:
        return ()
    from bbprompt.baselines.report import compare

    return compare(run.task, run.few, run.test, run.oracle, watcher.comparing)


def _tensors(run: Prepared, found: Found) -> dict[str, NDArray[Any]]:
    """What was tuned: the point, and where there are such its router, the options' offsets, prompts of no artifact."""
    chosen = found.chosen.incumbent
    tensors: dict[str, NDArray[Any]] = {"point": chosen.point.astype(np.float32)}
    if chosen.routing is not None:
        tensors["router"] = chosen.routing.router.astype(np.float32)
        tensors["weights"] = chosen.routing.weights.astype(np.float32)
    if run.method.projection is not None:
        tensors |= frozen_tensors(run.prompt, chosen.point)
    if found.chosen.readout.offsets:
        tensors["offsets"] = np.array(found.chosen.readout.offsets, dtype=np.float64)
    return tensors
