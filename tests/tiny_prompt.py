"""Tiny prompt artifacts and data directories for tests; random, but of a size that changes scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import yaml

from bbprompt.oracle import TextBatch
from bbprompt.prompts import ModularPrompt, PromptConfig
from bbprompt.scoring import labelled
from bbprompt.tasks.task import Task

MODULES, DIM, LENGTH, TASKS = 3, 4, 2, 2
PLACEHOLDERS = (300, 301)

PAIR = {
    "name": "tiny-pair",
    "type": "pair",
    "template": '"{text_a}"与"{text_b}"？选项：',
    "labels": {"0": "矛盾", "1": "相似"},
    "metric": "accuracy",
    "sources": ["made up"],
}
SINGLE = {
    "name": "tiny-single",
    "type": "single",
    "template": "{text}的主题是？选项：",
    "labels": {f"l{i}": word for i, word in enumerate(("房产", "车", "金融", "体育", "文化", "娱乐圈", "教育"))},
    "metric": "accuracy",
    "sources": ["made up"],
}
CHOICE = {
    "name": "tiny-choice",
    "type": "choice",
    "template": "文档{context}问题{query}，选项：",
    "metric": "accuracy",
    "sources": ["made up"],
}
EXTRACT = {
    "name": "tiny-extract",
    "type": "extractive",
    "template": "文本{context}问题{question}",
    "metric": "f1",
    "sources": ["made up"],
}


def artifact(
    backbone: Path,
    digest: str,
    *,
    kind: str = "mp2-deep",
    layers: int | None = None,
    seed: int = 0,
    **keys: Any,
) -> ModularPrompt:
    """Random modular prompts for a tiny backbone; `keys` go into the config."""
    rng = np.random.default_rng(seed)
    depth = layers or (tiny.LAYERS if kind == "mp2-deep" else 1)
    channels = 2 if keys.get("readout", "span") == "span" else 0

    def normal(scale: float, *shape: int) -> np.ndarray:
        # Values that float16 holds exactly, so that a saved artifact is the one in memory.
        return (rng.normal(0.0, scale, shape)).astype(np.float16).astype(np.float32)

    config = PromptConfig(
        kind=kind,
        backbone=str(backbone),
        backbone_digest=digest,
        layers=depth,
        hidden=tiny.HIDDEN,
        prompt_length=LENGTH,
        modules=MODULES,
        intrinsic_dim=DIM,
        placeholders=PLACEHOLDERS,
        tasks=("first", "second"),
        license="test",
        **keys,
    )
    return ModularPrompt(
        config,
        normal(1.0, depth, DIM, LENGTH * tiny.HIDDEN),
        normal(1.0, depth, MODULES, DIM),
        normal(2.0, TASKS, depth, MODULES),
        normal(0.3, channels, tiny.HIDDEN),
        normal(0.1, channels),
    )


def artifact_dir(folder: Path, backbone: Path, kind: str) -> Path:
    """Write random modular prompts that fit the weights in `backbone`."""
    from bbprompt.backends.backbone import load_backbone

    artifact(backbone, load_backbone(str(backbone)).digest, kind=kind).save(folder)
    return folder


def data_dir(folder: Path, task: Mapping[str, Any], records: Mapping[str, Iterable[Mapping[str, Any]]]) -> Path:
    """Write `task.yaml` and a JSON Lines file per split."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.yaml").write_text(yaml.safe_dump(dict(task), allow_unicode=True), encoding="utf-8")
    for split, rows in records.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def words(rng: np.random.Generator, low: int, high: int) -> str:
    """A random text of common characters, `low` to `high` characters long."""
    return "".join(tiny.HANZI[int(i)] for i in rng.integers(0, 400, int(rng.integers(low, high + 1))))


def pair_records(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of texts, labels "0" and "1" in turn; equal halves for "1"."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        first = words(rng, 4, 9)
        second = first[::-1] if i % 2 else words(rng, 4, 9)
        rows.append({"text_a": first, "text_b": second, "label": str(i % 2)})
    return rows


def single_records(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts with seven labels in turn."""
    rng = np.random.default_rng(seed)
    return [{"text": words(rng, 4, 12), "label": f"l{i % 7}"} for i in range(count)]


def choice_records(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions with two to four options of different length."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        choices = [words(rng, 1, 5) + str(j) for j in range(2 + i % 3)]
        rows.append(
            {
                "context": words(rng, 8, 16),
                "query": words(rng, 3, 6),
                "choices": choices,
                "label": int(rng.integers(len(choices))),
            }
        )
    return rows


def extract_records(count: int, seed: int) -> list[dict[str, Any]]:
    """Contexts with one answer in them."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        context = words(rng, 12, 24)
        start = int(rng.integers(0, len(context) - 4))
        text = context[start : start + int(rng.integers(1, 5))]
        answers = [{"text": text, "start": start}]
        rows.append({"context": context, "question": words(rng, 3, 6), "answers": answers})
    return rows


def batch_of(kind: str, count: int = 9) -> TextBatch:
    """Some texts of a task of the given kind, of mixed length."""
    make = {
        "pair": (PAIR, pair_records),
        "single": (SINGLE, single_records),
        "choice": (CHOICE, choice_records),
        "extract": (EXTRACT, extract_records),
    }[kind]
    task = Task.model_validate(make[0])
    return labelled(task, [task.example(record) for record in make[1](count, 5)], for_loss=True).batch
