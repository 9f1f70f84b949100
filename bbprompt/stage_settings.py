"""What a method's `router`, `prompt`, `refine` and `projection` sections may say: its stages and where they search."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bbprompt.oracle import ReadoutKind
from bbprompt.prompts import Injection, Pooling
from bbprompt.settings import Count, Positive, Settings

__all__ = ["ProjectionConfig", "PromptStageConfig", "RefineStageConfig", "RouterStageConfig"]

_Step = Annotated[float, Field(ge=1e-20, le=1e20)]


class RouterStageConfig(Settings):
    """Stage I: which mixture of the pre-trained modules fits the task (MP2, section 3.4).

    Attributes:
        optimizer: "bo" is a Gaussian process with UCB; "enumerate" tries every binary router of a shallow
            prompt; "listing" scores the upstream tasks' own mixtures and searches no further.
        space: "binary" searches {0, 1}^(L*K) as in the paper, "continuous" the box [-5, 5]^(L*K) as in the
            released code.
        calls: Train calls of the stage (paper: 200 shallow, 100 deep).
        share: At most this share of the budget, where a second stage follows; binds for small budgets only.
        kappa: UCB's weight of the standard deviation.
        random: Routers tried before the Gaussian process proposes.
        batch: Routers an ask; more than 16 are proposed together by "bo", fewer one after the other.
        ahead: Have "bo" propose each batch without waiting for the losses of the one before, while that is scored. Many
            workers need not wait for proposals then; a batch learns from the last but one.
        warm_start: Score the upstream tasks' own mixtures before the search (a stage of its own, two calls a task), and
            try their routers first in it.
        dev_every: Train calls between two looks at the dev set.
        bare: Try the backbone without any prompt along with the upstream mixtures: two calls.
    """

    optimizer: Literal["bo", "enumerate", "listing"] = "bo"
    space: Literal["binary", "continuous"] = "binary"
    calls: Count
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    kappa: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    random: Count = 20
    batch: Count = 4
    ahead: bool = False
    warm_start: bool = True
    dev_every: Count = 10
    bare: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.calls < self.batch:
            raise ValueError(f"calls: {self.calls} do not hold one batch of {self.batch}")
        if self.optimizer == "listing" and not self.warm_start:
            raise ValueError("warm_start: the optimizer 'listing' is nothing but the warm start")
        return self


class PromptStageConfig(Settings):
    """Stage II: an offset from the routed prompt, by CMA-ES in the intrinsic space (MP2, section 3.4; BBTv2).

    Attributes:
        layout: "layerwise" visits one layer after the other (divide and conquer); "joint" moves all prompted
            layers as one vector, which for a shallow prompt is the input layer.
        popsize: Candidates a generation.
        sigma_first: Initial step size at the input layer.
        sigma: Initial step size at the other layers.
        bound: Coordinates stay within plus and minus this; None for no bounds.
        keep: Layerwise, what becomes of a layer after its generation: "improving" takes the generation's best candidate
            if it beats the current prompt under the same other layers; "all-time" takes the best that this
            layer's search has ever seen, though the other layers have moved since (released code).
        dev_every: Train calls between two looks at the dev set.
    """

    layout: Literal["layerwise", "joint"]
    popsize: Annotated[int, Field(ge=2, strict=True)] = 20
    sigma_first: _Step
    sigma: _Step
    bound: Positive | None = None
    keep: Literal["improving", "all-time"] = "improving"
    dev_every: Count = 100
    patience: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        sigma = self.sigma_first if self.layout == "joint" else max(self.sigma_first, self.sigma)
        if self.bound is not None and sigma > 2 * self.bound:
            raise ValueError(f"sigma: {sigma:g} is wider than the box of bound {self.bound:g}")
        return self


class RefineStageConfig(Settings):
    """A last stage that refines the prompt layer by layer without a distribution (BBT-RGB's second stage).

    Attributes:
        optimizer: "cobyla", linear models in a shrinking trust region.
        step: First radius of the region around the prompt so far (BBT-RGB: 1, that of scipy).
        calls_per_layer: Train calls for each layer, from the input up; None shares what is left evenly. The first
            d + 1 of them are one step along each coordinate.
        share: Share of the budget that is kept for it, of what is left after stage I.
        dev_every: Train calls between two looks at the dev set.
        patience: As in `PromptStageConfig`.
    """

    optimizer: Literal["cobyla"] = "cobyla"
    step: Positive
    calls_per_layer: Count | None = None
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    dev_every: Count = 100
    patience: Count | None = None


class ProjectionConfig(Settings):
    """A random subspace in place of a pre-trained one (BBT, BBTv2); see `bbprompt.random_projection`.

    Attributes:
        dim: d, intrinsic dimension (BBT: 500).
        prompt_length: P, placeholder positions (BBT: 50).
        injection: "add" adds the prompt to the embeddings of placeholder tokens; "prepend" puts P rows before the first
            token, behind the embedding layer, which are the prompt and nothing else (`cat` in BBT's released code; of
            the input layer alone).
        layers: "input" prompts the input layer alone (BBT), "all" every layer (BBTv2).
        distribution: "normal" draws entries from N(0, s^2) with s = alpha * std / (sqrt(d) * sigma), where std is
            that of the hidden states the prompt is added to; "uniform" from +-1 / sqrt(d).
        alpha: Size of the prompts relative to the hidden states.
        sigma: Step size that the matrix is scaled for.
        scale: Root mean square of a prompt's entries where those of u are standard normal, instead of a scale from
            the model's states.
        readout: How options are scored.
        head: Prompt artifact whose answer head is used; a span readout needs one.
        start: Prompt artifact whose untuned prompt p0 is searched around, p = z A + p0 (BBT with a pre-trained prompt);
            length, placeholders and, where `head` names none, the answer head are its own. Not with "prepend".
        placeholder: Token id at the first prompt position; None for 1000, as in BBT. The others follow it.
        repeat: Put the same token at every prompt position.
        pooling: How a prototype readout makes embeddings.
    """

    dim: Count = 500
    prompt_length: Count = 50
    injection: Injection = "add"
    layers: Literal["input", "all"]
    distribution: Literal["normal", "uniform"] = "normal"
    alpha: Positive = 1.0
    sigma: Positive = 1.0
    scale: Positive | None = None
    readout: ReadoutKind = "span"
    head: str | None = None
    start: str | None = None
    placeholder: Annotated[int, Field(ge=0, strict=True)] | None = None
    repeat: bool = False
    pooling: Pooling = Pooling()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.injection == "prepend":
            if self.layers != "input":
                raise ValueError("injection: 'prepend' has rows at the input layer alone; set layers=input")
            if self.start is not None:
                raise ValueError(
                    "injection: 'prepend' takes no start, for the prompts there are were trained to be added to tokens"
                )
            if self.placeholder is not None or self.repeat:
                raise ValueError("injection: 'prepend' has no tokens at the prompt; leave out placeholder and repeat")
        return self
