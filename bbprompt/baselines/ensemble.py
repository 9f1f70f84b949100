"""PromptBoosting as an approach: every prompt of the pool is a candidate, read once on train and once on dev.

Everything that `bbprompt.baselines.boosting` learns is learned from these few readings. A test text is read under the
prompts that the ensemble kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbprompt.baselines.asked import Asked
from bbprompt.baselines.boosting import Learner, boost, votes
from bbprompt.baselines.calls import Calls
from bbprompt.baselines.features import Matrix
from bbprompt.baselines.heads import accuracy_of, cross_entropy, sharpness
from bbprompt.baselines.labeller import Solved
from bbprompt.baselines.settings import BoostingConfig
from bbprompt.baselines.words import manual_prompt
from bbprompt.errors import UsageError
from bbprompt.tasks.example import Example, Form
from bbprompt.tasks.fewshot import FewShot
from bbprompt.tasks.task import Task, parse_template
from bbprompt.texts.forms import cloze_form

__all__ = ["BoostingApproach", "EnsembleLabeller", "pool"]


def pool(settings: BoostingConfig, task: Task) -> tuple[str | None, ...]:
    """The prompts for a task: its own (None), then those of the method for its type and language.

    Raises:
        UsageError: The task has no labels of its own, or a pattern does not fit it.
    """
    if not task.labelled:
        raise UsageError(
            f"--method: boosting does not fit the task {task.name}: it learns labels, and this task has none of its own"
        )
    patterns = settings.patterns.get("pair" if task.type == "pair" else "single", {}).get(task.language[:2], [])
    for pattern in patterns:
        problem = _problem(pattern, task)
        if problem:
            raise UsageError(f"baseline.patterns: {pattern!r} does not fit the task {task.name}: {problem}")
    return (None, *patterns)


def _problem(pattern: str, task: Task) -> str | None:
    try:
        names = [name for _, name in parse_template(pattern) if name is not None]
    except ValueError as error:
        return str(error)
    if names.count("gap") != 1:
        return "it needs {gap} once"
    fields = set(names) - {"gap"}
    if not fields or not fields <= {"text", *task.field_names}:
        return f"it reads {{text}} or {', '.join(f'{{{name}}}' for name in task.field_names)}, at least one of them"
    return None


@dataclass(frozen=True, slots=True)
class _Reading:
    """A prompt as a candidate: token probabilities `(N, V)` on train and dev; error rates of its first weak learner."""

    on_train: Matrix
    on_dev: Matrix
    train_loss: float
    dev_loss: float

    @property
    def dev(self) -> float:
        """Accuracy of the first weak learner on dev."""
        return 1.0 - self.dev_loss


class EnsembleLabeller:
    """Weak learners that vote.

    Args:
        task: The task.
        prompts: The pool that the learners' prompts are numbers in.
        asked: The language model.
        learners: At least one.
        scale: Turns their shares of the vote into logits.
    """

    def __init__(
        self,
        task: Task,
        prompts: Sequence[str | None],
        asked: Asked,
        learners: Sequence[Learner],
        scale: float,
    ) -> None:
        self._task, self._prompts, self._asked = task, prompts, asked
        self._learners, self._scale = tuple(learners), scale

    @property
    def cut(self) -> int:
        """Tokens that did not fit the model so far."""
        return self._asked.cut

    def scores(self, examples: Sequence[Example]) -> Matrix:
        """Scaled votes; see `bbprompt.baselines.labeller.Labeller`."""
        given: dict[int, NDArray[np.int64]] = {}
        for prompt in sorted({learner.prompt for learner in self._learners}):
            mine = [i for i, learner in enumerate(self._learners) if learner.prompt == prompt]
            words = np.array([self._learners[i].words for i in mine])
            tokens, places = np.unique(words, return_inverse=True)
            found = self._asked.vocabulary(_forms(self._task, self._prompts[prompt], examples), tokens.tolist())
            for i, row in zip(mine, places.reshape(words.shape), strict=True):
                given[i] = found[:, row].argmax(axis=1)
        choices = [given[i] for i in range(len(self._learners))]
        logits: Matrix = votes(self._learners, choices, len(self._task.options))[-1] * self._scale
        return logits

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The learners."""
        return {
            "prompt": np.array([learner.prompt for learner in self._learners], dtype=np.int64),
            "words": np.array([learner.words for learner in self._learners], dtype=np.int64),
            "alpha": np.array([learner.alpha for learner in self._learners], dtype=np.float64),
            "scale": np.array(self._scale, dtype=np.float64),
        }

    @classmethod
    def load(
        cls, task: Task, prompts: Sequence[str | None], tensors: Mapping[str, NDArray[Any]], asked: Asked
    ) -> EnsembleLabeller:
        """Make it again.

        Raises:
            KeyError, ValueError, TypeError: These are no tensors of such a labeller.
        """
        numbers, words, alphas, scale = (tensors[name] for name in ("prompt", "words", "alpha", "scale"))
        sizes = (len(numbers), len(task.options))
        whole = words.shape == sizes and alphas.shape == numbers.shape == sizes[:1] and sizes[0] > 0
        if not whole or not np.isfinite(alphas).all() or not np.isfinite(scale).all() or (words < 0).any():
            raise ValueError("the learners are no numbers of the right sizes")
        if (numbers < 0).any() or (numbers >= len(prompts)).any():
            raise ValueError("a learner's prompt is not in the pool")
        learners = [
            Learner(int(number), tuple(map(int, row)), float(alpha))
            for number, row, alpha in zip(numbers, words, alphas, strict=True)
        ]
        return cls(task, prompts, asked, learners, float(scale))


