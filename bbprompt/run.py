"""A run from settings to result: open everything, search, score the test split, write the result.

Resuming is replay: the same search runs again from the manifest's settings, and what the journal holds is not
asked for a second time. So a run that was killed ends with the result it would have had.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bbprompt.config import NO_PROMPTS, MethodConfig, TuneConfig, load_method, method_with
from bbprompt.connect import cores, measure_backbone, named_language_model, open_oracle
from bbprompt.embedding import can_embed
from bbprompt.errors import ResumeMismatch, UsageError
from bbprompt.metrics import majority, standard_error
from bbprompt.oracle import Oracle, OracleInfo
from bbprompt.prompts import ModularPrompt, resolve_prompts
from bbprompt.random_projection import frozen_tensors, random_prompt
from bbprompt.readout import Readout
from bbprompt.result import BaselineScore, Before, Calls, DataUsed, Result, Seconds, StageResult, TestScore
from bbprompt.scoring import SplitScore, labelled, score_split
from bbprompt.search.evaluate import Evaluator
from bbprompt.search.tuner import Found, Status, search
from bbprompt.store.curve import CurveClock
from bbprompt.store.ledger import Ledger
from bbprompt.store.manifest import manifest_of
from bbprompt.store.rundir import MANIFEST, PROMPT, RESULT, RunDirectory
from bbprompt.tasks.data import DataSource, open_data
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import FewShot, check_apart, few_shot
from bbprompt.tasks.task import Task, load_task
from bbprompt.tensorfile import pack
from bbprompt.texts.forms import write
from bbprompt.yamlfile import validate

if TYPE_CHECKING:
    from bbprompt.baselines.method import PreparedBaseline

__all__ = [
    "Prepared",
    "Watcher",
    "default_directory",
    "limited",
    "located",
    "prepare",
    "reopen",
    "run_digest",
    "tune",
]

log = logging.getLogger("bbprompt")


class Watcher:
    """Hears of a run's progress; the base class is silent. The terminal display overrides what it shows."""

    def prepared(self, run: Prepared | PreparedBaseline) -> None:
        """Everything is open; the search begins."""

    def status(self, status: Status) -> None:
        """A batch of calls is settled. Raising here stops the run, which can then be resumed."""

    def testing(self, done: int, total: int) -> None:
        """So many test examples are scored. Raising here stops the run."""

    def comparing(self, done: int, total: int) -> None:
        """So many texts are read for the baselines that the result is shown with. Raising here stops the run."""


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
        return Readout(self.method.support, self.method.legacy_decision, loss=self.method.loss)

    @property
    def model(self) -> OracleInfo:
        """What the frozen model says of itself."""
        return self.oracle.info

    def manifest(self) -> dict[str, Any]:
        """Everything that decides the result: settings, digests, versions, threads."""
        return manifest_of(self)

    def close(self) -> None:
        """Let go of the model."""
        self.oracle.close()


def prepare(config: TuneConfig) -> Prepared | PreparedBaseline:
    """Open task, data, prompts and model; nothing is written and no call is made.

    Raises:
        UsageError: A setting is wrong, or the budget does not hold one population.
        DataError: Data or artifact are wrong.
    """
    began = time.monotonic()
    config = located(config)
    task = load_task(config.task)
    method = method_with(load_method(config.method), config.set)
    if config.budget < method.least_budget:
        raise UsageError(
            f"--budget {config.budget}: method {method.name} needs at least {method.least_budget} calls "
            f"(the untuned prompt, one population{', ' if method.calibrate else ' and '}one look at dev"
            f"{' and a calibration' if method.calibrate else ''})"
        )
    if method.loss == "hinge" and task.type == "extractive":
        raise UsageError(f"--set loss=hinge: the task {task.name} has no options to keep apart; use loss=ce")
    data = open_data(task, config.data)
    few = few_shot(task, data, config.seed, config.shots)
    if not config.allow_overlap:
        check_apart(task, few, data.split("test"))
    test = limited(data.split("test"), config.test_limit, config.seed)
    if method.baseline is not None:
        from bbprompt.baselines.method import prepare_baseline

        return prepare_baseline(config, method, task, data, few, test, began)
    # Written into the manifest, so that a run goes on with the threads it began with, wherever that is. Said before
    # the states that scale a random projection are measured, for their last bits depend on it.
    threads = config.threads or (cores() if config.ray is None else 1)
    config = config.model_copy(update={"threads": threads})
    prompt = _prompt(config, method, task, few)
    _warn_of_seen_examples(config, task, prompt)
    oracle = open_oracle(
        config.backend,
        prompt,
        backbone=config.backbone,
        device=config.device,
        dtype=config.dtype,
        batch_tokens=config.batch_tokens,
        max_tokens=config.max_tokens,
        threads=threads,
        ray=config.ray,
        workers=config.workers,
    )
    if config.backend == "local":
        # As with threads: "auto" is another precision on a cluster or on another processor.
        config = config.model_copy(update={"dtype": oracle.info.precision})
    return Prepared(config, method, task, data, few, test, prompt, oracle, threads, time.monotonic() - began)


