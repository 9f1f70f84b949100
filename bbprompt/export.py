"""A tuned prompt as files that other tools load, exactly as the model saw it or not at all.

=================  ====================================================================================
``safetensors``    the prompt of each layer, placeholders and head: for any run, applied by own code
``prompt-embeds``  an input prompt of a causal model as rows before the text, with a client for vLLM
``peft``           a prompt of a causal model for `PeftModel.from_pretrained`: such rows (PROMPT_TUNING)
                   where it is an input prompt, keys and values (PREFIX_TUNING) where it is deep
=================  ====================================================================================

An encoder's prompt is added to states that look at the text in every layer, which neither form can represent; nor can
they put rows behind the LayerNorm of its embeddings.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from bbprompt import __version__
from bbprompt.config import MethodConfig, TuneConfig
from bbprompt.errors import UsageError
from bbprompt.exporttext import CLIENT, peft_card, rows_card, tensors_card
from bbprompt.predict import read_offsets, read_tuned
from bbprompt.prompts import ModularPrompt, no_rows
from bbprompt.result import read_result
from bbprompt.run import reopen
from bbprompt.store.disk import RealDisk
from bbprompt.store.rundir import MANIFEST, PROMPT, RunDirectory
from bbprompt.tasks.example import Example
from bbprompt.tasks.task import Task
from bbprompt.texts.forms import cloze_form
from bbprompt.yamlfile import validate

__all__ = ["FACTS", "ExportFormat", "Exported", "export_prompt"]

ExportFormat = Literal["peft", "prompt-embeds", "safetensors"]

FACTS = "bbprompt.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        run_dir: The run.
        format: Which form.
        out: The directory.
        files: Names of its files.
        backbone: Name of the model that the prompt is for.
        layers: Layers that carry a prompt.
        length: Prompt positions; with the special tokens before them where they are rows before the text.
    """

    run_dir: str
    format: ExportFormat
    out: str
    files: tuple[str, ...]
    backbone: str
    layers: int
    length: int


def export_prompt(run_dir: Path | str, form: ExportFormat, out: Path | str) -> Exported:
    """Write the tuned prompt of a finished run into a new directory, which appears whole or not at all.

    Args:
        run_dir: The run.
        form: Which form. "safetensors" needs no model; the others load it.
        out: A directory that does not exist, in one that does.

    Raises:
        UsageError: There is no finished run or it has no prompt, `out` exists, or the form cannot represent the
            prompt exactly.
        ArtifactError: Backbone or prompts are missing, or are not those that the run was tuned with.
        DiskError: A file of the run is damaged, or one of `out` cannot be written.
    """
    target = Path(os.path.abspath(out))  # noqa: PTH100 - not resolved: a link with no target is in the way, too
    if os.path.lexists(target):
        raise UsageError(f"--out {out}: exists already; choose a directory that does not")
    if not target.parent.is_dir():
        raise UsageError(f"--out {out}: there is no directory {target.parent}")
    directory, config = reopen(Path(run_dir), writable=False)
    with directory:
        if not directory.finished:
            raise UsageError(f"{run_dir}: this run is not finished; go on with `bbprompt resume {run_dir}`")
        method = validate(MethodConfig, directory.manifest["method"], str(directory.path / MANIFEST))
        if method.baseline is not None:
            raise UsageError(f"{run_dir}: the method {method.name} tunes no prompt; there is nothing to export")
        if method.tunes_model:
            raise UsageError(
                f"{run_dir}: the method {method.name} tuned the weights of the model and no prompt, so there is "
                f"nothing to export; `bbprompt predict` and `bbprompt eval` read what it changed from {PROMPT} there"
            )
        prompt, point = read_tuned(directory, config)
        if form != "safetensors" and prompt.config.readout != "verbalizer":
            raise UsageError(
                f"--format {form}: a '{prompt.config.readout}' readout is of an encoder, whose prompt "
                f"{no_rows(prompt.config.injection)}; use --format safetensors"
            )
        facts = _facts(directory, method, prompt)
        if form == "safetensors":
            files, length = _tensors(facts, prompt, point), prompt.config.prompt_length
        else:
            files, length = _rows(form, facts, config, prompt, point)
        path = str(directory.path)
    _write(target, files)
    return Exported(path, form, str(target), tuple(files), facts["backbone"]["id"], prompt.config.layers, length)


def _facts(directory: RunDirectory, method: MethodConfig, prompt: ModularPrompt) -> dict[str, Any]:
    """What all forms say of a prompt, as JSON holds it."""
    manifest, config, result = directory.manifest, prompt.config, read_result(directory)
    return {
        "format": FORMAT,
        "bbprompt": __version__,
        "run": {"digest": result.digest, "method": method.name, "seed": result.seed},
        "test": result.test.model_dump(mode="json"),
        "backbone": {
            "id": manifest["model"]["backbone"],
            "digest": manifest["model"]["backbone_digest"],
            "precision": manifest["model"]["precision"],
            "max_tokens": manifest["model"]["max_tokens"],
        },
        "prompt": {
            "injection": config.injection,
            "layers": config.layers,
            "length": config.prompt_length,
            "hidden": config.hidden,
            "placeholders": list(config.placeholders),
        },
        "readout": {
            "kind": config.readout,
            "support": method.support,
            "legacy_decision": method.legacy_decision,
            "pooling": config.pooling.model_dump(mode="json") if config.pooling is not None else None,
            "offsets": list(read_offsets(directory)),
            "synonyms": method.synonyms,
        },
        "license": config.license,
        "task": validate(Task, manifest["task"], str(directory.path / MANIFEST)).model_dump(mode="json"),
    }


