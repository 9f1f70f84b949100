"""A tiny encoder without a head, texts, and a recipe for a language model head; what its tests share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from bbprompt.backends.backbone import load_backbone
from bbprompt.pretrain.lm_recipe import HeadConfig

#: A text repeats one of these, so that what is masked can be told from the rest.
CHARACTERS = "的一是不了在人有我他这个们中来上大为和国"


def headless_dir(folder: Path, whole: Path) -> Path:
    """Write the encoder of a BERT without its head."""
    shutil.copytree(whole, folder)
    load_backbone(str(whole)).model.save_pretrained(folder)
    return folder


def corpus(file: Path, count: int, seed: int = 0) -> Path:
    """Write documents of two lines, all of one character."""
    rng = np.random.default_rng(seed)
    chosen, sizes = rng.integers(len(CHARACTERS), size=count), rng.integers(5, 20, (count, 2))
    blocks = ["\n".join(CHARACTERS[at] * int(n) for n in row) for at, row in zip(chosen, sizes, strict=True)]
    file.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return file


def make_recipe(backbone: Path, files: dict[Path, int], **changes: Any) -> HeadConfig:
    """A few steps on the files, each with its weight."""
    settings: dict[str, Any] = {
        "backbone": str(backbone),
        "corpus": [{"file": str(file), "weight": weight, "terms": "our own"} for file, weight in files.items()],
        "width": 48,
        "vocabulary": 40,
        "least": 2,
        "steps": 6,
        "files_per_step": 2,
        "per_file": 4,
        "bucket": 2,
        "max_tokens": 32,
        "valid_size": 8,
        "valid_every": 4,
        "save_every": 2,
        "dtype": "float32",
        "threads": 1,
    }
    return HeadConfig.model_validate(settings | changes)
