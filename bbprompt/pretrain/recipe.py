"""A pre-training recipe: every setting that decides what comes out of it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bbprompt.errors import UsageError
from bbprompt.settings import Count

__all__ = ["Kind", "PptSettings", "PretrainConfig"]

#: What is trained: modular prompts (MP2), one prompt on labelled tasks (SPoT), one prompt on raw text (PPT).
Kind = Literal["mp2-deep", "mp2-shallow", "spot", "ppt"]

_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PptSettings(BaseModel):
    """Where self-supervised examples come from (PPT, section 3).

    Attributes:
        corpus: Text files (`.txt`, `.txt.gz`), a document a block of lines, blocks parted by blank lines.
        terms: Under which terms the corpus stands; goes into the model card.
        language: Of the corpus; decides where sentences end and which words options have.
        hybrid: With the hard prompts of PPT's hybrid variants, where words in a gap are read.
        formats: "choice" is next-sentence selection among `options` (the unified format), "pair" the 3-way
            next-sentence task, "single" sentiment by the pseudo labels of `annotator`.
        options: Fewest and most options of a choice; drawn evenly (6 and 6 give the plain format).
        annotator: Directory of a finished `tune` run that labels single texts; needed for "single".
        confidence: Pseudo labels of a lower probability are left out.
        longest: Length in tokens that the published caps of query and options were made for; they shrink in
            proportion where `max_tokens` is less.
        window: Documents that are held at a time, to draw other documents from.
        examples: Most examples of each format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: list[str] = Field(min_length=1)
    terms: str = ""
    language: Literal["zh", "en"] = "zh"
    hybrid: bool = False
    formats: list[Literal["choice", "pair", "single"]] = Field(default=["choice"], min_length=1)
    options: tuple[Annotated[int, Field(ge=2, le=16)], Annotated[int, Field(ge=2, le=16)]] = (2, 16)
    annotator: str | None = None
    confidence: Annotated[float, Field(ge=0, lt=1)] = 0.9
    longest: Count = 768
    window: Annotated[int, Field(ge=8, strict=True)] = 256
    examples: Count = 100_000

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.options[0] > self.options[1]:
            raise ValueError(f"options: {self.options[0]} to {self.options[1]} is no range")
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("formats: one stands twice")
        if ("single" in self.formats) != (self.annotator is not None):
            raise ValueError("annotator: the format 'single' needs one, the other formats have no use for it")
        return self


