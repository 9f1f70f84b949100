"""Settings: what a method is and what a run is, read from YAML and flags, checked, frozen.

A method YAML (`configs/methods/*.yaml`) names its stages and constants. A run (`TuneConfig`) is a task, a
method, a budget, a seed and where the model is. Flags win over `--config FILE`, `--set dotted.key=value` over
the method's YAML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from bbprompt.baselines.settings import AnyBaseline, BaselineConfig
from bbprompt.descent_settings import GradientConfig, SoftPromptConfig
from bbprompt.errors import UsageError
from bbprompt.router import CODE, PAPER, GateRule
from bbprompt.settings import BatchTokens, Count, Name, Settings
from bbprompt.stage_settings import ProjectionConfig, PromptStageConfig, RefineStageConfig, RouterStageConfig
from bbprompt.yamlfile import closest, read_yaml, validate

__all__ = [
    "NAMED_PROMPTS",
    "NO_PROMPTS",
    "MethodConfig",
    "TuneConfig",
    "absolute",
    "load_method",
    "located",
    "method_names",
    "method_with",
    "parse_set",
]

#: In place of a prompt artifact: there is none, or none that the method could know of.
NO_PROMPTS = "none"
NAMED_PROMPTS = "named"

_PATHS = ("projection.head", "projection.start", "gradient.soft.head")  # settings of a method that may be directories

_METHODS = Path(__file__).parent / "configs" / "methods"

_Step = Annotated[float, Field(ge=1e-20, le=1e20)]


class MethodConfig(Settings):
    """A method: a search over prompts with its stages and how it reads and chooses, or a baseline without prompts.

    Attributes:
        name: What `--method` takes.
        summary: One line.
        source: Where it comes from.
        prompts: Default prompt artifact; "named" where it has to be given; "none" where none is used.
        gates: "binary" or "sigmoid", see `bbprompt.router`.
        mixing: "mean" or "normalized", see `bbprompt.router`.
        support: Positions that the loss is normalised over.
        legacy_decision: Decide by the product of raw logits (released code).
        synonyms: A label scores by the mean over all words that its task gives it, in place of the first. For a readout
            by words ("verbalizer"); see `bbprompt.synonyms`.
        loss: What the search minimises: "ce" is cross-entropy, "hinge" the margin of 2 over the options' scores (BBT).
        baseline: The method is no search but this.
        projection: A random subspace; `prompts` must be "none".
        router: Stage I; None leaves it out.
        prompt: Stage II; None leaves it out.
        gradient: No search but gradient descent, through a local model.
        refine: A stage after it; None leaves it out.
        calibrate: Fit offsets of the labels to the chosen prompt on train and dev at the end, two calls; nothing where
            texts have options of their own.
        select: Which looked-at prompt is returned. "both-losses": among the untuned mixtures the lowest train and dev
            loss together; a prompt that was searched for, whose train loss is biased, replaces it only if its dev
            loss is lower too, by more than `margin`. "dev-loss": the lowest dev loss; "pooled-loss": the lowest train
            and dev loss together; "dev-metric": the highest dev metric, as released. The earliest of equals. Test is
            never looked at.
        tempered: Take these losses at the temperature, one of `TEMPERATURES` for train and dev together, at which
            their sum is lowest: how sure a prompt is of itself then counts for nothing. The search goes on minimising
            the plain loss.
        margin: By how many standard errors of the paired difference over the dev texts a searched prompt must be ahead
            under "both-losses": a search looks at dev many times, and each look is a chance to be ahead by luck.
    """

    name: Name
    summary: str
    source: str
    prompts: str = NO_PROMPTS
    gates: Literal["binary", "sigmoid"] = "binary"
    mixing: Literal["mean", "normalized"] = "mean"
    support: Literal["candidates", "sequence"] = "candidates"
    legacy_decision: bool = False
    synonyms: Annotated[bool, Field(strict=True)] = False
    loss: Literal["ce", "hinge"] = "ce"
    baseline: AnyBaseline | None = None
    projection: ProjectionConfig | None = None
    router: RouterStageConfig | None = None
    prompt: PromptStageConfig | None = None
    refine: RefineStageConfig | None = None
    gradient: GradientConfig | None = None
    calibrate: Annotated[bool, Field(strict=True)] = False
    select: Literal["both-losses", "dev-loss", "pooled-loss", "dev-metric"] = "both-losses"
    tempered: Annotated[bool, Field(strict=True)] = False
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        keys = ("projection", "router", "prompt", "refine", "gradient")
        stages = [name for name in keys if getattr(self, name) is not None]
        if self.baseline is not None and stages:
            raise ValueError(f"{stages[0]}: a baseline searches nothing; leave out the key or 'baseline'")
        if self.gradient is not None and (len(stages) > 1 or self.loss != "ce" or self.calibrate):
            raise ValueError("gradient: goes with no stage of a search, with loss 'ce' and without 'calibrate'")
        if (self.prompts == NO_PROMPTS) != (self.baseline is not None or self.own_prompt is not None):
            raise ValueError("prompts: 'none' goes with a baseline, a projection or a soft prompt, and nothing else")
        if self.projection is not None and self.router is not None:
            raise ValueError("router: a random projection has no modules to route")
        if self.calibrate and (self.baseline is not None or self.legacy_decision or self.support == "sequence"):
            raise ValueError(
                "calibrate: offsets belong to the sum of log-probabilities over candidates; set it to false for a "
                "baseline, with legacy_decision, or with support 'sequence'"
            )
        if self.synonyms and (self.baseline is not None or self.gradient is not None):
            raise ValueError(
                "synonyms: goes with a search over prompts, not with a baseline or gradients; set it to false"
            )
        if self.synonyms and self.projection is not None and self.projection.readout != "verbalizer":
            raise ValueError(
                f"synonyms: the readout '{self.projection.readout}' reads no label words; set it to false, or "
                "projection.readout to verbalizer"
            )
        if self.tempered and (self.baseline is not None or self.gradient is not None or self.legacy_decision):
            raise ValueError("tempered: goes with a search and the sum of log-probabilities; set it to false")
        if (
            self.tempered
            and self.prompt is not None
            and (self.prompt.layout, self.prompt.keep) == ("layerwise", "all-time")
        ):
            raise ValueError(
                "tempered: under prompt.keep 'all-time' a prompt has no train scores of its own; set it to false"
            )
        return self

    @property
    def rule(self) -> GateRule:
        """The gate rule; `PAPER` and `CODE` are the two published ones."""
        rule = GateRule(self.gates, self.mixing)
        return next((known for known in (PAPER, CODE) if known == rule), rule)

    @property
    def own_prompt(self) -> ProjectionConfig | SoftPromptConfig | None:
        """The prompt that a run makes and keeps itself, where it has no artifact."""
        return self.projection or (self.gradient.soft if self.gradient is not None else None)

    @property
    def reads_words(self) -> bool:
        """Whether words for labels are read by a language model that no prompt artifact names."""
        if self.baseline is not None:
            return not isinstance(self.baseline, BaselineConfig)
        if self.projection is not None and (self.projection.start or self.projection.head) is not None:
            return False
        return self.own_prompt is not None and self.own_prompt.readout == "verbalizer"

    @property
    def tunes_model(self) -> bool:
        """Whether the weights of the model are tuned, in place of a prompt."""
        return self.gradient is not None and self.gradient.model is not None

    @property
    def calibration_calls(self) -> int:
        """Calls that are kept for the calibration."""
        return 2 if self.calibrate else 0

    @property
    def least_budget(self) -> int:
        """Fewest calls of a run: the untuned prompt on train and dev, then one ask and one look."""
        if other := self.baseline or self.gradient:
            return other.least_budget
        if self.router is None and self.prompt is None and self.refine is None:
            return 2 + self.calibration_calls
        first = self.router.batch if self.router else 1
        second = self.prompt.popsize if self.prompt else 1
        return 2 + max(first, second) + 1 + self.calibration_calls


class TuneConfig(Settings):
    """A run: what `bbprompt tune` takes.

    Attributes:
        task: Name of a bundled task or path of a task YAML.
        data: "auto", "hub", "sample" or a path.
        method: Name of a bundled method or path of a method YAML.
        backbone: Hub id or directory of the frozen model; None for the one the prompts were trained for.
        prompts: Artifact directory, bundled name, hub id, or "none" for the `projection` of the method; None for the
            method's.
        budget: Most train and dev calls together.
        seed: Of the few-shot split and the search.
        shots: Examples per label; None for the papers' rule.
        backend: "local", or the URL of a server; see `bbprompt.connect.open_oracle`.
        on_doubt: What becomes of calls that were sent before a crash and whose answer is unknown. "resend" makes them
            again as the same calls; a model of ours, here or on a server, loses nothing by that. "charge" counts them
            as spent, for a server that charges for every request, and ends the run where an answer is lost. None:
            "charge" for vLLM alone, see `resends`.
        device: "auto" takes CUDA where there is one.
        dtype: Precision; "auto" is "mixed" on CPUs with AVX-512 BF16 or AMX and GPUs from Ampere on, else float32.
        batch_tokens: Tokens that run through the model at once; None for the device's default.
        max_tokens: Longest sequence; None for the backbone's limit.
        threads: CPU threads; None for all cores, or 1 for each worker on Ray.
        ray: "local", "auto" or HOST:PORT of a Ray cluster that shares the work; None for this process alone.
        workers: Models on it, None for as many as it holds; or requests to a server at once, None for one. Decides
            nothing but time.
        test_limit: Score at most so many test examples (the first ones in a seeded order); None for all.
        allow_overlap: Go on where few-shot inputs stand in the test split too, which then says too much of the prompt.
        baselines: After a search, show what the cheap methods without prompts give on the same test examples.
        set: Changes to the method, dotted key to value.
    """

    task: str
    data: str = "auto"
    method: str = "mp2-deep"
    backbone: str | None = None
    prompts: str | None = None
    budget: Annotated[int, Field(strict=True)] = 8000
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 42
    shots: Count | None = None
    backend: str = "local"
    on_doubt: Literal["resend", "charge"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "mixed", "bfloat16"] = "auto"
    batch_tokens: BatchTokens = None
    max_tokens: Count | None = None
    threads: Count | None = None
    ray: str | None = None
    workers: Count | None = None
    test_limit: Count | None = None
    allow_overlap: Annotated[bool, Field(strict=True)] = False
    baselines: Annotated[bool, Field(strict=True)] = True
    set: Mapping[str, Any] = Field(default_factory=dict)

    @field_validator("task", "data", "method", "backbone", "prompts", "backend", "ray")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        # As from a shell variable that is not set; a path of it would be the current directory.
        if value is not None and not value.strip():
            raise ValueError("the value is empty; leave it out for the default")
        return value

    @property
    def resends(self) -> bool:
        """Whether a call whose answer is not known is made again.

        By default where that charges nothing twice: a local model, or one of ours on a server, `bbprompt serve` or
        KServe, which knows repeated calls. vLLM may charge for each, and the budget is a promise.
        """
        if self.on_doubt is None:
            return not self.backend.startswith("vllm")
        return self.on_doubt == "resend"

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON; where it is computed does not."""
        return self.model_dump(mode="json", exclude={"ray", "workers"})


