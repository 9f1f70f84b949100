"""The model that `bbprompt export-server` wrote down, opened where a model server runs."""

from __future__ import annotations

from pathlib import Path

from bbprompt.connect import open_oracle
from bbprompt.exportserver import read_settings
from bbprompt.prompts import ModularPrompt
from bbprompt.serve.oip import Responder
from bbprompt.serve.settings import ServeSettings

__all__ = ["open_exported"]


def open_exported(folder: Path) -> Responder:
    """The model of a folder with `bbprompt.json` and `prompts`.

    Raises:
        UsageError: A setting is wrong, or the device is not there.
        ArtifactError: Backbone or prompts cannot be loaded or do not fit each other.
    """
    settings = read_settings(folder)
    oracle = open_oracle(
        "local",
        ModularPrompt.load(folder / settings.prompts),
        backbone=settings.backbone,
        device=settings.device,
        dtype=settings.dtype,
        batch_tokens=settings.batch_tokens,
        max_tokens=settings.max_tokens,
        threads=settings.threads,
    )
    return Responder(oracle, ServeSettings(points=settings.max_points))