class PretrainConfig(BaseModel):
    """A recipe, as `configs/pretrain/*.yaml` spells it.

    Attributes:
        kind: What is trained.
        backbone: Hub id or directory of the frozen model.
        tasks: "upstream" (every bundled task that may be trained on), names and YAML files, or a directory of them.
        start: Prompt artifact (name or directory) to go on from, a single prompt from the mean of its modules; None
            begins with random prompts. A training in phases is one recipe after the other.
        fade: Share of the steps in which the prompts of the deeper layers of `start`, prompts before every layer, fade
            out while the one at the input learns to do without them; 0 where `start` is of the recipe's own kind.
        weights: Visits of a task in a round; 1 where not named.
        modules: K; 1 for a single prompt.
        intrinsic_dim: d.
        prompt_length: P.
        first_placeholder: Token id at the first prompt position; the others follow.
        repeat_placeholder: Put the first placeholder at every prompt position.
        readout: How options are scored: by a span head; as prototypes, by the similarity of embeddings; or (kind `ppt`)
            as words in a gap, by the language model head of the backbone.
        prefix: Prototypes: stands before every text and option, as the backbone was trained.
        scale: Prototypes: initial factor from cosine to logit; learned.
        depth: "all" puts prompts before every layer, "input" at the input alone, a number before so many of the first
            layers; None as the kind says.
        steps: Optimizer steps.
        tasks_per_step: Tasks in a step.
        per_task: Examples of each task in a slice of a step.
        accumulate: Slices of a step, each with `per_task` examples a task, whose gradients are averaged.
        bucket: Texts that train together are drawn from `bucket` times as many, sorted by length; 1 for none.
        max_tokens: Longest sequence.
        option_limit: Most options that an example keeps in training.
        option_characters: Most characters of options.
        shuffle_options: Put the options in random order.
        prompt_scale: Initial size of the entries of a prompt.
        module_rate: Learning rate of the modules z.
        projection_rate: Of the projections A.
        router_rate: Of the routers.
        head_rate: Of the span head, or of the prototypes' scale and threshold.
        fsl: Fast and slow learning (MP2, section 3.3): routers learn at `router_rate`; otherwise at `module_rate`.
        warmup: Share of the steps in which the rates rise.
        noise_from: Share of the steps after which gates are sampled.
        temperature: Of the relaxed Bernoulli gates.
        temperature_to: Where the temperature ends, falling geometrically while gates are sampled; None: constant.
        normalized: Divide by the sum of the gates instead of by K.
        clip: Largest norm of the gradient.
        seed: Of everything.
        spare_seeds: Few-shot pools of these seeds are left out of tasks that are also evaluated.
        train_cap: Most examples of a task.
        valid_size: Validation examples of a task.
        valid_every: Steps between two validations.
        keep: What becomes the artifact: the "last" step, or the "best" by the mean of validation scores.
        save_every: Steps between two checkpoints.
        dtype: Precision of the frozen model; what is trained stays float32. "auto" is bfloat16 where the device
            multiplies it in hardware, else float32; the directory and the artifact say which.
        compile: Have `torch.compile` fuse what follows attention in a layer, of encoders of the BERT family; takes some
            time at the start. "auto" does on a GPU with Triton; on a CPU it gained nothing.
        threads: CPU threads; None for torch's default.
        ppt: Settings of kind `ppt`; None for the others.
        note: What a reader of the model card should know.
        license: Terms of the artifact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    backbone: str = "intfloat/multilingual-e5-small"
    tasks: list[str] | str = "upstream"
    start: str | None = None
    fade: Annotated[float, Field(ge=0, le=1)] = 0.0
    weights: dict[str, Count] = Field(default_factory=dict)
    modules: Count = 8
    intrinsic_dim: Count = 64
    prompt_length: Count = 8
    first_placeholder: Annotated[int, Field(ge=0)] = 1000
    repeat_placeholder: bool = False
    readout: Literal["span", "prototype", "verbalizer"] = "span"
    prefix: str = "query: "
    scale: _Rate = 20.0
    depth: Literal["input", "all"] | Annotated[int, Field(ge=2, strict=True)] | None = None
    steps: Count = 4000
    tasks_per_step: Count = 4
    per_task: Count = 8
    accumulate: Count = 1
    bucket: Count = 1
    max_tokens: Count = 80
    option_limit: Annotated[int, Field(ge=2)] = 6
    option_characters: Count = 40
    shuffle_options: bool = True
    prompt_scale: _Rate = 0.05
    module_rate: _Rate = 1e-2
    projection_rate: _Rate = 1e-3
    router_rate: _Rate = 3e-2
    head_rate: _Rate = 3e-3
    fsl: bool = True
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    noise_from: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: _Rate = 1.0
    temperature_to: _Rate | None = None
    normalized: bool = True
    clip: _Rate = 1.0
    seed: int = 42
    spare_seeds: list[int] = [8, 10, 13, 20, 21, 30, 40, 42, 50, 100]
    train_cap: Count = 4000
    valid_size: Count = 128
    valid_every: Count = 1000
    keep: Literal["last", "best"] = "last"
    save_every: Count = 250
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Annotated[bool, Field(strict=True)] | Literal["auto"] = False
    threads: Count | None = None
    ppt: PptSettings | None = None
    note: str = ""
    license: str = "CC BY-NC 4.0 (research use; the data sets keep their own terms)"

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Token ids at the prompt positions."""
        return tuple(self.first_placeholder + (0 if self.repeat_placeholder else i) for i in range(self.prompt_length))

    @property
    def deep(self) -> bool:
        """Whether more layers than the first carry a prompt."""
        return self.kind == "mp2-deep" if self.depth is None else self.depth != "input"

    def prompted(self, layers: int) -> int:
        """How many of so many layers carry a prompt.

        Raises:
            UsageError: The recipe asks for more.
        """
        if isinstance(self.depth, int):
            if self.depth > layers:
                raise UsageError(f"depth: {self.depth} layers, the backbone has {layers}")
            return self.depth
        return layers if self.deep else 1

    @property
    def routed(self) -> bool:
        """Whether tasks have routers; a single prompt has none."""
        return self.kind in ("mp2-deep", "mp2-shallow")

    @property
    def single(self) -> bool:
        """Whether one prompt serves all tasks."""
        return not self.routed

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.single and self.modules != 1:
            raise ValueError(f"modules: kind {self.kind} is one prompt; write 1 instead of {self.modules}")
        if self.routed and self.depth is not None and self.deep != (self.kind == "mp2-deep"):
            raise ValueError(f"depth: '{self.depth}' is not what kind {self.kind} says; leave it null")
        if self.fade and (self.deep or self.kind == "ppt" or self.start is None):
            raise ValueError(
                "fade: only a prompt at the input (mp2-shallow, spot) takes over from those of a `start`; write 0"
            )
        fitting = ("span", "verbalizer") if self.kind == "ppt" else ("span", "prototype")
        if self.readout not in fitting:
            other = " or ".join(map(repr, fitting))
            raise ValueError(f"readout: '{self.readout}' is not for kind {self.kind}; write {other}")
        if self.ppt is not None and self.ppt.hybrid and self.readout != "verbalizer":
            raise ValueError("ppt.hybrid: only the patterns of the readout 'verbalizer' have hard prompts; write false")
        if (self.ppt is None) == (self.kind == "ppt"):
            raise ValueError(f"ppt: kind ppt needs these settings, the other kinds have none (kind: {self.kind})")
        return self

    def left_at(self, step: int) -> float:
        """Factor on the deeper layers' prompts of `start` in `step` (from 0), falling evenly to 0."""
        return max(1.0 - step / (self.fade * self.steps), 0.0) if self.fade else 0.0

    def temperature_at(self, step: int) -> float:
        """Temperature of the gates in `step` (from 0): constant, or falling geometrically to `temperature_to`."""
        if self.temperature_to is None:
            return self.temperature
        first = self.noise_from * self.steps
        share = min(max((step - first) / max(self.steps - 1 - first, 1), 0.0), 1.0)
        return float(self.temperature * (self.temperature_to / self.temperature) ** share)
