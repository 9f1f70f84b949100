"""Where the frozen model is: from a backend's name to an open model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from bbprompt.embedding import Embedder
from bbprompt.errors import ArtifactError, OracleError, UsageError
from bbprompt.language import LanguageModel
from bbprompt.oracle import Oracle
from bbprompt.prompts import ModularPrompt, bundled_prompts
from bbprompt.random_projection import BackboneFacts
from bbprompt.stage_settings import ProjectionConfig
from bbprompt.tasks.example import Form

if TYPE_CHECKING:
    from bbprompt.backends.completions import Completions

__all__ = [
    "TOKEN_VARIABLE",
    "ask_completions",
    "ask_server",
    "chosen_device",
    "cores",
    "is_vllm",
    "measure_backbone",
    "open_embedder",
    "open_language_model",
    "open_oracle",
    "read_token",
    "server_kind",
    "single_precision",
]

#: Environment variable that holds the token of a server, for the server and for its clients.
TOKEN_VARIABLE = "BBPROMPT_TOKEN"  # noqa: S105

_log = logging.getLogger("bbprompt")

#: Schemes of remote backends, and whether what is sent there is encrypted.
_REMOTE = {
    "http": False,
    "https": True,
    "kserve": False,
    "kserve+https": True,
    "kserve+grpc": False,
    "kserve+grpcs": True,
    "vllm+http": False,
    "vllm+https": True,
}


def open_oracle(
    backend: str,
    prompt: ModularPrompt,
    *,
    backbone: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    workers: int | None = None,
    resend: bool = True,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> Oracle:
    """Open a frozen model.

    Args:
        backend: "local", the URL (`http://`, `https://`) of a `bbprompt serve`, or that of a model of ours at a server
            of the Open Inference Protocol (`kserve://HOST:PORT/MODEL`, `kserve+grpc://HOST:PORT/MODEL`), or of a vLLM
            server (`vllm+http://HOST:PORT`), which holds the layers alone.
        prompt: The artifact behind the oracle.
        backbone: Hub id or directory; None for the one the prompts were trained for. Not for servers that hold it.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" (mixed on AVX-512 BF16, AMX or GPUs from Ampere on, else float32), "float32", "mixed", "bfloat16".
        batch_tokens: Tokens at once; None for the most that is fast and fits into the free memory.
        max_tokens: Longest sequence; None for the backbone's limit.
        threads: CPU threads; None for all cores, or 1 for each worker on Ray.
        ray: "local", "auto" or HOST:PORT: share the work out over actors of a Ray cluster; None: do not.
        workers: How many actors on Ray, None for one for each GPU or as many as the CPUs hold; or how many requests
            to a server at once, None for one.
        resend: Whether what a server may have carried out is asked for again; see `bbprompt.backends.calls.Policy`.
        weights: What a run that tuned the model itself lays over its weights; see `bbprompt.backends.overlay`.

    Raises:
        UsageError: A backend or device that is not there, or a setting that is the server's.
        ArtifactError: Backbone or prompts cannot be loaded or do not fit each other.
        OracleError: The server cannot be reached or holds another model.
    """
    if backend.partition("://")[0] in _REMOTE and "://" in backend:
        if ray is not None:
            raise UsageError("--ray: a server shares its work out itself; leave out --ray or --backend")
        own = is_vllm(backend)
        if device != "auto" or batch_tokens is not None or (dtype != "auto" if own else backbone is not None):
            raise UsageError(
                f"--backend {backend}: --device, --batch-tokens and {'--dtype' if own else '--backbone'} are set where "
                "the server is started"
            )
        if own:
            return _open_vllm(backend, prompt, backbone, max_tokens, threads, workers or 1, resend)
        oracle = ask_server(backend, workers or 1, resend=resend)
        return _open_server(backend, oracle, prompt, dtype, max_tokens, threads)
    if backend != "local":
        raise UsageError(
            f"--backend '{backend}': expected local, http://HOST:PORT, https://HOST:PORT, kserve://HOST:PORT/MODEL, "
            "kserve+grpc://HOST:PORT/MODEL or vllm+http://HOST:PORT"
        )
    if ray is not None:
        from bbprompt.backends.rayoracle import open_ray

        return open_ray(
            ray,
            prompt,
            workers=workers,
            backbone=backbone,
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            threads=threads,
            cores=cores(),
        )
    if workers is not None:
        raise UsageError("--workers: there is one model here; give --ray local, auto or HOST:PORT, or a --backend URL")
    from bbprompt.backends.here import open_here

    return open_here(
        prompt,
        backbone=backbone,
        device=chosen_device(device),
        dtype=dtype,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        threads=threads or cores(),
        weights=weights,
    )


def open_embedder(
    backend: str,
    *,
    backbone: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> Embedder:
    """Open a frozen model that is only read, without prompts; the arguments are those of `open_oracle`.

    Raises:
        UsageError: The backend is not local, or the device is not there.
        ArtifactError: The backbone cannot be loaded.
    """
    _only_here(backend, "this method reads the model's states, which")
    import torch

    from bbprompt.backends.backbone import DEFAULT_BACKBONE, load_backbone
    from bbprompt.backends.embedding import LocalEmbedder
    from bbprompt.backends.memory import batch_tokens_for

    chosen = chosen_device(device)
    torch.set_num_threads(threads or cores())
    model = load_backbone(backbone or DEFAULT_BACKBONE)
    return LocalEmbedder(
        model,
        device=chosen,
        dtype=single_precision(dtype),
        batch_tokens=batch_tokens or batch_tokens_for(model.hidden, 4 * model.hidden, chosen),
        max_tokens=max_tokens,
    )


def open_language_model(
    backend: str,
    backbone: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> LanguageModel:
    """Open a frozen language model that is asked without prompt vectors; the arguments are those of `open_oracle`.

    Raises:
        UsageError: The backend is not local, or the device is not there.
        ArtifactError: The backbone cannot be loaded or has no language model head.
    """
    _only_here(backend, "this method asks for scores over the whole vocabulary, which")
    import torch

    from bbprompt.backends.backbone import load_backbone
    from bbprompt.backends.language import LocalLanguageModel
    from bbprompt.backends.memory import batch_tokens_for

    chosen = chosen_device(device)
    torch.set_num_threads(threads or cores())
    model = load_backbone(backbone, head=True)
    return LocalLanguageModel(
        model,
        device=chosen,
        dtype=single_precision(dtype),
        batch_tokens=batch_tokens or batch_tokens_for(model.hidden, 4 * model.hidden, chosen),
        max_tokens=max_tokens,
    )


def single_precision(dtype: str) -> str:
    """The precision of a model that scores no populations: "mixed" is float32 for everything else."""
    return "float32" if dtype in ("auto", "mixed") else dtype


def measure_backbone(
    backend: str,
    forms: Sequence[Form],
    settings: ProjectionConfig,
    *,
    backbone: str | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> BackboneFacts:
    """What a random projection has to know of the frozen model; its states are measured on the few-shot texts.

    Raises:
        UsageError: The backend gives no states, or takes no such prompts.
        ArtifactError: The backbone cannot be loaded.
    """
    remote = is_vllm(backend)
    if remote:
        from bbprompt.backends.vllm import check_prompts

        check_prompts(backend, 1 if settings.layers == "input" else None, settings.readout)
    else:
        why = "a random projection is made here, from the model's states, which suits"
        _only_here(backend, why, "'local' and vLLM (vllm+http://HOST:PORT)")
    import torch

    from bbprompt.backends.backbone import DEFAULT_BACKBONE, load_backbone
    from bbprompt.backends.scale import facts_of, measure

    torch.set_num_threads(threads or cores())
    model = load_backbone(
        backbone or DEFAULT_BACKBONE, head=settings.readout == "verbalizer", layers=1 if remote else None
    )
    if settings.scale is not None or settings.distribution == "uniform":
        return facts_of(model)
    return measure(model, forms, settings.prompt_length, max_tokens, deep=settings.layers == "all")


def _only_here(backend: str, why: str, allowed: str = "'local' gives") -> None:
    if backend != "local":
        raise UsageError(f"--backend '{backend}': {why} only {allowed}; leave out --backend")


def chosen_device(asked: str) -> str:
    """The device to use; raises `UsageError` where it is not there."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def read_token(environ: Mapping[str, str]) -> str | None:
    """The token of the environment; None where it is not set.

    Raises:
        UsageError: It is short, or cannot stand in a header.
    """
    token = environ.get(TOKEN_VARIABLE, "")
    if token and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise UsageError(f"{TOKEN_VARIABLE}: expected at least 16 ASCII letters, digits or signs without spaces")
    return token or None


