"""Prompts that a run keeps itself: written out, stored, and the same when read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_prompt

from bbprompt.errors import ArtifactError
from bbprompt.frozen import frozen_prompt, frozen_tensors, written_out
from bbprompt.prompts import Pooling
from bbprompt.random_projection import BackboneFacts, random_prompt
from bbprompt.stage_settings import ProjectionConfig

FACTS = BackboneFacts("model", "d" * 64, 32, 5000, 3, (0.04, 0.8, 1.2))
NAMES = (FACTS.id, FACTS.digest)


def test_a_frozen_prompt_is_the_prompt() -> None:
    settings = ProjectionConfig(dim=200, prompt_length=5, layers="all")
    prompt = random_prompt(settings, FACTS, 3)
    point = np.random.default_rng(2).normal(size=(3, 200))
    tensors = frozen_tensors(prompt, point)
    assert tensors["stds"].tolist() == list(FACTS.stds)
    frozen, one = frozen_prompt(tensors, NAMES, "span", settings.pooling)
    np.testing.assert_array_equal(frozen.prompts(one), prompt.prompts(point))
    assert frozen.config.placeholders == prompt.config.placeholders
    for name, value in (("prompt", np.full((3, 5, 32), np.nan)), ("head.bias", np.zeros(3)), ("prompt", np.zeros(3))):
        with pytest.raises(ArtifactError, match="damaged"):
            frozen_prompt(tensors | {name: value}, NAMES, "span", None)
    with pytest.raises(ArtifactError, match="damaged"):
        frozen_prompt({}, NAMES, "span", None)


def test_a_prepended_prompt_stays_one() -> None:
    settings = ProjectionConfig(dim=4, prompt_length=5, layers="input", injection="prepend", scale=1.0)
    prompt = random_prompt(settings, FACTS, 3)
    tensors = frozen_tensors(prompt, np.ones((1, 4)))
    assert tensors["placeholders"].tolist() == [-1] * 5
    frozen, _ = frozen_prompt(tensors, NAMES, "span", None)
    assert (frozen.config.injection, frozen.config.placeholders) == ("prepend", (-1,) * 5)
    for wrong in (
        tensors | {"placeholders": np.array([-1, -1, 7, -1, -1])},
        tensors | {"prompt": np.zeros((2, 5, 32))},
    ):
        with pytest.raises(ArtifactError, match="damaged"):
            frozen_prompt(wrong, NAMES, "span", None)


def test_a_prompt_written_out_keeps_its_readout(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(size=(2, 3, 32)).astype(np.float32)
    none = np.zeros((0, 32)), np.zeros(0)
    pooling = Pooling(scale=7.0, prefix="问：")
    prompt, one = written_out(values, (7, 8, 9), none, NAMES, "prototype", pooling)
    again, _ = frozen_prompt(frozen_tensors(prompt, one), NAMES, "prototype", pooling)
    assert again.digest == prompt.digest
    np.testing.assert_array_equal(again.prompts(one), values)
    assert again.config.pooling == pooling
    head = tiny_prompt.artifact(tmp_path, FACTS.digest)
    spans, _ = written_out(values, (7, 8, 9), (head.head_weight, head.head_bias), NAMES, "span", pooling)
    assert spans.config.pooling is None
    assert "stds" not in frozen_tensors(spans, one)