def _prompt(config: TuneConfig, method: MethodConfig, task: Task, few: FewShot) -> ModularPrompt:
    """The artifact that the settings name, or the random subspace that the method asks for."""
    name = config.prompts or method.prompts
    settings = method.projection
    if (name == NO_PROMPTS) != (settings is not None):
        wanted = "takes no artifact, but --prompts none" if settings else "needs a prompt artifact"
        raise UsageError(f"--prompts {name}: the method {method.name} {wanted}")
    if settings is None:
        return ModularPrompt.load(resolve_prompts(name))
    if settings.readout == "span" and settings.head is None and settings.start is None:
        raise UsageError(
            f"--method {method.name}: projection.head is missing; the span readout needs a trained answer head, "
            "so name a prompt artifact with --set projection.head=NAME"
        )
    if settings.readout == "verbalizer":
        named_language_model(config.backbone)
    head = ModularPrompt.load(resolve_prompts(settings.head)) if settings.head is not None else None
    start = ModularPrompt.load(resolve_prompts(settings.start)) if settings.start is not None else None
    if start is not None:
        settings = settings.model_copy(update={"prompt_length": start.config.prompt_length})
    trained = head or start
    facts = measure_backbone(
        config.backend,
        [write(task, example, settings.readout) for example in few.train],
        settings,
        backbone=config.backbone or (trained.config.backbone if trained is not None else None),
        max_tokens=config.max_tokens,
        threads=config.threads,
    )
    return random_prompt(settings, facts, config.seed, head, start)


def _warn_of_seen_examples(config: TuneConfig, task: Task, prompt: ModularPrompt) -> None:
    """Say so when the few-shot split may hold examples that the prompts were trained on."""
    recipe = prompt.config.training.get("recipe", {})
    if task.name in prompt.config.tasks and (config.shots or config.seed not in recipe.get("spare_seeds", [])):
        log.warning(
            "the prompts were trained on %s and left out the few-shot pools of seeds %s only: with --seed %d%s some "
            "few-shot examples may have been trained on",
            task.name,
            ", ".join(map(str, recipe.get("spare_seeds", []))) or "(none)",
            config.seed,
            f" --shots {config.shots}" if config.shots else "",
        )


def limited(examples: Sequence[Example], limit: int | None, seed: int) -> tuple[Example, ...]:
    """At most `limit` examples, drawn by the seed and kept in their order; all of them without a limit."""
    if limit is None or limit >= len(examples):
        return tuple(examples)
    order = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return tuple(examples[i] for i in sorted(order.tolist()))


def default_directory(run: Prepared | PreparedBaseline) -> Path:
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


def located(config: TuneConfig) -> TuneConfig:
    """The settings with every path absolute, so that a run can be resumed and used from anywhere."""
    named = {"task": config.task, "method": config.method}
    paths = {key: value for key, value in named.items() if value.endswith((".yaml", ".yml"))}
    paths |= {key: value for key, value in (("backbone", config.backbone), ("prompts", config.prompts)) if value}
    if config.data not in ("auto", "hub", "sample"):
        paths["data"] = config.data
    found = {key: str(Path(value).resolve()) for key, value in paths.items() if Path(value).exists()}
    head = config.set.get("projection.head")
    if isinstance(head, str) and Path(head).is_dir():
        return config.model_copy(update={**found, "set": {**config.set, "projection.head": str(Path(head).resolve())}})
    return config.model_copy(update=found)