class BoostingApproach:
    """Learns an ensemble over a pool of prompts.

    Args:
        settings: Its constants.
        task: The task.
        asked: The language model.
        seed: Of the words that are drawn where there are too many ways to choose them.

    Attributes:
        meter: What asking costs.
    """

    def __init__(self, settings: BoostingConfig, task: Task, asked: Asked, seed: int) -> None:
        self._settings, self._task, self._seed = settings, task, seed
        self._asked = self.meter = asked
        self._prompts = pool(settings, task)

    def most(self, few: FewShot, test: int) -> int:
        """Few-shot and test texts under the label words and under every prompt of the pool."""
        return (1 + len(self._prompts)) * (len(few.train) + len(few.dev) + test)

    def solve(self, few: FewShot, calls: Calls) -> tuple[Solved, Solved]:
        """Read the pool, as far as the budget holds it, and boost.

        Raises:
            UsageError: No weak learner is better than chance.
        """
        before = manual_prompt(self._task, self._asked, few, calls)
        prompts = self._prompts[: calls.candidates_left]
        read = [calls.make(f"prompt:{prompt}", partial(self._read, prompt, few)) for prompt in prompts]
        right, known = ([example.label for example in examples] for examples in (few.train, few.dev))
        labels, settings = len(self._task.options), self._settings
        learners = boost(
            [reading.on_train for reading in read],
            right,
            labels,
            rounds=settings.rounds,
            words=settings.words,
            combinations=settings.combinations,
            seed=self._seed,
        )
        if not learners:
            raise UsageError(
                f"--method: under no prompt of the pool does a choice of words tell the labels of {self._task.name} "
                "apart better than chance; take another --backbone"
            )

        def shares(readings: Sequence[Matrix]) -> Matrix:
            return votes(learners, [each.choices(readings[each.prompt]) for each in learners], labels)

        on_train, on_dev = shares([each.on_train for each in read]), shares([each.on_dev for each in read])
        accuracies = [accuracy_of(scores, known) for scores in on_dev]
        last = max(range(len(learners)), key=lambda i: (accuracies[i], i))
        scale = sharpness(on_dev[last], known)
        kept = EnsembleLabeller(self._task, self._prompts, self._asked, learners[: last + 1], scale)
        used = len({learner.prompt for learner in learners[: last + 1]})
        return before, Solved(
            f"{last + 1} weak learners, {used} prompts",
            kept,
            cross_entropy(on_train[last] * scale, right),
            cross_entropy(on_dev[last] * scale, known),
            accuracies[last],
        )

    def _read(self, prompt: str | None, few: FewShot) -> _Reading:
        on_train, on_dev = (
            np.exp(self._asked.vocabulary(_forms(self._task, prompt, examples))) for examples in (few.train, few.dev)
        )
        right, known = (np.array([example.label for example in examples]) for examples in (few.train, few.dev))
        first = boost(
            [on_train],
            right.tolist(),
            len(self._task.options),
            rounds=1,
            words=self._settings.words,
            combinations=self._settings.combinations,
            seed=self._seed,
        )
        if not first:  # no better than chance: as good as that
            chance = 1.0 - 1.0 / len(self._task.options)
            return _Reading(on_train, on_dev, chance, chance)
        wrong = [first[0].choices(found) != gold for found, gold in ((on_train, right), (on_dev, known))]
        return _Reading(on_train, on_dev, float(wrong[0].mean()), float(wrong[1].mean()))


def _forms(task: Task, prompt: str | None, examples: Sequence[Example]) -> list[Form]:
    return [cloze_form(task, example, prompt) for example in examples]
