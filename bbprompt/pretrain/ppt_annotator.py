"""A finished run as the annotator of single sentences (PPT, section 3.2: pseudo labels by another model)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import UsageError
from bbprompt.predict import TunedPrompt, load_prompt
from bbprompt.pretrain.ppt_batches import Annotator

__all__ = ["open_annotator"]


def open_annotator(folder: str) -> tuple[Annotator, tuple[str, ...], str]:
    """The run in `folder` as a function from texts to probabilities, its label words, and a digest of it.

    Raises:
        UsageError: Its task does not label single texts.
        ArtifactError: The run cannot be loaded.
    """
    prompt: TunedPrompt = load_prompt(folder)
    task = prompt.task
    if task.type != "single" or task.field_names != ("text",):
        raise UsageError(f"ppt.annotator: the run {folder} does not label single texts; its task is {task.name}")
    labels = list(task.labels)

    def annotate(texts: Sequence[str]) -> NDArray[np.floating]:
        rows = [[found.probabilities[label] for label in labels] for found in prompt.predict(list(texts))]
        return np.asarray(rows, np.float64).reshape(len(texts), len(labels))

    return annotate, task.options, hashlib.sha256((Path(folder) / "prompt.safetensors").read_bytes()).hexdigest()
