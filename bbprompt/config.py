"""Settings: what a method is and what a run is, read from YAML and flags, checked, frozen.

A method YAML (`configs/methods/*.yaml`) names its stages and constants. A run (`TuneConfig`) is a task, a
method, a budget, a seed and where the model is. Flags win over `--config FILE`, `--set dotted.key=value` over
the method's YAML.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bbprompt.errors import UsageError
from bbprompt.router import CODE, PAPER, GateRule
from bbprompt.yamlfile import read_yaml, validate

__all__ = [
    "MethodConfig",
    "PromptStageConfig",
    "RouterStageConfig",
    "TuneConfig",
    "load_method",
    "method_names",
    "method_with",
    "parse_set",
]

_METHODS = Path(__file__).parent / "configs" / "methods"

_Count = Annotated[int, Field(ge=1, strict=True)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Step = Annotated[float, Field(ge=1e-20, le=1e20)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RouterStageConfig(_Settings):
    """Stage I: which mixture of the pre-trained modules fits the task (MP2, section 3.4).

    Attributes:
        optimizer: "bo" is a Gaussian process with UCB; "enumerate" tries every binary router of a shallow
            prompt.
        space: "binary" searches {0, 1}^(L*K) as in the paper, "continuous" the box [-5, 5]^(L*K) as in the
            released code.
        calls: Train calls of the stage (paper: 200 shallow, 100 deep).
        share: At most this share of the budget, where a second stage follows; binds for small budgets only.
        kappa: UCB's weight of the standard deviation.
        random: Routers tried before the Gaussian process proposes.
        batch: Routers an ask.
        warm_start: Score the upstream tasks' own mixtures before the search (a stage of its own, two calls a task), and
            try their routers first in it.
        dev_every: Train calls between two looks at the dev set.
    """

    optimizer: Literal["bo", "enumerate"] = "bo"
    space: Literal["binary", "continuous"] = "binary"
    calls: _Count
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    kappa: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    random: _Count = 20
    batch: _Count = 4
    warm_start: bool = True
    dev_every: _Count = 10

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.calls < self.batch:
            raise ValueError(f"calls: {self.calls} do not hold one batch of {self.batch}")
        return self


class PromptStageConfig(_Settings):
    """Stage II: an offset from the routed prompt, by CMA-ES in the intrinsic space (MP2, section 3.4; BBTv2).

    Attributes:
        layout: "layerwise" visits one layer after the other (divide and conquer); "joint" moves all prompted
            layers as one vector, which for a shallow prompt is the input layer.
        popsize: Candidates a generation.
        sigma_first: Initial step size at the input layer.
        sigma: Initial step size at the other layers.
        bound: Coordinates stay within plus and minus this; None for no bounds.
        keep: What becomes of a layer after its generation: "improving" takes the generation's best candidate
            if it beats the current prompt under the same other layers; "all-time" takes the best that this
            layer's search has ever seen, though the other layers have moved since (released code).
        dev_every: Train calls between two looks at the dev set.
    """

    layout: Literal["layerwise", "joint"]
    popsize: Annotated[int, Field(ge=2, strict=True)] = 20
    sigma_first: _Step
    sigma: _Step
    bound: _Positive | None = None
    keep: Literal["improving", "all-time"] = "improving"
    dev_every: _Count = 100

    @model_validator(mode="after")
    def _check(self) -> Self:
        sigma = self.sigma_first if self.layout == "joint" else max(self.sigma_first, self.sigma)
        if self.bound is not None and sigma > 2 * self.bound:
            raise ValueError(f"sigma: {sigma:g} is wider than the box of bound {self.bound:g}")
        return self


class MethodConfig(_Settings):
    """A method: its pre-trained prompts, its two stages and how it reads and chooses.

    Attributes:
        name: What `--method` takes.
        summary: One line.
        source: Where it comes from.
        prompts: Default prompt artifact.
        gates: "binary" or "sigmoid", see `bbprompt.router`.
        mixing: "mean" or "normalized", see `bbprompt.router`.
        support: Positions that the loss is normalised over.
        legacy_decision: Decide by the product of raw logits (released code).
        router: Stage I; None leaves it out.
        prompt: Stage II; None leaves it out.
        select: Which looked-at prompt is returned. "both-losses": among the untuned mixtures the lowest train and dev
            loss together; a prompt that was searched for, whose train loss is biased, replaces it only if its dev
            loss is lower too. "dev-loss": the lowest dev loss; "pooled-loss": the lowest train and dev loss together;
            "dev-metric": the highest dev metric, as released. The earliest of equals. Test is never looked at.
    """

    name: str
    summary: str
    source: str
    prompts: str
    gates: Literal["binary", "sigmoid"]
    mixing: Literal["mean", "normalized"]
    support: Literal["candidates", "sequence"] = "candidates"
    legacy_decision: bool = False
    router: RouterStageConfig | None = None
    prompt: PromptStageConfig | None = None
    select: Literal["both-losses", "dev-loss", "pooled-loss", "dev-metric"] = "both-losses"

    @property
    def rule(self) -> GateRule:
        """The gate rule; `PAPER` and `CODE` are the two published ones."""
        rule = GateRule(self.gates, self.mixing)
        return next((known for known in (PAPER, CODE) if known == rule), rule)

    @property
    def least_budget(self) -> int:
        """Fewest calls of a run: the untuned prompt on train and dev, then one ask and one look."""
        first = self.router.batch if self.router else 1
        second = self.prompt.popsize if self.prompt else 1
        return 2 + max(first, second) + 1


class TuneConfig(_Settings):
    """A run: what `bbprompt tune` takes.

    Attributes:
        task: Name of a bundled task or path of a task YAML.
        data: "auto", "hub", "sample" or a path.
        method: Name of a bundled method or path of a method YAML.
        backbone: Hub id or directory of the frozen model; None for the one the prompts were trained for.
        prompts: Artifact directory, bundled name or hub id; None for the method's.
        budget: Most train and dev calls together.
        seed: Of the few-shot split and the search.
        shots: Examples per label; None for the papers' rule.
        backend: "local" (URLs of remote oracles come later).
        device: "auto" takes CUDA where there is one.
        dtype: Precision; "auto" is float32 for now.
        batch_tokens: Tokens that run through the model at once; None for the device's default.
        max_tokens: Longest sequence; None for the backbone's limit.
        threads: CPU threads; None for all cores, or 1 for each worker on Ray.
        ray: "local", "auto" or HOST:PORT of a Ray cluster that shares the work; None for this process alone.
        workers: Actors on it; None for one for each GPU or as many as the CPUs hold.
        test_limit: Score at most so many test examples (the first ones in a seeded order); None for all.
        set: Changes to the method, dotted key to value.
    """

    task: str
    data: str = "auto"
    method: str = "mp2-deep"
    backbone: str | None = None
    prompts: str | None = None
    budget: Annotated[int, Field(strict=True)] = 8000
    seed: Annotated[int, Field(ge=0, strict=True)] = 42
    shots: _Count | None = None
    backend: str = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_tokens: _Count | None = None
    max_tokens: _Count | None = None
    threads: _Count | None = None
    ray: str | None = None
    workers: _Count | None = None
    test_limit: _Count | None = None
    set: Mapping[str, Any] = Field(default_factory=dict)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON; where it is computed does not."""
        return self.model_dump(mode="json", exclude={"ray", "workers"})


