"""Label words by the language model's head: with the manual prompt alone, and with demonstrations before the text.

In-context learning (Brown et al. 2020, arXiv:2005.14165): the few-shot training examples, solved, stand in front of
every text. Their order matters much (Lu et al. 2022, arXiv:2104.08786), so a few are drawn; each has one example of
each label in turn, and as many whole ones as fit into half of the model's length. Dev accuracy chooses among these
orders and none, and the dev loss among equals. The train loss of an order is that of its demonstrations, each behind
the earlier ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbprompt.baselines.asked import Asked
from bbprompt.baselines.calls import Calls
from bbprompt.baselines.features import Matrix
from bbprompt.baselines.heads import accuracy_of, cross_entropy
from bbprompt.baselines.labeller import Solved
from bbprompt.errors import UsageError
from bbprompt.tasks.example import Example
from bbprompt.tasks.fewshot import FewShot
from bbprompt.tasks.task import Task
from bbprompt.texts.demonstrations import draw_order
from bbprompt.texts.forms import cloze_form

__all__ = ["WordApproach", "WordLabeller", "manual_prompt"]

_log = logging.getLogger("bbprompt")


class WordLabeller:
    """Label words in the gap of a text.

    Args:
        task: The task.
        asked: The language model.
        before: Token ids in front of every text.
    """

    def __init__(self, task: Task, asked: Asked, before: Sequence[int] = ()) -> None:
        self._task, self._asked, self._before = task, asked, tuple(before)

    @property
    def cut(self) -> int:
        """Tokens that did not fit the model so far."""
        return self._asked.cut

    def scores(self, examples: Sequence[Example]) -> Matrix:
        """Logits of the label words; see `bbprompt.baselines.labeller.Labeller`."""
        return self._asked.words([cloze_form(self._task, example) for example in examples], self._before)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The tokens in front."""
        return {"before": np.array(self._before, dtype=np.int64)}

    @classmethod
    def load(cls, task: Task, tensors: Mapping[str, NDArray[Any]], asked: Asked) -> WordLabeller:
        """Make it again.

        Raises:
            KeyError, ValueError: These are no tensors of such a labeller.
        """
        before = tensors["before"]
        if before.ndim != 1 or before.dtype != np.int64 or (before < 0).any():
            raise ValueError("the tokens in front are no row of token ids")
        return cls(task, asked, before.tolist())


def manual_prompt(task: Task, asked: Asked, few: FewShot, calls: Calls) -> Solved:
    """The label words with nothing tuned or learned: one candidate."""

    def judge() -> Solved:
        labeller = WordLabeller(task, asked)
        on_train = cross_entropy(labeller.scores(few.train), _gold(few.train))
        return Solved("no demonstrations", labeller, on_train, *_on_dev(labeller, few))

    return calls.make("label-words", judge)


class WordApproach:
    """The manual prompt, with `orders` orders of demonstrations to choose from.

    Args:
        task: The task.
        asked: The language model.
        orders: How many are tried, as far as the budget holds them; 0 for the manual prompt alone.
        seed: Of the orders.

    Attributes:
        meter: What asking costs.
    """

    def __init__(self, task: Task, asked: Asked, orders: int, seed: int) -> None:
        self._task, self._orders, self._seed = task, orders, seed
        self._asked = self.meter = asked
        self._told = False  # whether it was said that not all examples fit

    def most(self, few: FewShot, test: int) -> int:
        """Few-shot texts once an order, test texts under what is returned and without demonstrations."""
        return (1 + self._orders) * (len(few.train) + len(few.dev)) + test * (2 if self._orders else 1)

    def solve(self, few: FewShot, calls: Calls) -> tuple[Solved, Solved]:
        """Try the manual prompt and the orders; the best dev accuracy wins, of equal ones the lowest dev loss.

        Raises:
            UsageError: Not one demonstration fits the model.
        """
        before = manual_prompt(self._task, self._asked, few, calls)
        tried = [before]
        for number in range(min(self._orders, calls.candidates_left)):
            tried.append(self._order(number, few, calls))
        # Not by the loss first: a bare prompt is sure of itself and often wrong, so that its loss is the highest even
        # where it is right twice as often as with demonstrations.
        return before, min(tried, key=lambda each: (-each.dev, each.dev_loss))

    def _order(self, number: int, few: FewShot, calls: Calls) -> Solved:
        order = draw_order(few.train, self._seed, number)
        shown = [(cloze_form(self._task, few.train[i]), few.train[i].label) for i in order]
        demonstrations = self._asked.model.demonstrate(shown)
        count = len(demonstrations.gaps)
        if not count:
            raise UsageError(
                "in-context: not one demonstration fits into half of the "
                f"{self._asked.model.info.max_tokens} tokens that the model reads; raise --max-tokens or take a "
                "--backbone with a longer input"
            )
        self._tell_of_fewer(count, len(shown))

        def judge() -> Solved:
            labeller = WordLabeller(self._task, self._asked, demonstrations.ids)
            recalled = self._asked.recall(shown, demonstrations)
            on_train = cross_entropy(recalled, [right for _, right in shown[:count]])
            reads = f"{count} demonstrations, order {number + 1}"
            return Solved(reads, labeller, on_train, *_on_dev(labeller, few))

        return calls.make(f"in-context:{number}", judge)

    def _tell_of_fewer(self, count: int, examples: int) -> None:
        """Say so, once, when an order has no room for all few-shot examples."""
        if count == examples or self._told:
            return
        self._told = True
        _log.warning(
            "in-context: only %d of %d few-shot examples fit into half of the %d tokens that the model reads; raise "
            "--max-tokens, or, where that is all it can read, take a --backbone with a longer input",
            count,
            examples,
            self._asked.model.info.max_tokens,
        )


def _on_dev(labeller: WordLabeller, few: FewShot) -> tuple[float, float]:
    found, gold = labeller.scores(few.dev), _gold(few.dev)
    return cross_entropy(found, gold), accuracy_of(found, gold)


def _gold(examples: Sequence[Example]) -> list[int]:
    return [example.label for example in examples]
