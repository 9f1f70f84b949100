"""PromptBoosting (Hou et al. 2023, arXiv:2212.09257): weak learners that pair a prompt with words for the labels.

Under each prompt the language model gives a text x a distribution over the vocabulary. A weak learner takes one word a
label and answers with the label whose word is the most probable. Under weights w of the training texts, the words of
label c are sought among the few with the highest

    sum_i w_i (+1 if y_i = c, else -1) p(word | x_i),

where a word goes to the label that it scores highest for; the combination with the smallest weighted error is taken.
AdaBoost for several labels (SAMME, Zhu et al. 2009) then weighs learner and texts: with the error e and C labels,

    alpha = log((1 - e) / e) + log(C - 1),    w_i <- w_i exp(alpha [wrong_i]), normalised.

As in the authors' code, the prompts take turns, learners no better than chance are left out, for two labels the words
are also tried the other way round, and how many learners are kept is decided on dev, the most of equally good numbers.
Ours is what an error of zero means, which happens with 32 texts: half a text is counted as wrong; and that boosting
ends once a whole turn of the prompts has left the weights as they were.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bbprompt.baselines.features import Matrix

__all__ = ["Learner", "boost", "choose_words", "votes"]

_Words = NDArray[np.int64]

_BLOCK = 1000
#: What sums of weights may be off by.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Learner:
    """A weak learner.

    Attributes:
        prompt: Number of its prompt.
        words: Token id for each label.
        alpha: Its weight.
    """

    prompt: int
    words: tuple[int, ...]
    alpha: float

    def choices(self, probabilities: Matrix) -> NDArray[np.int64]:
        """Labels `(N,)` by probabilities `(N, V)` under its prompt."""
        return np.asarray(probabilities[:, list(self.words)].argmax(axis=1))


def boost(
    probabilities: Sequence[Matrix],
    gold: Sequence[int],
    labels: int,
    *,
    rounds: int,
    words: int,
    combinations: int,
    seed: int,
) -> tuple[Learner, ...]:
    """Learn an ensemble; empty where no learner is better than chance.

    Args:
        probabilities: For each prompt `(N, V)`: of every token in the gap of every training text.
        gold: The right label of each text.
        labels: C.
        rounds: Most learners that are tried.
        words: Words that each label may choose among.
        combinations: Most ways to choose them that are tried in a round.
        seed: Of the ways that are drawn where there are more.
    """
    right = np.asarray(gold)
    weights = np.full(len(right), 1.0 / len(right))
    least, chance = 0.5 / len(right), 1.0 - 1.0 / labels - _ROUNDING
    learners: list[Learner] = []
    unmoved = 0
    for number in range(rounds):
        prompt = number % len(probabilities)
        rng = np.random.default_rng([seed, number])
        chosen = choose_words(probabilities[prompt], right, weights, labels, words, combinations, rng)
        wrong = Learner(prompt, chosen, 0.0).choices(probabilities[prompt]) != right
        error = float(weights[wrong].sum())
        unmoved = 0 if 0.0 < error < chance else unmoved + 1
        if error < chance:
            bounded = max(error, least)
            alpha = math.log((1.0 - bounded) / bounded) + math.log(labels - 1)
            learners.append(Learner(prompt, chosen, alpha))
            weights = weights * np.exp(alpha * wrong)
            weights /= weights.sum()
        if unmoved == len(probabilities):
            break
    return tuple(learners)


def choose_words(
    probabilities: Matrix,
    gold: NDArray[np.int64],
    weights: Matrix,
    labels: int,
    words: int,
    combinations: int,
    rng: np.random.Generator,
) -> tuple[int, ...]:
    """One word a label with the smallest weighted error; of equally good ones that of the highest scores.

    Args:
        probabilities: `(N, V)`.
        gold: `(N,)` right labels.
        weights: `(N,)`, summing to 1.
        labels: C.
        words: Words that each label may choose among.
        combinations: Most ways that are tried.
        rng: Draws them where there are more.
    """
    signs = np.where(gold == np.arange(labels)[:, None], 1.0, -1.0)
    ranked = (signs * weights) @ probabilities
    owned = ranked.argmax(axis=0) == np.arange(labels)[:, None]
    # Its own words first; a label that owns too few takes the best of others. Scores lie within -1 and 1.
    some = np.stack([_highest(row, words) for row in np.where(owned, ranked, ranked - 4.0)])
    best, least = some[:, 0], math.inf
    for block in _ways(some, combinations, rng):
        found = probabilities[:, block].argmax(axis=2)
        errors = weights @ (found != gold[:, None])
        first = int(errors.argmin())
        if errors[first] < least:
            best, least = block[first], float(errors[first])
    return tuple(int(word) for word in best)


def _highest(row: Matrix, count: int) -> _Words:
    """Places of the highest numbers of a row, the highest first; of equals the one that stands first."""
    few = np.argpartition(-row, min(count, len(row)) - 1)[:count]
    return few[np.lexsort((few, -row[few]))]


def _ways(some: _Words, combinations: int, rng: np.random.Generator) -> list[_Words]:
    """Ways `(M, C)` to choose one of `some` `(C, words)` for each label, in blocks; the best ranked ones first."""
    labels, words = some.shape
    if words**labels <= combinations:
        picked = np.array(list(itertools.product(range(words), repeat=labels)))
    else:
        picked = rng.integers(0, words, (combinations, labels))
        picked[0] = 0
    ways = some[np.arange(labels), picked]
    if labels == 2:
        ways = np.concatenate([ways, ways[:, ::-1]])
    return [ways[begin : begin + _BLOCK] for begin in range(0, len(ways), _BLOCK)]


def votes(learners: Sequence[Learner], choices: Sequence[NDArray[np.int64]], labels: int) -> Matrix:
    """Share of the learners' weight for each label after each learner: `(learners, N, C)`.

    Args:
        learners: In the order they were learned.
        choices: Labels `(N,)` by each of them.
        labels: C.
    """
    given = np.stack([chosen[:, None] == np.arange(labels) for chosen in choices])
    alphas = np.array([learner.alpha for learner in learners])
    total: Matrix = (alphas[:, None, None] * given).cumsum(axis=0) / alphas.cumsum()[:, None, None]
    return total