def method_names() -> list[str]:
    """Names of the bundled methods."""
    return sorted(file.stem for file in _METHODS.glob("*.yaml"))


def load_method(name_or_path: str) -> MethodConfig:
    """Read a bundled method or a method YAML.

    Raises:
        UsageError: No such method, or a wrong key or value.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = _METHODS / f"{name_or_path}.yaml"
        if name_or_path not in method_names():
            close = difflib.get_close_matches(name_or_path, method_names(), 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UsageError(
                f"--method: there is no method '{name_or_path}'{hint} (known: {', '.join(method_names())})"
            )
    return validate(MethodConfig, read_yaml(path), str(path))


def method_with(method: MethodConfig, changes: Mapping[str, Any]) -> MethodConfig:
    """Apply `--set dotted.key=value` changes.

    Raises:
        UsageError: A key that the method does not have, or a value that it does not take.
    """
    data = method.model_dump()
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        place: Any = data
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise UsageError(f"--set {dotted}: the method {method.name} has no such setting")
        place[last] = value
    return validate(MethodConfig, data, f"--set on method {method.name}")


def parse_set(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` flags; values are YAML scalars.

    Raises:
        UsageError: A pair without `=`, or a value that is no YAML scalar.
    """
    changes = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {pair}: expected dotted.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {pair}: '{text}' is not a plain value") from error
        if isinstance(value, (dict, list)):
            raise UsageError(f"--set {pair}: one number, word or true/false is expected")
        changes[key] = value
    return changes
