"""A descent as a run: the same directory, few-shot data, budget and result as a search."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bbprompt.advice import warn_of_seen_examples
from bbprompt.backends.backbone import Backbone
from bbprompt.backends.fit import check_fit, info_of
from bbprompt.backends.local import LocalOracle
from bbprompt.backends.memory import batch_tokens_for, keep_freed_memory
from bbprompt.backends.overlay import PREFIX, overlaid, rows_read, with_rows
from bbprompt.backends.stock import StockOracle
from bbprompt.baselines.report import compare
from bbprompt.config import MethodConfig, TuneConfig
from bbprompt.connect import chosen_device, cores, single_precision
from bbprompt.descent_settings import GradientConfig
from bbprompt.errors import ArtifactError, UsageError
from bbprompt.frozen import frozen_tensors, written_out
from bbprompt.gradient.calls import DescentCalls
from bbprompt.gradient.checkpoint import Checkpoint
from bbprompt.gradient.descent import Descended, Descent
from bbprompt.gradient.forward import Forward
from bbprompt.gradient.soft import SoftModel, SoftPrompt
from bbprompt.gradient.start import start_of
from bbprompt.opened import Watcher
from bbprompt.oracle import Oracle, OracleInfo
from bbprompt.outcome import outcome
from bbprompt.possible import check_graded
from bbprompt.prompts import ModularPrompt
from bbprompt.readout import Readout
from bbprompt.result import BaselineScore, Calls, Result, Seconds
from bbprompt.scoring import Labelled, SplitScore, labelled, score_split
from bbprompt.search.tuner import Status
from bbprompt.store.curve import CurveClock
from bbprompt.store.ledger import Ledger
from bbprompt.store.manifest import manifest_of
from bbprompt.store.rundir import PROMPT, RESULT, RunDirectory
from bbprompt.tasks.data import DataSource
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import FewShot
from bbprompt.tasks.task import Task
from bbprompt.tensorfile import pack

__all__ = ["PreparedGradient", "prepare_gradient", "tune_gradient"]

#: Tokens whose states are held at once for the way back; states of every layer, so fewer than forward.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}

_Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class PreparedGradient:
    """A descent with everything open; see `bbprompt.run.Prepared`.

    Attributes:
        task: Its texts are written as the method says.
        prompt: Where it begins: an artifact, or a prompt of zeros.
        backbone: The frozen model.
        device: "cpu" or "cuda".
        model: What the model says of itself.
    """

    config: TuneConfig
    method: MethodConfig
    task: Task
    data: DataSource
    few: FewShot
    test: tuple[Example, ...]
    prompt: ModularPrompt
    backbone: Backbone
    device: str
    model: OracleInfo
    threads: int
    load_seconds: float

    @property
    def gradient(self) -> GradientConfig:
        """The method's settings."""
        if self.method.gradient is None:
            raise ValueError(f"method {self.method.name} descends no gradient")
        return self.method.gradient

    @property
    def reader(self) -> Forward:
        """What reads the texts."""
        weights = torch.from_numpy(self.prompt.head_weight), torch.from_numpy(self.prompt.head_bias)
        return _forward(self, self.backbone, weights)

    def manifest(self) -> dict[str, Any]:
        """Everything that decides the result."""
        return manifest_of(self)

    def tune(self, directory: RunDirectory, watcher: Watcher) -> Result:
        """Descend in a directory and write the result; see `tune_gradient`."""
        return tune_gradient(self, directory, watcher)

    def close(self) -> None:
        """Nothing to do: the model goes with this object."""


