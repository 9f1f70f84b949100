"""The search: the untuned prompt, its stages in turn, and the explicit choice among what was looked at.

One loop for both stages: ask, score on train, tell; now and then look at the incumbent on dev. Which prompt
is returned is decided by dev (and train) alone, by the method's `select` rule.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bbprompt.config import MethodConfig
from bbprompt.prompts import PromptSpace
from bbprompt.search.evaluate import Evaluator
from bbprompt.search.refine import refine_stage
from bbprompt.search.stages import Incumbent, Stage, prompt_stage, router_stage
from bbprompt.store.ledger import BudgetExhausted

_T = TypeVar("_T")

__all__ = ["Found", "Look", "StageTrace", "Status", "search"]


@dataclass(frozen=True, slots=True)
class Look:
    """An incumbent with what train and dev say of it; `searched` if it was found by minimising the train loss."""

    incumbent: Incumbent
    dev_loss: float
    dev_metric: float
    searched: bool = False

    @property
    def pooled_loss(self) -> float:
        """Train and dev loss together."""
        return self.incumbent.loss + self.dev_loss


@dataclass(frozen=True, slots=True)
class Status:
    """Where the search stands: for the progress bar and the curve."""

    calls: int
    stage: str
    train_loss: float
    dev_metric: float


@dataclass(frozen=True, slots=True)
class StageTrace:
    """One finished stage.

    Attributes:
        name: "upstream", "router", "prompt" or "refine".
        optimizer: What drove it.
        calls: Train and dev calls it made.
        train_loss: Loss of its incumbent.
        chosen: The look that the method's rule preferred at its end, which may stem from before the stage.
        seconds: Wall time.
    """

    name: str
    optimizer: str
    calls: int
    train_loss: float
    chosen: Look
    seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """What the search returns."""

    before: Look
    stages: tuple[StageTrace, ...]
    chosen: Look
    optimizer_seconds: float

    @property
    def points(self) -> NDArray[np.float64]:
        """The untuned point and the one chosen after each stage, `(1 + stages, L, d)`."""
        return np.stack([self.before.incumbent.point, *(stage.chosen.incumbent.point for stage in self.stages)])


def search(
    method: MethodConfig,
    space: PromptSpace,
    evaluator: Evaluator,
    seed: int,
    report: Callable[[Status], None],
) -> Found:
    """Spend the evaluator's budget on the method's stages.

    Args:
        method: Stages and the rule of choice.
        space: What is searched.
        evaluator: Scores candidates; its budget bounds everything.
        seed: Of the optimizers.
        report: Told after every batch of calls.
    """
    run = _Search(method, evaluator, report)
    even = space.even()
    before = run.look(Incumbent(even, float(evaluator.train(even[None])[0])))
    run.report("start", before.incumbent.loss)
    traces = []
    if method.router is not None:
        share = 1.0 if method.prompt is None and method.refine is None else method.router.share
        if method.router.warm_start and len(space.routers):
            traces.append(run.upstream(space, method.router.batch, int(share * evaluator.left)))
        if method.router.optimizer != "listing":
            most = min(method.router.calls, max(int(share * evaluator.left), method.router.batch))
            stage: Stage = router_stage(method.router, space, method.rule, run.chosen.incumbent, seed)
            traces.append(run.stage(stage, method.router.batch, method.router.dev_every, most))
    if method.prompt is not None:
        start = run.settled().incumbent
        stage = prompt_stage(method.prompt, start, seed, space.fixed)
        kept = method.refine.share if method.refine is not None else 0.0
        most = max(int((1.0 - kept) * evaluator.left), method.prompt.popsize)
        traces.append(run.stage(stage, method.prompt.popsize, method.prompt.dev_every, most if kept else None))
    if method.refine is not None:
        stage = refine_stage(method.refine, run.settled().incumbent, evaluator.left - 1, space.fixed)
        traces.append(run.stage(stage, 1, method.refine.dev_every, most=None))
    return Found(before, tuple(traces), run.chosen, run.optimizer_seconds)


class _Search:
    """What the stages of one search share: the looks taken so far."""

    def __init__(self, method: MethodConfig, evaluator: Evaluator, report: Callable[[Status], None]) -> None:
        self._method, self._evaluator, self._report = method, evaluator, report
        self._looks: list[Look] = []
        self._alone: set[bytes] = set()
        self.optimizer_seconds = 0.0

    @property
    def chosen(self) -> Look:
        """The look that the method's rule prefers; the earliest of equals."""
        return functools.reduce(lambda held, look: look if self._better(look, held) else held, self._looks)

    def look(self, incumbent: Incumbent, searched: bool = False) -> Look:
        """Score an incumbent on dev, unless that was done: one call."""
        for known in self._looks:
            if np.array_equal(known.incumbent.point, incumbent.point):
                return known
        self._looks.append(Look(incumbent, *self._evaluator.dev(incumbent.point), searched))
        return self._looks[-1]

    def settled(self) -> Look:
        """What `chosen` is once its train loss is measured alone: one call, where populations are scored more roughly.

        The next stage compares its own losses with it, and they differ by less than what the error may be.
        """
        # The first look is at the untuned prompt, which is scored alone.
        while (look := self.chosen) is not self._looks[0] and self._evaluator.mixed and self._evaluator.left:
            point = look.incumbent.point
            if point.tobytes() in self._alone:
                break
            self._alone.add(point.tobytes())
            loss = float(self._evaluator.train(point[None])[0])
            at = next(i for i, known in enumerate(self._looks) if known is look)
            self._looks[at] = replace(look, incumbent=replace(look.incumbent, loss=loss))
        return look

    def report(self, stage: str, train_loss: float) -> None:
        """Tell where the search stands."""
        self._report(Status(self._evaluator.spent, stage, train_loss, self.chosen.dev_metric))

    def upstream(self, space: PromptSpace, size: int, most: int) -> StageTrace:
        """Score the upstream tasks' own mixtures, each on train and on dev: is this task like one of them?

        Few candidates of which many may fit the 32 training texts by chance: looking at all of them on dev doubles
        what the choice rests on. At most `most` calls are made, `size` mixtures at a time.
        """
        began, first = time.monotonic(), self._evaluator.spent
        best = self.chosen.incumbent.loss
        for begin in range(0, len(space.routers), size):
            routers = space.routers[begin : begin + size]
            if self._evaluator.spent - first + 2 * len(routers) > min(most, self._evaluator.left):
                break
            points = space.mix(routers, space.rule)
            losses = self._evaluator.train(points)
            for point, loss, router in zip(points, losses, routers, strict=True):
                self.look(Incumbent(point, float(loss), router))
            best = min(best, float(losses.min()))
            self.report("upstream", best)
        return StageTrace(
            "upstream", "listing", self._evaluator.spent - first, best, self.chosen, time.monotonic() - began
        )

    def stage(self, stage: Stage, size: int, dev_every: int, most: int | None) -> StageTrace:
        """Run one stage until its calls, the budget or its optimizer end.

        An ask is only made when the budget holds all of it and the look that may follow; what is left is not
        spent.
        """
        began, first, train_calls = time.monotonic(), self._evaluator.spent, 0
        next_look = dev_every
        while stage.stop is None and size + 1 <= self._evaluator.left:
            if most is not None and train_calls + size > most:
                break
            points = self._timed(stage.ask)
            try:
                losses = self._evaluator.train(points)
            except BudgetExhausted:  # calls that a crash lost were charged, and what is left does not hold these
                break
            self._timed(functools.partial(stage.tell, losses))
            train_calls += len(points)
            if train_calls >= next_look:
                self.look(stage.incumbent, searched=True)
                next_look += dev_every * ((train_calls - next_look) // dev_every + 1)
            self.report(stage.name, stage.incumbent.loss)
        if self._evaluator.left:
            self.look(stage.incumbent, searched=True)
        self.report(stage.name, stage.incumbent.loss)
        return StageTrace(
            stage.name,
            stage.optimizer,
            self._evaluator.spent - first,
            stage.incumbent.loss,
            self.chosen,
            time.monotonic() - began,
        )

    def _timed(self, work: Callable[[], _T]) -> _T:
        began = time.monotonic()
        try:
            return work()
        finally:
            self.optimizer_seconds += time.monotonic() - began

    def _better(self, look: Look, held: Look) -> bool:
        """Whether the method's rule prefers a later look to the one held so far."""
        match self._method.select:
            case "both-losses":
                lower = look.pooled_loss < held.pooled_loss
                return lower and (not look.searched or look.dev_loss < held.dev_loss)
            case "dev-loss":
                return look.dev_loss < held.dev_loss
            case "pooled-loss":
                return look.pooled_loss < held.pooled_loss
            case "dev-metric":
                return look.dev_metric > held.dev_metric
