"""From what was found to `result.json`: the result of a run that tuned something in stages."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bbprompt.metrics import majority, standard_error
from bbprompt.opened import Opened
from bbprompt.result import Before, Calls, DataUsed, Result, Seconds, StageResult, TestScore
from bbprompt.store.journal import canonical_json

__all__ = ["Scored", "StageEnd", "data_used", "outcome", "run_digest"]


class Scored(Protocol):
    """A prompt that dev was asked about."""

    @property
    def dev_metric(self) -> float:
        """Metric on dev."""


class StageEnd(Protocol):
    """A finished stage; see `bbprompt.search.tuner.StageTrace`."""

    @property
    def name(self) -> str:
        """Of the stage."""

    @property
    def optimizer(self) -> str:
        """What drove it."""

    @property
    def calls(self) -> int:
        """Train and dev calls that it made."""

    @property
    def train_loss(self) -> float:
        """Train loss at its end."""

    @property
    def chosen(self) -> Scored:
        """What the method's rule preferred at its end."""

    @property
    def ended(self) -> str:
        """Why it ended."""

    @property
    def seconds(self) -> float:
        """Wall time."""


def outcome(
    run: Opened,
    before: Scored,
    stages: Sequence[StageEnd],
    chosen: Scored,
    tests: NDArray[np.float64],
    calls: Calls,
    cut: int,
    seconds: Seconds,
    found: bytes,
) -> Result:
    """The result of a run.

    Args:
        run: The run.
        before: The untuned prompt.
        stages: What was done.
        chosen: What is returned.
        tests: `(1 + S, N)` metric of the untuned prompt, and of what was chosen after each stage, on each test example.
        calls: By kind.
        cut: Tokens of texts that did not fit.
        seconds: Wall times.
        found: What is returned, as bytes, for the digest.
    """
    metric, gold = run.task.metric, [example.label for example in run.test]
    final = tests[-1]
    what = {
        "point": hashlib.sha256(found).hexdigest(),
        "calls": calls.model_dump(),
        "dev": chosen.dev_metric.hex(),
        "train": [stage.train_loss.hex() for stage in stages],
        "test": float(final.mean()).hex(),
    }
    return Result(
        task=run.task.name,
        data=data_used(run),
        method=run.method.name,
        backbone=run.model.backbone,
        prompts=run.config.prompts or run.method.prompts,
        backend=run.config.backend,
        seed=run.config.seed,
        budget=run.config.budget,
        calls=calls,
        before=Before(
            metric=metric,
            dev=before.dev_metric,
            test=float(tests[0].mean()),
            majority=majority(gold, len(run.task.options)) if run.task.labelled else 0.0,
        ),
        stages=tuple(
            StageResult(
                name=stage.name,
                optimizer=stage.optimizer,
                calls=stage.calls,
                train_loss=stage.train_loss,
                dev=stage.chosen.dev_metric,
                test=float(values.mean()),
                ended=stage.ended,
                seconds=round(stage.seconds, 3),
            )
            for stage, values in zip(stages, tests[1:], strict=True)
        ),
        dev=chosen.dev_metric,
        test=TestScore(metric=metric, value=float(final.mean()), stderr=standard_error(final), n=len(final)),
        cut_tokens=cut,
        seconds=seconds,
        digest=run_digest(what),
    )


def data_used(run: Opened) -> DataUsed:
    """Where a run's data are from, and how many there are."""
    counts = {"train": len(run.few.train), "dev": len(run.few.dev), "test": len(run.test)}
    return DataUsed(source=run.data.source, id=str(run.data.id), **counts)


def run_digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
