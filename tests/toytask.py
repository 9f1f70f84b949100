"""A task of question pairs and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bbprompt.tasks.task import Task

RECORDS = [{"text_a": f"问{i}", "text_b": "答", "label": str(i % 2)} for i in range(4)]


def toy(**keys: Any) -> Task:
    base: dict[str, Any] = {
        "name": "toy",
        "type": "pair",
        "template": "{text_a}{text_b}",
        "labels": {"0": "矛盾", "1": "相似"},
        "metric": "accuracy",
        "sources": ["hand-written"],
    }
    return Task.model_validate(base | keys)


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def fill(folder: Path, **files: bytes) -> Path:
    """Write files; `__` in a keyword stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder
