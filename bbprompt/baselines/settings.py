"""What a method's `baseline` section may say: how labels are told apart without prompt vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bbprompt.settings import Count, Settings

__all__ = ["AnyBaseline", "BaselineConfig", "BaselineRule", "BoostingConfig", "InContextConfig", "LabelWordsConfig"]

#: What a user would pick instead of tuning; see `bbprompt.baselines.rules`.
BaselineRule = Literal["majority", "zero-shot", "nearest-mean", "logistic", "threshold"]


class BaselineConfig(Settings):
    """No prompt at all: what the model's pooled states give, see `bbprompt.baselines.rules`.

    Attributes:
        rule: How labels are told apart.
    """

    rule: BaselineRule

    @property
    def least_budget(self) -> int:
        """Fewest calls on any task; see `bbprompt.baselines.rules.candidates`."""
        return 0 if self.rule == "majority" else 4


class LabelWordsConfig(Settings):
    """No prompt but the task's manual one: label words by the language model's head.

    Attributes:
        rule: "label-words".
    """

    rule: Literal["label-words"]

    @property
    def least_budget(self) -> int:
        """One candidate, on train and on dev."""
        return 2


class InContextConfig(Settings):
    """Demonstrations in front of the text, see `bbprompt.baselines.words`.

    Attributes:
        rule: "in-context".
        orders: Orders of the demonstrations that are tried, each a candidate.
    """

    rule: Literal["in-context"]
    orders: Count = 4

    @property
    def least_budget(self) -> int:
        """No demonstrations, and one order."""
        return 4


class BoostingConfig(Settings):
    """An ensemble of prompts with learned words for the labels (PromptBoosting), see `bbprompt.baselines.boosting`.

    Attributes:
        rule: "boosting".
        rounds: Most weak learners.
        words: Words that each label may choose among in a round.
        combinations: Most ways to choose them that are tried in a round; drawn where there are more.
        patterns: For single texts and pairs, by language, the prompts beside the task's own `cloze`: `{gap}` for the
            word, `{text}` for all that an example says, or the fields of the task by name.
    """

    rule: Literal["boosting"]
    rounds: Count = 200
    words: Count = 5
    combinations: Count = 20000
    patterns: dict[Literal["single", "pair"], dict[str, list[str]]]

    @property
    def least_budget(self) -> int:
        """The label words, and one prompt of the ensemble."""
        return 4


#: A method that searches no prompt vectors.
AnyBaseline = Annotated[
    BaselineConfig | LabelWordsConfig | InContextConfig | BoostingConfig, Field(discriminator="rule")
]