def located(config: TuneConfig) -> TuneConfig:
    """The settings with every path absolute, so that a run can be resumed and used from anywhere."""
    return config.model_copy(update=absolute(dict(config)))


def absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `tune`, any of them, with every path that leads somewhere from here absolute."""
    found = dict(settings)
    for key, value in settings.items():
        if key == "set" and isinstance(value, Mapping):
            found[key] = _absolute(value)
        elif isinstance(value, str) and value.strip() and _may_be_path(key, value) and Path(value).exists():
            found[key] = str(Path(value).absolute())  # a link keeps its name, by which a task or method is called
    return found


def _may_be_path(key: str, value: str) -> bool:
    if key in ("task", "method"):
        return value.endswith((".yaml", ".yml"))
    return key in ("backbone", "prompts") or (key == "data" and value not in ("auto", "hub", "sample"))


def _absolute(changes: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Changes to a method with absolute paths, whether they name keys by dots or say whole blocks."""
    found = dict(changes)
    for key, value in changes.items():
        if isinstance(value, Mapping):
            found[key] = _absolute(value, f"{before}{key}.")
        elif before + key in _PATHS and isinstance(value, str) and Path(value).is_dir():
            found[key] = str(Path(value).absolute())
    return found


def method_names() -> list[str]:
    """Names of the bundled methods."""
    return sorted(file.stem for file in _METHODS.glob("*.yaml"))


