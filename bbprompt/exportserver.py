"""A model repository for a server of the Open Inference Protocol, whose model is ours.

What a server reads is small: a model file of a few lines that imports this package, the server's own settings, ours
(`bbprompt.json`) and a copy of the prompts. The backbone is named, not copied: it is loaded where the server runs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bbprompt.errors import UsageError
from bbprompt.oip import INPUTS, OUTPUTS
from bbprompt.prompts import ModularPrompt
from bbprompt.settings import BatchTokens, Count
from bbprompt.store.disk import disk_error

__all__ = ["SETTINGS", "Format", "ServedModel", "read_settings", "write_repository"]

Format = Literal["triton", "mlserver"]

#: File of our settings, beside the model file.
SETTINGS = "bbprompt.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PARTS = ("config.json", "model.safetensors", "README.md")
_DIMS = {"request": 1, "points": 3, "texts": 1, "reply": 1, "logits": 3, "normalizer": 3, "best": 3}


class ServedModel(BaseModel):
    """What is served; the content of `bbprompt.json`.

    Attributes:
        prompts: Folder of the prompts, from that of the file.
        backbone: Hub id or directory; None for the one the prompts were trained for.
        device: "auto" takes CUDA where there is one.
        dtype: Precision.
        batch_tokens: Tokens at once; None for what is fast and fits.
        max_tokens: Longest sequence; None for the backbone's limit.
        threads: CPU threads; None for all cores.
        max_points: Most candidates in a request; clients cut larger populations into pieces of this size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: str = "prompts"
    backbone: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "mixed", "bfloat16"] = "float32"
    batch_tokens: BatchTokens = None
    max_tokens: Count | None = None
    threads: Count | None = None
    max_points: Count = 1024


def read_settings(folder: Path) -> ServedModel:
    """The settings in a folder.

    Raises:
        UsageError: There are none, or they are wrong.
    """
    file = folder / SETTINGS
    try:
        return ServedModel.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; write it with `bbprompt export-server`") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        reason = " ".join(f"{where}: {first['msg']}".split())
        raise UsageError(f"{file}: {reason}") from error


def write_repository(out: Path, kind: Format, name: str, prompts: Path, settings: ServedModel) -> Path:
    """Write a model repository.

    Args:
        out: A folder that is not there yet, or is empty.
        kind: For which server.
        name: Of the model.
        prompts: Folder of a prompt artifact.
        settings: What is served.

    Returns:
        The folder of the model in it.

    Raises:
        UsageError: The folder holds something, or the name is none.
        ArtifactError: The prompts are no artifact.
        DiskError: Something cannot be written.
    """
    if not _NAME.fullmatch(name) or name == "bbprompt":
        # A folder of that name would hide the package from servers that look for modules in the repository.
        raise UsageError(f"--model {name[:40]!r}: expected letters, digits, '.', '_' and '-', and not bbprompt")
    ModularPrompt.load(prompts)  # what the server would refuse is refused here
    model = out / name
    inner = model / "1" if kind == "triton" else model
    try:
        new = not out.exists()
        if not new and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out {out}: there is something already; give a new folder")
        with _all_or_nothing(out, new):
            _fill(out, inner, _files(kind, name), prompts, settings)
    except OSError as error:
        raise disk_error(error, "write", out) from error
    return model


def _fill(out: Path, inner: Path, files: Mapping[str, str], prompts: Path, settings: ServedModel) -> None:
    inner.mkdir(parents=True)
    for path, text in files.items():
        (out / path).write_text(text, encoding="utf-8")
    content = settings.model_dump_json(indent=2, exclude_none=True)
    (inner / SETTINGS).write_text(content + "\n", encoding="utf-8")
    target = inner / settings.prompts
    target.mkdir()
    for part in _PARTS:
        if (prompts / part).is_file():
            shutil.copyfile(prompts / part, target / part)


@contextmanager
def _all_or_nothing(out: Path, new: bool) -> Iterator[None]:
    """Clear a folder, and remove it where it is new, if the block fails or is stopped: half of it would be served."""
    try:
        yield
    except BaseException:
        for path in [out] if new else list(out.iterdir()):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        raise


def _files(kind: Format, name: str) -> Mapping[str, str]:
    """Text of each file by its path."""
    if kind == "triton":
        return {f"{name}/config.pbtxt": _triton_config(name), f"{name}/1/model.py": _TRITON_MODEL}
    model = {
        "name": name,
        "implementation": "model.BBPromptModel",
        "platform": "bbprompt",
        "inputs": _tensors(INPUTS),
        "outputs": _tensors(OUTPUTS),
        "parameters": {"uri": ".", "version": "1"},
    }
    return {
        "settings.json": json.dumps(_MLSERVER, indent=2) + "\n",
        f"{name}/model-settings.json": json.dumps(model, indent=2) + "\n",
        f"{name}/model.py": _MLSERVER_MODEL,
    }


def _tensors(types: Mapping[str, str]) -> list[dict[str, object]]:
    return [{"name": key, "datatype": datatype, "shape": [-1] * _DIMS[key]} for key, datatype in types.items()]


def _triton_config(name: str) -> str:
    """Sizes are open: d, L and the texts decide them. Nothing is batched by the server, see `TritonPythonModel`."""
    lines = [f'name: "{name}"', 'backend: "python"', "max_batch_size: 0"]
    for part, types in (("input", INPUTS), ("output", OUTPUTS)):
        for key, datatype in types.items():
            dims = ", ".join(["-1"] * _DIMS[key])
            optional = " optional: true" if part == "input" and key != "request" else ""
            lines.append(f'{part} [ {{ name: "{key}" data_type: TYPE_{datatype} dims: [ {dims} ]{optional} }} ]')
    lines += ["instance_group [ { count: 1 kind: KIND_CPU } ]", ""]
    return "\n".join(lines)


_TRITON_MODEL = '''"""bbprompt behind Triton's Python backend; settings are in bbprompt.json."""

import os
import sys

# The interpreter that Triton embeds is isolated: a virtual environment that PYTHONPATH names is unknown to it.
sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

from bbprompt.serve.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_MLSERVER_MODEL = '''"""bbprompt as a runtime of MLServer; settings are in bbprompt.json."""

from bbprompt.serve.mlserver import BBPromptModel

__all__ = ["BBPromptModel"]
'''

# Loopback, because there is no token; no worker processes, because the model takes one request at a time.
_MLSERVER = {"host": "127.0.0.1", "http_port": 8080, "grpc_port": 8081, "parallel_workers": 0, "debug": False}
