"""What a method's `gradient` section may say: prompts tuned by gradient descent through a local model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bbprompt.oracle import ReadoutKind
from bbprompt.prompts import Pooling
from bbprompt.settings import Count, Positive, Settings

__all__ = [
    "LOOK",
    "AnyDescent",
    "DescentConfig",
    "GradientConfig",
    "ModelDescentConfig",
    "PromptDescentConfig",
    "RouterDescentConfig",
    "SoftPromptConfig",
]


#: Calls of a look: a prompt is scored on train and on dev.
LOOK = 2


class SoftPromptConfig(Settings):
    """A soft prompt from scratch: where it is added, and how options are read.

    Attributes:
        prompt_length: P, placeholder positions; 0 where the model itself is tuned and no prompt.
        layers: "input" is one prompt at the input (prompt tuning), "all" one before every layer (P-tuning v2).
        scale: Standard deviation of its first entries. At 0 it begins at the embeddings of the placeholder tokens, for
            prompts are added to them: that is the initialisation by words of Lester et al. 2021.
        readout: How options are scored.
        head: Prompt artifact whose answer head is used; a span readout needs one, but for a model that is tuned itself:
            None is then a head from scratch.
        placeholder: Token id at the first prompt position; None for 1000. The others follow it.
        repeat: Put the same token at every prompt position.
        pooling: How a prototype readout makes embeddings.
    """

    prompt_length: Annotated[int, Field(ge=0, strict=True)] = 50
    layers: Literal["input", "all"]
    scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    readout: ReadoutKind = "span"
    head: str | None = None
    placeholder: Annotated[int, Field(ge=0, strict=True)] | None = None
    repeat: bool = False
    pooling: Pooling = Pooling()


class DescentConfig(Settings):
    """A stage of Adam with a constant rate, on the whole few-shot train batch at once.

    Attributes:
        epochs: Steps, each one train call: forward and backward, two to three times as long as a forward alone.
        rate: Learning rate.
        dev_every: Epochs between two looks at the prompt: two calls, on train and on dev.
        patience: Looks without gain after which the stage ends; None for never.
    """

    epochs: Count
    rate: Annotated[float, Field(gt=0, le=1e3)]
    dev_every: Count = 25
    patience: Count | None = None

    @property
    def calls(self) -> int:
        """Calls of the whole stage."""
        return self.epochs + LOOK * -(-self.epochs // self.dev_every)


class RouterDescentConfig(DescentConfig):
    """Stage I: the router of each layer (MP2, section 3.4).

    Attributes:
        noise: Sample relaxed Bernoulli gates in training (MP2, eqs. 2-5); false is the mean field sigmoid(w / tau) of
            the released deep run. A look always closes or opens gates as the method's `gates` say.
        temperature: tau.
    """

    noise: Annotated[bool, Field(strict=True)] = True
    temperature: Positive = 1.0


class PromptDescentConfig(DescentConfig):
    """Stage II, or the only one: the prompts themselves.

    Attributes:
        head: Tune the weight of the answer head too, at the same rate (released code).
    """

    head: Annotated[bool, Field(strict=True)] = False


class ModelDescentConfig(DescentConfig):
    """The only stage: all weights of an encoder and its answer head, which is model tuning."""


#: A stage, whatever it moves.
AnyDescent = RouterDescentConfig | PromptDescentConfig | ModelDescentConfig


class GradientConfig(Settings):
    """Gradient descent in place of a search; see `bbprompt.gradient`.

    Attributes:
        soft: The soft prompt that is tuned from scratch; None where the method's `prompts` are gone on with.
        start: Kind that these prompts must be of; None for any.
        form: Pattern of PPT that texts are written in where words in a gap are read: "plain" or "hybrid", which adds
            a hard prompt, by the type of the task; "unified", all as multiple choices. Prompts of the kind `ppt` must
            have been pre-trained in its format. None for the task's own text.
        router: Stage I; None leaves it out.
        prompt: Stage II; None leaves it out.
        model: In their place the weights of the model itself; the prompt of `soft` stays as it is.
    """

    soft: SoftPromptConfig | None = None
    start: Literal["spot", "ppt"] | None = None
    form: Literal["plain", "hybrid", "unified"] | None = None
    router: RouterDescentConfig | None = None
    prompt: PromptDescentConfig | None = None
    model: ModelDescentConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.router is None and self.prompt is None and self.model is None:
            raise ValueError("prompt: give 'router', 'prompt' or both, or 'model'; else nothing is tuned")
        if self.soft is not None and (self.router is not None or self.start is not None):
            raise ValueError("soft: a prompt from scratch has no modules to route and no kind to start from")
        if self.model is not None:
            self._check_model()
        elif self.soft is not None and not self.soft.prompt_length:
            raise ValueError("soft.prompt_length: a prompt of no positions cannot be tuned")
        elif self.soft is not None and self.soft.readout == "span" and self.soft.head is None:
            raise ValueError("soft.head: the span readout needs a trained answer head; name a prompt artifact")
        return self

    def _check_model(self) -> None:
        if self.soft is None or self.prompt is not None:
            raise ValueError("model: is tuned alone, from no prompt; give 'soft', and leave out 'prompt'")
        if self.soft.readout == "verbalizer":
            raise ValueError("soft.readout: a model is tuned under 'span' or 'prototype', not under its own words")
        if self.form is not None:
            raise ValueError("form: is of words in a gap, which no model tuned itself is read by; leave it out")

    @property
    def stages(self) -> dict[str, AnyDescent]:
        """Name and settings of the stages, in order."""
        known: dict[str, AnyDescent | None] = {"router": self.router, "prompt": self.prompt, "model": self.model}
        return {name: stage for name, stage in known.items() if stage is not None}

    @property
    def calls(self) -> int:
        """Calls of a whole run."""
        return LOOK + sum(stage.calls for stage in self.stages.values())

    @property
    def least_budget(self) -> int:
        """Fewest calls: looks at the untuned prompt and, after an epoch, at the tuned one, for each stage."""
        return LOOK + len(self.stages) * (1 + LOOK)