def ask_server(url: str, workers: int = 1, *, resend: bool = True) -> Oracle:
    """The oracle at a URL, whatever model and prompts it holds, asked with the token of the environment.

    Raises:
        UsageError: What is no URL, or no token.
        OracleError: It cannot be reached or speaks another language.
    """
    from bbprompt.backends.calls import Policy
    from bbprompt.backends.http import HttpOracle
    from bbprompt.backends.oip import OipOracle

    token, policy = _token_for(url), Policy(resend=resend)
    return (OipOracle if url.startswith("kserve") else HttpOracle)(url, token, workers=workers, policy=policy)


def server_kind(url: str) -> str:
    """Of a backend's URL what it speaks, with or without TLS."""
    scheme = url.partition("://")[0]
    return scheme.replace("https", "http").replace("grpcs", "grpc").replace("kserve+http", "kserve")


def is_vllm(backend: str) -> bool:
    """Whether a backend is a vLLM server, which holds a model's layers and knows nothing of prompts."""
    return backend.partition("://")[0] in ("vllm+http", "vllm+https")


def ask_completions(url: str, workers: int = 1, *, resend: bool = True) -> Completions:
    """The model at a vLLM server, asked with the token of the environment.

    Raises:
        UsageError: What is no URL, or no token.
        OracleError: It cannot be reached, has no such model or takes no embeddings.
    """
    from bbprompt.backends.calls import Policy
    from bbprompt.backends.completions import Completions

    return Completions(url, _token_for(url), workers=workers, policy=Policy(resend=resend))