def _tensors(facts: Mapping[str, Any], prompt: ModularPrompt, point: NDArray[np.float32]) -> dict[str, bytes]:
    arrays: dict[str, NDArray[np.generic]] = {
        "prompt": prompt.prompts(point),
        "placeholders": np.array(prompt.config.placeholders, dtype=np.int64),
    }
    if prompt.config.readout == "span":
        arrays |= {"head.weight": prompt.head_weight, "head.bias": prompt.head_bias}
    if facts["readout"]["offsets"]:
        arrays["offsets"] = np.array(facts["readout"]["offsets"], dtype=np.float64)
    return {
        "prompt.safetensors": save({name: np.ascontiguousarray(array) for name, array in arrays.items()}),
        FACTS: _json(facts),
        "README.md": tensors_card(facts).encode(),
    }


def _rows(
    form: ExportFormat, facts: dict[str, Any], config: TuneConfig, prompt: ModularPrompt, point: NDArray[np.float32]
) -> tuple[dict[str, bytes], int]:
    """Files of the forms that stand before a text, and how many positions they take."""
    from bbprompt.backends.backbone import load_backbone
    from bbprompt.backends.virtual_tokens import front_of, key_value_prefix, option_tokens, virtual_tokens

    backbone = load_backbone(config.backbone or prompt.config.backbone, head=True)
    prefix = form == "peft" and prompt.config.layers > 1
    try:
        front = front_of(backbone, prompt, point)
        rows = key_value_prefix(front) if prefix else virtual_tokens(front)
    except UsageError as error:
        raise UsageError(f"--format {form}: {error}; use --format safetensors") from None
    text, words = _cloze(Task.model_validate(facts["task"]), facts["readout"]["synonyms"])
    options = [{"label": label} | _one_or_list("word", own) for label, own in words.items()]
    readable = bool(text) and "literal" in text[-1]  # else the token that a word begins with may depend on the text
    if readable:
        tokens = [option_tokens(backbone, text[-1]["literal"], own) for own in words.values()]
        options = [option | _one_or_list("token", own) for option, own in zip(options, tokens, strict=True)]
        text[-1]["literal"] = text[-1]["literal"].rstrip()  # white space before the gap belongs to the word
    facts |= {"rows": {"count": len(rows), "special": list(front.frame.first)}, "text": text, "options": options}
    if form == "prompt-embeds":
        files = {"prompt_embeds.safetensors": save({"prompt_embeds": rows}, metadata={"format": "pt"})}
        files |= {"client.py": CLIENT.encode()} if readable else {}
        card = rows_card(facts)
    else:
        adapter, weights = _adapter(facts, rows, backbone.model.config, prefix)
        files = {"adapter_config.json": _json(adapter), "adapter_model.safetensors": weights}
        card = peft_card(facts, adapter["peft_type"])
    return files | {FACTS: _json(facts), "README.md": card.encode()}, len(rows)


def _adapter(
    facts: Mapping[str, Any], rows: NDArray[np.float32], model: Any, prefix: bool
) -> tuple[dict[str, Any], bytes]:
    """Settings and tensors as PEFT writes them; the rows of a prefix are k0, v0, k1, v1 and so on, head by head."""
    heads = rows.shape[3] if prefix else int(model.num_attention_heads)
    own = (
        {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": None}
        if prefix
        else {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
    )
    config = own | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": facts["backbone"]["id"],
        "inference_mode": True,
        "num_virtual_tokens": len(rows),
        "token_dim": heads * rows.shape[4] if prefix else rows.shape[1],
        "num_layers": int(model.num_hidden_layers),
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
        "revision": None,
    }
    flat = np.ascontiguousarray(rows.reshape(len(rows), -1))
    return config, save({"prompt_embeddings": flat}, metadata={"format": "pt"})


def _one_or_list(name: str, values: Sequence[str | int]) -> dict[str, Any]:
    """A value by its name, several by its plural."""
    return {name: values[0]} if len(values) == 1 else {f"{name}s": list(values)}


def _cloze(task: Task, synonyms: bool) -> tuple[list[dict[str, str]], dict[str, tuple[str, ...]]]:
    """The text up to the gap in pieces, and each label's words; nothing where each example has options of its own."""
    if not task.labelled:
        return [], {}
    fields = {name: f"{{{name}}}" for name in task.field_names}
    form = cloze_form(task, Example(fields, task.options, -1, (), ""))
    names = {id(text): name for name, text in fields.items()}
    parts = form.parts[: form.gap]
    text = [{"field": names[id(part.text)]} if id(part.text) in names else {"literal": part.text} for part in parts]
    words = (task.synonyms[word] if synonyms else (word,) for word in form.options)
    return text, dict(zip(task.labels, words, strict=True))


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()


def _write(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a new directory durably, under a name of its own until it is whole."""
    disk = RealDisk()
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    disk.make_folder(scratch)
    try:
        for name, data in files.items():
            file = disk.open(scratch / name, fresh=True)
            try:
                disk.write(file, data)
                disk.sync(file)
            finally:
                disk.close(file)
        disk.sync_folder(scratch)
        if os.path.lexists(target):
            raise UsageError(f"--out {target}: exists already; choose a directory that does not")
        disk.replace(scratch, target)
        disk.sync_folder(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
