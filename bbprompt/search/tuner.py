"""The search: the untuned prompt, its stages in turn, and the explicit choice among what was looked at.

One loop for both stages: ask, score on train, tell; now and then look at the incumbent on dev. Which prompt
is returned is decided by dev (and train) alone, by the method's `select` rule.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bbprompt.config import MethodConfig
from bbprompt.prompts import PromptSpace
from bbprompt.readout import Readout
from bbprompt.search.choice import better
from bbprompt.search.evaluate import DevScore, Evaluator
from bbprompt.search.refine import refine_stage
from bbprompt.search.stages import Incumbent, Routing, Stage, prompt_stage, router_helper, router_stage
from bbprompt.stage_settings import RouterStageConfig
from bbprompt.store.ledger import BudgetExhausted

_T = TypeVar("_T")

__all__ = ["Found", "Look", "StageTrace", "Status", "search"]


@dataclass(frozen=True, slots=True)
class Look:
    """An incumbent with what train and dev say of it.

    Attributes:
        incumbent: The prompt.
        dev: What dev says of it.
        readout: How its scores were read.
        train: `(T,)`, what `Readout.compared` says of it on the train texts.
        searched: Whether it was found by minimising the train loss.
    """

    incumbent: Incumbent
    dev: DevScore
    readout: Readout
    train: tuple[float, ...]
    searched: bool = False

    @property
    def dev_loss(self) -> float:
        """Mean loss on dev."""
        return self.dev.loss

    @property
    def dev_metric(self) -> float:
        """Metric on dev."""
        return self.dev.metric

    @property
    def pooled_loss(self) -> float:
        """Train and dev loss together, at the temperature that suits them best."""
        return float(self._pooled.min())

    @property
    def dev_losses(self) -> tuple[float, ...]:
        """Dev loss of each text, at that temperature."""
        return self.dev.losses[int(self._pooled.argmin())]

    @property
    def _pooled(self) -> NDArray[np.float64]:
        """Train and dev loss together at each temperature."""
        pooled: NDArray[np.float64] = np.array(self.train) + np.mean(self.dev.losses, axis=1)
        return pooled


@dataclass(frozen=True, slots=True)
class Status:
    """Where the search stands: for the progress bar and the curve.

    Attributes:
        calls: Train and dev calls settled so far.
        stage: Name of the stage.
        train_loss: The stage's lowest train loss so far.
        dev_metric: The highest dev metric so far, a fraction; not always that of the prompt that would be returned,
            which the method's rule chooses.
    """

    calls: int
    stage: str
    train_loss: float
    dev_metric: float


@dataclass(frozen=True, slots=True)
class StageTrace:
    """One finished stage.

    Attributes:
        name: "upstream", "router", "prompt", "refine" or "calibration".
        optimizer: What drove it.
        calls: Train and dev calls it made.
        train_loss: Loss of its incumbent.
        chosen: The look that the method's rule preferred at its end, which may stem from before the stage.
        ended: Why it ended: "calls" where it made all of its own, "budget" where what is left does not hold another
            batch, "patience" where dev had nothing to gain for long, else the optimizer's reason.
        seconds: Wall time.
    """

    name: str
    optimizer: str
    calls: int
    train_loss: float
    chosen: Look
    ended: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """What the search returns."""

    before: Look
    stages: tuple[StageTrace, ...]
    chosen: Look
    optimizer_seconds: float

    @property
    def looks(self) -> tuple[Look, ...]:
        """At the untuned prompt and at the one chosen after each stage."""
        return (self.before, *(stage.chosen for stage in self.stages))

    @property
    def points(self) -> NDArray[np.float64]:
        """The points of these prompts, `(1 + stages, L, d)`."""
        return np.stack([look.incumbent.point for look in self.looks])


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
    helper = router_helper(method.router)  # before the first call, so that it is ready when it is wanted
    run = _Search(method, evaluator, report)
    even = space.even()
    run.looks([Incumbent(even, float(evaluator.train(even[None])[0]))])
    before = run.chosen
    run.report("start", before.incumbent.loss)
    traces = []
    if method.router is not None:
        share = 1.0 if method.prompt is None and method.refine is None else method.router.share
        if method.router.warm_start and len(space.routers):
            traces.append(run.upstream(space, method.router, int(share * evaluator.left)))
        if method.router.optimizer != "listing":
            most = min(method.router.calls, max(int(share * evaluator.left), method.router.batch))
            stage: Stage = router_stage(method.router, space, method.rule, run.chosen.incumbent, seed, helper)
            traces.append(run.stage(stage, method.router.batch, method.router.dev_every, most=most))
    if method.prompt is not None:
        start = run.settled().incumbent
        stage = prompt_stage(method.prompt, start, seed, space.fixed)
        kept = method.refine.share if method.refine is not None else 0.0
        own = max(int((1.0 - kept) * evaluator.left), method.prompt.popsize) if kept else None
        settings = method.prompt
        traces.append(run.stage(stage, settings.popsize, settings.dev_every, most=own, patience=settings.patience))
    if method.refine is not None:
        # It goes on from the lower train loss, whatever dev says of it; dev chooses in the end.
        start = run.settled().incumbent
        if method.prompt is not None:
            start = min(start, run.measured(stage.incumbent), key=lambda each: each.loss)
        stage = refine_stage(method.refine, start, evaluator.left - 1, space.fixed)
        traces.append(run.stage(stage, 1, method.refine.dev_every, patience=method.refine.patience))
    if evaluator.calibrates:
        traces.append(run.calibration())
    return Found(before, tuple(traces), traces[-1].chosen if traces else before, run.optimizer_seconds)


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
        return functools.reduce(lambda held, look: look if better(self._method, look, held) else held, self._looks)

    def looks(self, incumbents: Sequence[Incumbent], searched: bool = False) -> bool:
        """Score incumbents on dev together, but for those that were looked at before: a call each.

        Returns:
            False if calls that a crash lost were charged, and what is left does not hold these: nothing was scored.

        Raises:
            BudgetExhausted: It is so with the first look, before which there is nothing to return.
        """
        new: list[Incumbent] = []
        for incumbent in incumbents:
            seen = [*(known.incumbent for known in self._looks), *new]
            if not any(np.array_equal(incumbent.point, other.point) for other in seen):
                new.append(incumbent)
        if new:
            try:
                scores = self._evaluator.dev(np.stack([incumbent.point for incumbent in new]))
            except BudgetExhausted:
                if not self._looks:
                    raise
                return False
            for incumbent, score in zip(new, scores, strict=True):
                readout, train = self._evaluator.readout(incumbent.point), self._train(incumbent)
                self._looks.append(Look(incumbent, score, readout, train, searched))
        return True

    def calibration(self) -> StageTrace:
        """Fit the labels' offsets to the chosen prompt; they stand whatever dev says, for it was fitted to as well."""
        began, first, look, ended = time.monotonic(), self._evaluator.spent, self.chosen, "calls"
        chosen = look.incumbent
        try:
            train_loss, score = self._evaluator.calibrate(chosen.point)
        except BudgetExhausted:  # calls that a crash lost were charged, these among them
            train_loss, ended = chosen.loss, "budget"
        else:
            chosen = Incumbent(chosen.point, train_loss, chosen.routing)
            look = Look(chosen, score, self._evaluator.readout(chosen.point), self._train(chosen), searched=True)
        self.report("calibration", train_loss, look)
        spent = self._evaluator.spent - first
        return StageTrace("calibration", "newton", spent, train_loss, look, ended, time.monotonic() - began)

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
            try:
                loss = float(self._evaluator.train(point[None])[0])
            except BudgetExhausted:  # as in `looks`
                break
            at = next(i for i, known in enumerate(self._looks) if known is look)
            incumbent = replace(look.incumbent, loss=loss)
            self._looks[at] = replace(look, incumbent=incumbent, train=self._train(incumbent))
        return look

    def measured(self, incumbent: Incumbent) -> Incumbent:
        """The same with the train loss of its point alone: one call, where there is one.

        A point that a stage put together from several candidates was never scored as it is.
        """
        try:
            return replace(incumbent, loss=float(self._evaluator.train(incumbent.point[None])[0]))
        except BudgetExhausted:  # nothing is left, or calls that a crash lost were charged
            return incumbent

    def report(self, stage: str, train_loss: float, *later: Look) -> None:
        """Tell where the search stands, with what was looked at outside the choice."""
        highest = max(look.dev_metric for look in (*self._looks, *later))
        self._report(Status(self._evaluator.spent, stage, train_loss, highest))

    def upstream(self, space: PromptSpace, config: RouterStageConfig, most: int) -> StageTrace:
        """Score the upstream tasks' own mixtures, each on train and on dev: is this task like one of them?

        Few candidates of which many may fit the 32 training texts by chance: looking at all of them on dev doubles
        what the choice rests on. At most `most` calls are made, a batch of mixtures at a time. With `config.bare` no
        prompt at all is tried first, so that the choice does not end below the backbone for want of looking at it.
        """
        began, first = time.monotonic(), self._evaluator.spent
        best, ended = self.chosen.incumbent.loss, "calls"
        weights = space.weights(space.routers, space.rule)
        routings = map(Routing, space.routers, weights)
        candidates: list[tuple[NDArray[np.float64], Routing | None]] = list(
            zip(space.mix(space.routers, space.rule), routings, strict=True)
        )
        if config.bare:
            candidates.insert(0, (np.zeros(space.shape), None))
        for begin in range(0, len(candidates), config.batch):
            batch = candidates[begin : begin + config.batch]
            if self._evaluator.spent - first + 2 * len(batch) > min(most, self._evaluator.left):
                ended = "budget"
                break
            try:
                losses = self._evaluator.train(np.stack([point for point, _ in batch]))
            except BudgetExhausted:  # as in `looks`
                ended = "budget"
                break
            told = zip(batch, losses, strict=True)
            if not self.looks([Incumbent(point, float(loss), routing) for (point, routing), loss in told]):
                ended = "budget"
                break
            best = min(best, float(losses.min()))
            self.report("upstream", best)
        return StageTrace(
            "upstream", "listing", self._evaluator.spent - first, best, self.chosen, ended, time.monotonic() - began
        )

    def stage(
        self, stage: Stage, size: int, dev_every: int, *, most: int | None = None, patience: int | None = None
    ) -> StageTrace:
        """Run one stage until its calls, the budget, its optimizer or the patience end.

        An ask is only made when the budget holds all of it and the look that may follow; what is left is not
        spent.
        """
        began, first, train_calls = time.monotonic(), self._evaluator.spent, 0
        next_look, idle, ended = dev_every, 0, "budget"
        while size + 1 <= self._evaluator.left:
            if stage.stop is not None:
                ended = stage.stop
                break
            if most is not None and train_calls + size > most:
                ended = "calls"
                break
            if patience is not None and idle >= patience:
                ended = "patience"
                break
            points = self._timed(stage.ask)
            try:
                losses = self._evaluator.train(points)
            except BudgetExhausted:  # calls that a crash lost were charged, and what is left does not hold these
                break
            self._timed(functools.partial(stage.tell, losses))
            train_calls += len(points)
            if train_calls >= next_look:
                held = self.chosen
                self.looks([stage.incumbent], searched=True)
                idle = idle + 1 if self.chosen is held else 0
                next_look += dev_every * ((train_calls - next_look) // dev_every + 1)
            self.report(stage.name, stage.incumbent.loss)
        if self._evaluator.left:
            self.looks([stage.incumbent], searched=True)
        self.report(stage.name, stage.incumbent.loss)
        return StageTrace(
            stage.name,
            stage.optimizer,
            self._evaluator.spent - first,
            stage.incumbent.loss,
            self.chosen,
            ended,
            time.monotonic() - began,
        )

    def _train(self, incumbent: Incumbent) -> tuple[float, ...]:
        """Its train loss at each temperature that prompts are compared at."""
        return self._evaluator.compared(incumbent.point) if self._method.tempered else (incumbent.loss,)

    def _timed(self, work: Callable[[], _T]) -> _T:
        began = time.monotonic()
        try:
            return work()
        finally:
            self.optimizer_seconds += time.monotonic() - began
