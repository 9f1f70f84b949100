"""The directory of a training: whose it is, and the log in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from bbprompt.errors import DataError, DiskError, ResumeMismatch, UsageError
from bbprompt.jsontext import parse_json
from bbprompt.pretrain.checkpoint import pretrain_disk_error, write_atomic
from bbprompt.store.disk import Disk
from bbprompt.yamlfile import read_yaml, validate

__all__ = ["append_log", "claimed", "cut_log", "last_speed", "loss_curve"]

_LOG, _RECIPE, _CHECKPOINT = "train.jsonl", "recipe.json", "checkpoint.safetensors"


@contextmanager
def claimed(disk: Disk, out: Path, config: BaseModel, resume: bool) -> Iterator[None]:
    """Bind the directory to the recipe and hold it; wrong data or settings leave one free in which nothing was trained.

    Raises:
        RunLocked: Another process works on it.
        UsageError: It holds a training that is not to be gone on with, or none that is.
        ResumeMismatch: It was made with another recipe.
        DiskError: It cannot be written.
    """
    _bind(disk, out, config, resume)
    lock = disk.lock(out / "train.lock")
    try:
        yield
    except (DataError, UsageError):
        if not any((out / name).exists() for name in (_LOG, _CHECKPOINT)):
            (out / _RECIPE).unlink(missing_ok=True)
        raise
    finally:
        disk.close(lock)


def _bind(disk: Disk, out: Path, config: BaseModel, resume: bool) -> None:
    text = json.dumps(config.model_dump(mode="json"), ensure_ascii=False, sort_keys=True, indent=2) + "\n"
    file = out / _RECIPE
    if resume:
        # Killed before its first checkpoint, a training goes on from step 0.
        if not file.is_file():
            raise UsageError(f"--resume {out}: there is no training to go on with")
        # Read as settings: a recipe of an older version lacks keys whose defaults are what it did.
        if validate(type(config), read_yaml(file), str(file)) != config:
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            raise ResumeMismatch(f"{file}: the checkpoint was made with another recipe than this one ({digest})")
        return
    if file.is_file():
        raise UsageError(f"{out}: holds a training already; go on with --resume {out}, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pretrain_disk_error(error, "make this folder", out) from error
    write_atomic(disk, file, text.encode())


def append_log(directory: Path, record: dict[str, object]) -> None:
    """Append one line to `train.jsonl`.

    Raises:
        DiskError: It cannot be written.
    """
    file = directory / _LOG
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise pretrain_disk_error(error, "append to it", file) from error


def loss_curve(directory: Path) -> list[tuple[int, float, float]]:
    """What `train.jsonl` says of the training: step, mean loss and share answered right since the line before.

    Raises:
        DiskError: It cannot be read.
    """
    file = directory / _LOG
    try:
        records = [parse_json(line) for line in file.read_bytes().split(b"\n") if line]
        return [(each["step"], each["loss"], each["right"]) for each in records if "loss" in each]
    except OSError as error:
        raise pretrain_disk_error(error, "read it", file) from error
    except (ValueError, TypeError, KeyError):
        raise DiskError(f"{file}: holds a line that no training wrote; remove it and resume") from None


def last_speed(directory: Path) -> dict[str, float]:
    """The speed that the last line of a finished training gives; empty where it is not finished.

    Raises:
        DiskError: It cannot be read.
    """
    file = directory / _LOG
    try:
        records = [parse_json(line) for line in file.read_bytes().split(b"\n")[-2:] if line]
        return dict(records[-1]["speed"]) if records and "speed" in records[-1] else {}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise pretrain_disk_error(error, "read it", file) from error
    except (ValueError, TypeError):  # torn by a kill, and to be written again
        return {}


def cut_log(disk: Disk, directory: Path, step: int) -> None:
    """Take the lines out of `train.jsonl` that a training resumed at `step` will write again."""
    file = directory / _LOG
    if not file.is_file():
        return
    kept = []
    for line in file.read_bytes().split(b"\n"):  # a text may hold what str.splitlines takes for an end of line
        try:
            record = parse_json(line)
        except ValueError:  # torn by a kill, or the end
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise DiskError(f"{file}: holds a line that no training wrote; remove it, or the file, and resume")
        if record["step"] <= step > 0 and "speed" not in record:
            kept.append(line + b"\n")
    write_atomic(disk, file, b"".join(kept))