def _token_for(url: str) -> str | None:
    """The token of the environment; a warning where it would travel in the clear."""
    token = read_token(os.environ)
    scheme, _, place = url.partition("://")
    if scheme not in _REMOTE:
        raise UsageError(f"--backend '{url}': expected {', '.join(f'{name}://' for name in _REMOTE)} and a host")
    if token is not None and not _REMOTE[scheme] and not place.startswith(("127.", "localhost")):
        _log.warning("--backend %s: the token travels in the clear; use TLS", url)
    return token


def _open_vllm(
    url: str,
    prompt: ModularPrompt,
    backbone: str | None,
    max_tokens: int | None,
    threads: int | None,
    workers: int,
    resend: bool,
) -> Oracle:
    """A vLLM server's oracle; of the backbone here what embeds the texts."""
    from bbprompt.backends.vllm import VllmOracle, check_prompts

    check_prompts(url, prompt.config.layers, prompt.config.readout)
    import torch

    from bbprompt.backends.backbone import load_backbone

    torch.set_num_threads(threads or cores())
    server = ask_completions(url, workers, resend=resend)
    try:
        model = load_backbone(backbone or prompt.config.backbone, head=True, layers=1)
    except BaseException:
        server.close()
        raise
    return VllmOracle(server, model, prompt, workers=workers, max_tokens=max_tokens)


def _bundled(digest: str) -> str | None:
    """The name of prompts that come with the package; None for others."""
    for name, folder in bundled_prompts().items():
        with suppress(ArtifactError):
            if ModularPrompt.load(folder).digest == digest:
                return name
    return None


def _open_server(
    url: str, oracle: Oracle, prompt: ModularPrompt, dtype: str, max_tokens: int | None, threads: int | None
) -> Oracle:
    """A server's oracle, if the server holds this artifact, its backbone and what else was asked for."""
    import torch

    torch.set_num_threads(threads or cores())  # for the optimizers, so that a search does not depend on the backend
    info, problem = oracle.info, None
    if info.prompts_digest != prompt.digest:
        held, wanted = _bundled(info.prompts_digest), _bundled(prompt.digest)
        command = "export-server --format triton --out REPOSITORY" if url.startswith("kserve") else "serve"
        problem = (
            f"holds other prompts ({held or info.prompts_digest[:12]}) than are wanted here "
            f"({wanted or prompt.digest[:12]}); start it with these, `bbprompt {command} --prompts {wanted or 'DIR'}`"
        )
    elif info.backbone_digest != prompt.config.backbone_digest:
        problem = f"holds another backbone than {prompt.config.backbone}; start it with the prompts' own"
    elif dtype not in ("auto", info.precision):
        problem = f"computes in {info.precision}, not in {dtype}; start it with --dtype {dtype}"
    elif max_tokens is not None and info.max_tokens > max_tokens:
        problem = f"reads up to {info.max_tokens} tokens, not {max_tokens}; start it with --max-tokens {max_tokens}"
    if problem is not None:
        oracle.close()
        raise OracleError(f"--backend {url}: the server {problem}")
    return oracle


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
