"""A tiny pre-training: three tasks with their data, and a recipe; what the tests of pre-training share."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import tiny_prompt

from bbprompt.pretrain.recipe import PretrainConfig

PAIR = tiny_prompt.PAIR | {"name": "tiny-pair", "track": "upstream", "terms": "none"}
CHOICE = tiny_prompt.CHOICE | {"name": "tiny-choice", "track": "upstream"}
EXTRACT = tiny_prompt.EXTRACT | {"name": "tiny-extract", "track": "seen", "terms": "none"}
NAMES = ("tiny-pair", "tiny-choice", "tiny-extract")


def data_root(root: Path) -> Path:
    """Write a directory of three task directories, with the task's YAML in each."""
    for task, make in (
        (PAIR, tiny_prompt.pair_records),
        (CHOICE, tiny_prompt.choice_records),
        (EXTRACT, tiny_prompt.extract_records),
    ):
        splits = {"train": make(100, 1), "dev": make(20, 2)}
        if task is PAIR:
            del splits["dev"]
        tiny_prompt.data_dir(root / str(task["name"]), task, splits)
    return root


def make_recipe(data: Path, backbone: Path, **changes: Any) -> PretrainConfig:
    """Six steps on the three tasks."""
    settings: dict[str, Any] = {
        "kind": "mp2-deep",
        "backbone": str(backbone),
        "tasks": [str(data / name / "task.yaml") for name in NAMES],
        "modules": 3,
        "intrinsic_dim": 4,
        "prompt_length": 2,
        "first_placeholder": 300,
        "steps": 6,
        "tasks_per_step": 2,
        "per_task": 3,
        "max_tokens": 60,
        "train_cap": 40,
        "valid_size": 8,
        "valid_every": 4,
        "save_every": 2,
        "spare_seeds": [1, 2],
        "dtype": "float32",
        "threads": 1,
    }
    return PretrainConfig.model_validate(settings | changes)


def corpus(file: Path, count: int, seed: int = 0) -> Path:
    """Write documents of 6 to 12 random Chinese sentences of 5 to 14 characters."""
    rng = np.random.default_rng(seed)
    blocks = [
        "\n".join(tiny_prompt.words(rng, 5, 14) + "。" for _ in range(int(rng.integers(6, 13)))) for _ in range(count)
    ]
    text = "\n\n".join(blocks) + "\n"
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")
    return file