def load_method(name_or_path: str, asked: str = "--method") -> MethodConfig:
    """Read a bundled method or a method YAML.

    Args:
        name_or_path: A name as `method_names` lists it, or a path that ends in `.yaml` or `.yml`.
        asked: What a message begins with: the flag or argument that named it.

    Raises:
        UsageError: No such method, or a wrong key or value.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = _METHODS / f"{name_or_path}.yaml"
        if name_or_path not in method_names():
            hint = closest(name_or_path, method_names()) or "; `bbprompt methods` lists them"
            raise UsageError(f"{asked}: there is no method {name_or_path!r}{hint}")
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
            hint = closest(dotted, _dotted(method.model_dump())) or f"; `bbprompt methods {method.name}` shows them"
            raise UsageError(f"--set {dotted}: the method {method.name} has no such setting{hint}")
        place[last] = value
    return validate(MethodConfig, data, f"--set on method {method.name}")


def _dotted(settings: Mapping[str, Any], before: str = "") -> list[str]:
    """The keys of nested settings as `--set` takes them."""
    keys = []
    for name, value in settings.items():
        keys.append(before + name)
        if isinstance(value, Mapping):
            keys += _dotted(value, f"{before}{name}.")
    return keys


def parse_set(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` flags; values are YAML, so `prompt={popsize: 10}` says a whole block.

    Raises:
        UsageError: A pair without `=`, or a value that is no YAML.
    """
    changes = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        shown = repr(pair)[1:-1][:80]
        if not equals or not key:
            raise UsageError(f"--set {shown}: expected dotted.key=value")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"--set {shown}: behind the equals sign stands no YAML value") from error
        changes[key] = value
    return changes