def prepare_gradient(
    config: TuneConfig,
    method: MethodConfig,
    task: Task,
    data: DataSource,
    few: FewShot,
    test: tuple[Example, ...],
    began: float,
) -> PreparedGradient:
    """Open prompts and model of a descent; nothing is written and no call is made.

    Raises:
        UsageError: The model is not local, or the prompts are not of the kind that the method goes on with.
        ArtifactError: Prompts and model do not fit each other.
    """
    settings = method.gradient
    if settings is None:
        raise ValueError(f"method {method.name} descends no gradient")
    for flag, value in (("--backend", config.backend if config.backend != "local" else None), ("--ray", config.ray)):
        if value is not None:
            raise UsageError(
                f"{flag} {value}: the method {method.name} goes backward through the model, which only one that is "
                f"here can; leave {flag} out"
            )
    if config.workers is not None:
        raise UsageError(f"--workers: the method {method.name} runs in one process; leave it out")
    threads = config.threads or cores()
    torch.set_num_threads(threads)
    keep_freed_memory()
    device = chosen_device(config.device)
    config = config.model_copy(update={"threads": threads, "dtype": single_precision(config.dtype)})
    options = max(len(example.options) for example in (*few.train, *few.dev, *test))
    backbone, prompt, task = start_of(config, method, settings, task, options)
    check_fit(prompt, backbone)
    if not backbone.packed and prompt.config.readout != "verbalizer":
        raise ArtifactError(f"backbone {backbone.id}: such a language model is read by a verbalizer, not by a head")
    check_graded(method, task, prompt.config.readout)
    warn_of_seen_examples(config, task, prompt)
    tokens = config.batch_tokens or _BATCH_TOKENS[device]
    info = info_of(backbone, device, config.dtype, backbone.limit(config.max_tokens), tokens, prompt)
    took = time.monotonic() - began
    return PreparedGradient(config, method, task, data, few, test, prompt, backbone, device, info, threads, took)


def tune_gradient(run: PreparedGradient, directory: RunDirectory, watcher: Watcher) -> Result:
    """Descend in a directory and write the result; the errors are those of `bbprompt.run.tune`."""
    directory.check_manifest(run.manifest())
    clock = CurveClock(directory)
    ledger = Ledger(directory.journal(), run.config.budget)
    replayed = ledger.reserved - len(ledger.in_doubt)
    checkpoint = Checkpoint(directory)
    kind = run.prompt.config.readout
    train = labelled(run.task, run.few.train, for_loss=True, readout=kind)
    soft = _soft(run, train).to(run.device)
    learning = replace(run.backbone, model=soft.model) if isinstance(soft, SoftModel) else None
    weights = soft.head_weight, soft.head_bias
    forward = _forward(run, learning or run.backbone, weights, learns=learning is not None)
    watcher.prepared(run)

    def report(status: Status) -> None:
        directory.append_curve(
            status.calls,
            status.stage,
            status.train_loss,
            status.dev_metric,
            clock.row(status.calls <= replayed, descent.seconds),
        )
        watcher.status(status)

    descent = Descent(
        run.method,
        run.task,
        soft,
        forward,
        train,
        labelled(run.task, run.few.dev, for_loss=True, readout=kind),
        DescentCalls(ledger, checkpoint.calls),
        checkpoint,
        run.config.seed,
        report,
    )
    found = descent.run()
    descended = time.monotonic()
    keys = [look.key for look in (found.before, *(stage.chosen for stage in found.stages))]
    score, prompts = _tested(run, found, keys, watcher)
    seconds = Seconds(
        total=round(clock.total + run.load_seconds, 3),
        oracle=round(clock.oracle(found.seconds), 3),
        optimizer=round(found.adam_seconds, 3),
        load=round(run.load_seconds, 3),
        test=round(time.monotonic() - descended, 3),
    )
    calls = Calls(train=ledger.by_kind["train"], dev=ledger.by_kind["dev"], test=prompts)
    tensors = _tensors(run, found.kept[found.chosen.key])
    names = ("prompt", "head.weight", "head.bias", *sorted(name for name in tensors if name.startswith(PREFIX)))
    point = b"".join(tensors[name].astype("<f4").tobytes() for name in names)
    cut = found.cut + score.cut
    result = outcome(run, found.before, found.stages, found.chosen, score.values, calls, cut, seconds, point)
    result = result.model_copy(update={"baselines": _baselines(run, found.kept[found.before.key], watcher)})
    directory.write_bytes(PROMPT, pack(tensors))
    directory.write_json(RESULT, result.model_dump(mode="json"))
    checkpoint.remove()
    return result


