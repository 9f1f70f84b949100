"""What a method's `baseline` section may say: how labels are told apart without prompt vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["AnyBaseline", "BaselineConfig", "BaselineRule", "BoostingConfig", "InContextConfig", "LabelWordsConfig"]

#: What a user would pick instead of tuning; see `bbprompt.baselines.rules`.
BaselineRule = Literal["majority", "zero-shot", "nearest-mean", "logistic", "threshold"]

_Count = Annotated[int, Field(ge=1, strict=True)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaselineConfig(_Settings):
    """No prompt at all: what the model's pooled states give, see `bbprompt.baselines.rules`.

    Attributes:
        rule: How labels are told apart.
    """

    rule: BaselineRule

    @property
    def least_budget(self) -> int:
        """Fewest calls: up to three ways to read the texts, two calls each."""
        return 0 if self.rule == "majority" else 6


class LabelWordsConfig(_Settings):
    """No prompt but the task's manual one: label words by the language model's head.

    Attributes:
        rule: "label-words".
    """

    rule: Literal["label-words"]

    @property
    def least_budget(self) -> int:
        """One candidate, on train and on dev."""
        return 2


class InContextConfig(_Settings):
    """Demonstrations in front of the text, see `bbprompt.baselines.words`.

    Attributes:
        rule: "in-context".
        orders: Orders of the demonstrations that are tried, each a candidate.
    """

    rule: Literal["in-context"]
    orders: _Count = 4

    @property
    def least_budget(self) -> int:
        """No demonstrations, and one order."""
        return 4


class BoostingConfig(_Settings):
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
    rounds: _Count = 200
    words: _Count = 5
    combinations: _Count = 20000
    patterns: dict[Literal["single", "pair"], dict[str, list[str]]]

    @property
    def least_budget(self) -> int:
        """The label words, and one prompt of the ensemble."""
        return 4


#: A method that searches no prompt vectors.
AnyBaseline = Annotated[
    BaselineConfig | LabelWordsConfig | InContextConfig | BoostingConfig, Field(discriminator="rule")
]
