"""The recipe of a language model head: every setting that decides what comes out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bbprompt.settings import Count

__all__ = ["CorpusFile", "HeadConfig"]


class CorpusFile(BaseModel):
    """A text file to read.

    Attributes:
        file: `.txt` or `.txt.gz`, a document a block of lines, blocks parted by blank lines.
        weight: How often it is visited in a round of the files.
        terms: Under which terms it stands; goes into the model card.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    weight: Count = 1
    terms: str = ""

    @property
    def name(self) -> str:
        """The file's name alone."""
        return Path(self.file).name


class HeadConfig(BaseModel):
    """A recipe, as `configs/pretrain/lm-head.yaml` spells it.

    Attributes:
        kind: Always "lm-head".
        backbone: Hub id or directory of the frozen encoder.
        corpus: What it reads.
        width: Inner width of the transform layer.
        vocabulary: Most tokens that the head can name: the most frequent ones of the corpus.
        least: A token that occurs less often is left out of them.
        masked: Share of a text's tokens that are to be guessed; 80 % of them are masked, 10 % replaced by another
            token and 10 % left as they are (BERT).
        steps: Optimizer steps.
        files_per_step: Visits of files in a step.
        per_file: Sequences of a visit.
        bucket: Sequences that train together are drawn from `bucket` times as many, sorted by length; 1 for none.
        max_tokens: Longest sequence; documents are cut into such pieces.
        rate: Learning rate of transform layer and biases.
        warmup: Share of the steps in which the rate rises.
        clip: Largest norm of the gradient.
        seed: Of everything.
        valid_size: Sequences of each file to measure on, from documents that are never trained on.
        valid_every: Steps between two looks at them.
        save_every: Steps between two checkpoints.
        dtype: Precision of the frozen model and of the product with its embedding; what is trained stays float32.
            "auto" as for prompts.
        threads: CPU threads; None for torch's default.
        note: What a reader of the model card should know.
        license: Terms of the artifact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["lm-head"] = "lm-head"
    backbone: str = "intfloat/multilingual-e5-small"
    corpus: list[CorpusFile] = Field(min_length=1)
    width: Count = 1536
    vocabulary: Count = 32768
    least: Count = 3
    masked: Annotated[float, Field(gt=0, lt=1)] = 0.15
    steps: Count = 2000
    files_per_step: Count = 2
    per_file: Count = 16
    bucket: Count = 8
    max_tokens: Annotated[int, Field(ge=16, strict=True)] = 128
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    seed: int = 42
    valid_size: Count = 128
    valid_every: Count = 500
    save_every: Count = 100
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Count | None = None
    note: str = ""
    license: str = "CC BY-NC 4.0 (research use; the texts keep their own terms)"

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [each.name for each in self.corpus]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"corpus: '{twice[0]}' stands twice; raise its weight instead")
        return self