def _soft(run: PreparedGradient, train: Labelled) -> SoftPrompt:
    """What is moved, where it begins."""
    start = run.prompt, run.method.rule, run.config.seed
    if run.gradient.model is None:
        return SoftPrompt(*start)
    read = rows_read(run.backbone, run.reader.tokens(train.batch))
    return SoftModel(*start, with_rows(run.backbone.model, read))


def _forward(
    run: PreparedGradient, backbone: Backbone, weights: tuple[torch.Tensor, torch.Tensor], learns: bool = False
) -> Forward:
    """The model as it is gone backward through, with a span head of these weights where it has one."""
    return Forward(
        backbone,
        run.prompt.config,
        weights,
        device=run.device,
        dtype=run.config.dtype,
        limit=run.model.max_tokens,
        support=run.method.support,
        batch_tokens=run.model.batch_tokens,
        learns=learns,
    )


def _tested(run: PreparedGradient, found: Descended, keys: list[int], watcher: Watcher) -> tuple[SplitScore, int]:
    """Test metric of the prompt of each key, a row each, by an oracle as `eval` opens it; and how many were scored."""
    readout = Readout(run.method.support, run.method.legacy_decision)
    scored: dict[int, SplitScore] = {}
    different = list(dict.fromkeys(keys))
    for place, key in enumerate(different):
        oracle, point = _oracle(run, found.kept[key])
        done, total = place * len(run.test), len(different) * len(run.test)
        scored[key] = score_split(
            oracle,
            [(0, readout)],
            run.task,
            run.test,
            point[None],
            lambda count, done=done, total=total: watcher.testing(done + count, total),  # type: ignore[misc]
        )
        oracle.close()
    values = np.concatenate([scored[key].values for key in keys])
    return SplitScore(values, max(score.cut for score in scored.values())), len(different)


def _oracle(run: PreparedGradient, tensors: _Tensors) -> tuple[Oracle, NDArray[np.float32]]:
    """An oracle around the model that is loaded, and the point in it that is the prompt."""
    prompt, point = _written(run, tensors)
    hidden = run.backbone.hidden
    kind = LocalOracle if run.backbone.packed else StockOracle
    oracle = kind(
        overlaid(run.backbone, tensors),
        prompt,
        device=run.device,
        dtype=run.config.dtype,
        batch_tokens=run.config.batch_tokens or batch_tokens_for(hidden, 4 * hidden, run.device),
        max_tokens=run.config.max_tokens,
    )
    return oracle, point


def _written(run: PreparedGradient, tensors: _Tensors) -> tuple[ModularPrompt, NDArray[np.float32]]:
    config = run.prompt.config
    return written_out(
        tensors["prompt"],
        config.placeholders,
        (tensors["head.weight"], tensors["head.bias"]),
        (run.backbone.id, run.backbone.digest),
        config.readout,
        config.pooling,
    )


def _tensors(run: PreparedGradient, tensors: _Tensors) -> dict[str, NDArray[Any]]:
    """What was tuned, as `bbprompt.predict` reads it."""
    prompt, point = _written(run, tensors)
    kept: dict[str, NDArray[Any]] = {"point": point, **frozen_tensors(prompt, point)}
    return kept | {name: array for name, array in tensors.items() if name == "router" or name.startswith(PREFIX)}


def _baselines(run: PreparedGradient, tensors: _Tensors, watcher: Watcher) -> tuple[BaselineScore, ...]:
    """The cheap methods on the same data, for the table alone."""
    if not run.config.baselines:
        return ()
    oracle, _ = _oracle(run, tensors)
    return compare(run.task, run.few, run.test, oracle, watcher.comparing)
