"""The descent: stages of Adam, looks at dev, and the explicit choice among what was looked at.

The rules are those of the papers, where paper and released code differ the paper's (MP2, section 3.4 and appendix A):
stage I moves the router of each layer by relaxed Bernoulli gates, stage II the prompts that it selected, from the
router as it stands at the end of stage I. The released deep run has no noise in stage I and moves the answer head
along in stage II; `router.noise` and `prompt.head` say so. There is no dropout in either. Model tuning is one stage, in
which all weights of the model move.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bbprompt.config import MethodConfig
from bbprompt.descent_settings import LOOK, AnyDescent, GradientConfig, RouterDescentConfig
from bbprompt.errors import OracleError
from bbprompt.gradient.calls import DescentCalls
from bbprompt.gradient.checkpoint import Checkpoint
from bbprompt.gradient.forward import Forward, Piece
from bbprompt.gradient.soft import SoftPrompt
from bbprompt.oracle import check_scores
from bbprompt.readout import Readout
from bbprompt.scoring import Labelled
from bbprompt.search.choice import better
from bbprompt.search.evaluate import DevScore, call_values, dev_score
from bbprompt.search.tuner import Status
from bbprompt.store.ledger import Kind
from bbprompt.tasks.task import Task

__all__ = ["Descended", "Descent", "GradientLook", "GradientStage"]


@dataclass(frozen=True, slots=True)
class GradientLook:
    """A prompt with what train and dev say of it.

    Attributes:
        key: Calls made before the look; names the prompt.
        loss: Mean loss on train.
        dev: What dev says.
        searched: Whether it was found by minimising the train loss.
    """

    key: int
    loss: float
    dev: DevScore
    searched: bool

    @property
    def dev_metric(self) -> float:
        """Metric on dev."""
        return self.dev.metric

    @property
    def pooled_loss(self) -> float:
        """Train and dev loss together."""
        return self.loss + self.dev.loss

    @property
    def dev_losses(self) -> tuple[float, ...]:
        """Dev loss of each text."""
        return self.dev.losses[0]


@dataclass(frozen=True, slots=True)
class GradientStage:
    """One finished stage; see `bbprompt.search.tuner.StageTrace`. `train_loss` is that of its last look."""

    name: str
    calls: int
    train_loss: float
    chosen: GradientLook
    ended: str
    seconds: float
    optimizer: str = "adam"


@dataclass(frozen=True, slots=True)
class Descended:
    """What a descent returns.

    Attributes:
        before: The untuned prompt.
        stages: What was done.
        chosen: The look that the method's rule prefers.
        kept: For the key of each of these looks what its prompt is made of; see `SoftPrompt.written`.
        cut: Tokens cut from the train and dev texts.
        seconds: Wall time in the model.
        adam_seconds: Wall time in the optimizer.
    """

    before: GradientLook
    stages: tuple[GradientStage, ...]
    chosen: GradientLook
    kept: Mapping[int, Mapping[str, NDArray[np.float32]]]
    cut: int
    seconds: float
    adam_seconds: float


class Descent:
    """Moves a soft prompt.

    Args:
        method: Stages and the rule of choice.
        task: For the metric.
        soft: What is moved.
        forward: The model.
        train: Few-shot training batch.
        dev: Few-shot dev batch.
        calls: The budget.
        checkpoint: What makes a killed run go on.
        seed: Of the gates' noise, and of a first prompt that is random.
        report: Told after every step.
    """

    def __init__(
        self,
        method: MethodConfig,
        task: Task,
        soft: SoftPrompt,
        forward: Forward,
        train: Labelled,
        dev: Labelled,
        calls: DescentCalls,
        checkpoint: Checkpoint,
        seed: int,
        report: Callable[[Status], None],
    ) -> None:
        if method.gradient is None:
            raise ValueError(f"method {method.name} descends no gradient")
        self._settings: GradientConfig = method.gradient
        self._method, self._task, self._soft, self._forward = method, task, soft, forward
        self._data: dict[Kind, Labelled] = {"train": train, "dev": dev}
        self._pieces: dict[Kind, list[Piece]] = {kind: forward.pieces(data) for kind, data in self._data.items()}
        self._calls, self._checkpoint, self._seed, self._report = calls, checkpoint, seed, report
        self._readout = Readout(method.support, method.legacy_decision)
        self._kept: dict[int, dict[str, NDArray[np.float32]]] = {}
        self._cut: dict[Kind, int] = {}
        self._stages: list[GradientStage] = []
        self._adam_seconds = self._highest = 0.0
        self.seconds = 0.0

    def run(self) -> Descended:
        """All stages.

        Raises:
            OracleError: A loss is not finite.
            ResumeMismatch: Journal and checkpoint do not say the same, or not what is computed here.
        """
        self._before = self._chosen = self._look(searched=False)
        self._tell("start", self._before.loss)
        if self._settings.soft is not None and self._settings.soft.scale:
            self._soft.shake(self._settings.soft.scale, self._seed)
        stages = self._settings.stages
        # Stages share a budget that is too small for all of them as they would share one that is not.
        share = min(self._calls.left / (self._settings.calls - LOOK), 1.0)
        for name, stage in stages.items():
            last = len(self._stages) == len(stages) - 1
            most = self._calls.left if last else max(int(share * stage.calls + 1e-9), 1 + LOOK)
            self._stages.append(self._stage(name, stage, most))
        return Descended(
            self._before,
            tuple(self._stages),
            self._chosen,
            {look.key: self._kept[look.key] for look in self._held},
            sum(self._cut.values()),
            self.seconds,
            self._adam_seconds,
        )

    @property
    def _held(self) -> list[GradientLook]:
        """The looks whose prompts are still needed."""
        return [self._before, *(stage.chosen for stage in self._stages), self._chosen]

    def _stage(self, name: str, stage: AnyDescent, most: int) -> GradientStage:
        began, first, idle, ended = time.monotonic(), self._calls.made, 0, "calls"
        parameters = self._soft.moved(stage)
        if isinstance(stage, RouterDescentConfig):
            self._soft.routed = True
        adam = torch.optim.Adam(parameters.values(), lr=stage.rate)
        loss = self._chosen.loss
        lowest = math.inf
        for epoch in range(1, stage.epochs + 1):
            if not self._room(most, first):
                ended = "budget"
                break
            value = self._calls.make("train", functools.partial(self._step, stage, adam))
            if epoch % stage.dev_every == 0 or epoch == stage.epochs or not self._room(most, first):
                held = self._chosen
                loss = self._looked(parameters, adam)
                idle = idle + 1 if self._chosen is held else 0
            lowest = min(lowest, value["loss"])
            self._tell(name, lowest)
            if stage.patience is not None and idle >= stage.patience:
                ended = "patience"
                break
        return GradientStage(name, self._calls.made - first, loss, self._chosen, ended, time.monotonic() - began)

    def _room(self, most: int, first: int) -> bool:
        """Whether budget and share of a stage that began at call `first` hold a step and the look that may follow."""
        return min(self._calls.left, most - (self._calls.made - first)) >= 1 + LOOK

    def _step(self, stage: AnyDescent, adam: torch.optim.Adam) -> dict[str, float]:
        """One step of Adam on the whole train batch; its loss is that before the step."""
        began, total, count = time.monotonic(), 0.0, len(self._data["train"].gold)
        adam.zero_grad(set_to_none=True)
        for piece in self._pieces["train"]:
            # The same gates for each piece: together they are one batch.
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._calls.made)
            losses = self._forward.losses(piece, self._soft.for_step(stage, generator))
            torch.autograd.backward(losses.sum() / count)
            total += float(losses.detach().double().sum())
        _check_finite(total, stage)
        self.seconds += time.monotonic() - began
        began = time.monotonic()
        adam.step()
        self._adam_seconds += time.monotonic() - began
        return {"loss": total / count}

    def _looked(self, parameters: Mapping[str, nn.Parameter], adam: torch.optim.Adam) -> float:
        """Look at the prompt as it stands and keep a checkpoint, or take up the one that was kept; its train loss."""
        reading = self._calls.reading
        look = self._look(searched=True)
        if better(self._method, look, self._chosen):
            self._chosen = look
        if not reading:
            needed = {held.key for held in self._held}
            self._kept = {key: tensors for key, tensors in self._kept.items() if key in needed}
            self._checkpoint.save(self._calls.made, self._soft, parameters, adam, self._kept)
        elif not self._calls.reading:
            self._kept = self._checkpoint.restore(self._soft, parameters, adam)
        return look.loss

    def _look(self, searched: bool) -> GradientLook:
        key = self._calls.made
        if not self._calls.reading:
            self._kept[key] = self._soft.written()
        train = self._calls.make("train", functools.partial(self._scored, "train"))
        dev = self._calls.make("dev", functools.partial(self._scored, "dev"))
        self._cut = {"train": int(train.get("cut", 0)), "dev": int(dev.get("cut", 0))}
        score = dev_score(dev, len(self._data["dev"].gold))
        self._highest = max(self._highest, score.metric)
        return GradientLook(key, train["loss"], score, searched)

    def _scored(self, kind: Kind) -> dict[str, float]:
        began = time.monotonic()
        data = self._data[kind]
        longest = self._readout.longest_answer if kind == "dev" and self._task.type == "extractive" else None
        scores = check_scores(
            self._forward.scores(self._pieces[kind], self._soft.current(), longest),
            data.batch,
            1,
            answers=longest is not None,
            channels=self._forward.channels,
        )
        self.seconds += time.monotonic() - began
        return call_values(kind, self._readout, scores, data, self._task)[0]

    def _tell(self, stage: str, train_loss: float) -> None:
        self._report(Status(self._calls.made, stage, train_loss, self._highest))


def _check_finite(total: float, stage: AnyDescent) -> None:
    if not np.isfinite(total):
        raise OracleError(
            f"the train loss is {total}: the descent has left what the model can read; lower the rate "
            f"{stage.rate:g} of the stage with --set"
        )