def tune(run: Prepared | PreparedBaseline, directory: RunDirectory, watcher: Watcher | None = None) -> Result:
    """Run, or go on with, a search in its directory and write its result.

    Raises:
        DiskError: A file cannot be written.
        ResumeMismatch: The directory's run began with other settings, data, model or code.
        Interrupted: The watcher asked to stop.
    """
    watcher = watcher or Watcher()
    if not isinstance(run, Prepared):
        from bbprompt.baselines.method import tune_baseline

        return tune_baseline(run, directory, watcher)
    directory.check_manifest(run.manifest())
    clock = CurveClock(directory)
    ledger = Ledger(directory.journal(), run.config.budget)
    replayed = ledger.reserved - len(ledger.in_doubt)
    kind = run.oracle.info.readout
    train = labelled(run.task, run.few.train, for_loss=True, readout=kind)
    dev = labelled(run.task, run.few.dev, for_loss=True, readout=kind)
    charge = run.config.on_doubt == "charge"
    evaluator = Evaluator(
        run.oracle, ledger, run.readout, run.task, train, dev, charge=charge, calibrates=run.method.calibrate
    )
    watcher.prepared(run)

    def report(status: Status) -> None:
        directory.append_curve(
            status.calls, status.stage, status.train_loss, status.dev_metric, clock.row(status.calls <= replayed)
        )
        watcher.status(status)

    found = search(run.method, run.prompt.space, evaluator, run.config.seed, report)
    searched = time.monotonic()
    points, which = np.unique(found.points.astype(np.float32), axis=0, return_inverse=True)
    score = score_split(
        run.oracle,
        [(int(row), look.readout) for row, look in zip(which.flatten(), found.looks, strict=True)],
        run.task,
        run.test,
        points,
        lambda done: watcher.testing(done, len(run.test)),
    )
    ended = time.monotonic()
    seconds = Seconds(
        total=round(clock.total + run.load_seconds, 3),
        oracle=round(evaluator.oracle_seconds, 3),
        optimizer=round(found.optimizer_seconds, 3),
        load=round(run.load_seconds, 3),
        test=round(ended - searched, 3),
    )
    calls = Calls(train=ledger.by_kind["train"], dev=ledger.by_kind["dev"], test=len(points))
    result = _result(run, found, score, calls, evaluator.cut, seconds)
    result = result.model_copy(update={"baselines": _baselines(run, watcher)})
    directory.write_bytes(PROMPT, pack(_tensors(run, found)))
    directory.write_json(RESULT, result.model_dump(mode="json"))
    return result


def _baselines(run: Prepared, watcher: Watcher) -> tuple[BaselineScore, ...]:
    """The cheap methods on the same data, for the table alone: nothing is chosen by them, and no call is charged."""
    if not run.config.baselines or not can_embed(run.oracle):
        return ()
    from bbprompt.baselines.report import compare

    return compare(run.task, run.few, run.test, run.oracle, watcher.comparing)


def _result(
    run: Prepared,
    found: Found,
    score: SplitScore,
    calls: Calls,
    cut: int,
    seconds: Seconds,
) -> Result:
    metric = run.task.metric
    tests = list(score.values)
    gold = [example.label for example in run.test]
    most = majority(gold, len(run.task.options)) if run.task.labelled else 0.0
    stages = tuple(
        StageResult(
            name=trace.name,
            optimizer=trace.optimizer,
            calls=trace.calls,
            train_loss=trace.train_loss,
            dev=trace.chosen.dev_metric,
            test=float(values.mean()),
            ended=trace.ended,
            seconds=round(trace.seconds, 3),
        )
        for trace, values in zip(found.stages, tests[1:], strict=True)
    )
    final = tests[-1]
    what = {
        "point": hashlib.sha256(found.chosen.incumbent.point.astype("<f4").tobytes()).hexdigest(),
        "calls": calls.model_dump(),
        "dev": found.chosen.dev_metric.hex(),
        "train": [trace.train_loss.hex() for trace in found.stages],
        "test": float(final.mean()).hex(),
    }
    return Result(
        task=run.task.name,
        data=DataUsed(
            source=run.data.source,
            id=str(run.data.id),
            train=len(run.few.train),
            dev=len(run.few.dev),
            test=len(run.test),
        ),
        method=run.method.name,
        backbone=run.oracle.info.backbone,
        prompts=run.config.prompts or run.method.prompts,
        backend=run.config.backend,
        seed=run.config.seed,
        budget=run.config.budget,
        calls=calls,
        before=Before(metric=metric, dev=found.before.dev_metric, test=float(tests[0].mean()), majority=most),
        stages=stages,
        dev=found.chosen.dev_metric,
        test=TestScore(metric=metric, value=float(final.mean()), stderr=standard_error(final), n=len(final)),
        cut_tokens=cut + score.cut,
        seconds=seconds,
        digest=run_digest(what),
    )


def _tensors(run: Prepared, found: Found) -> dict[str, NDArray[Any]]:
    """What was tuned: the point, and where there are such its router, the options' offsets, prompts of no artifact."""
    chosen = found.chosen.incumbent
    tensors: dict[str, NDArray[Any]] = {"point": chosen.point.astype(np.float32)}
    if chosen.router is not None:
        tensors["router"] = chosen.router.astype(np.float32)
    if run.method.projection is not None:
        tensors |= frozen_tensors(run.prompt, chosen.point)
    if found.chosen.readout.offsets:
        tensors["offsets"] = np.array(found.chosen.readout.offsets, dtype=np.float64)
    return tensors


def run_digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value in canonical form."""
    from bbprompt.store.journal import canonical_json

    return hashlib.sha256(canonical_json(value)).hexdigest()
