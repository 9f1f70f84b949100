"""`bbprompt serve`: the oracle as a service."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bbprompt.commands.flags import BatchTokens, Debug, Device, Dtype, Json, Quiet, Threads, tokens_of
from bbprompt.commands.output import write, write_json
from bbprompt.errors import UsageError

__all__ = ["serve"]

_log = logging.getLogger("bbprompt")


def serve(
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_DIR",
            show_default=False,
            help="Prompts that the model answers with [default: those of mp2-deep].",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="ID_OR_DIR", show_default=False, help="Frozen model [default: that of the prompts]."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; all but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8765,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = None,
    max_tokens: Annotated[
        int | None, typer.Option(show_default=False, min=1, help="Longest sequence [default: the backbone's limit].")
    ] = None,
    threads: Threads = None,
    max_points: Annotated[
        int, typer.Option(min=1, help="Most candidates in a request; clients cut populations so.")
    ] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Most MiB in a request.")] = 64,
    at_once: Annotated[int, typer.Option(min=1, help="Most requests at once.")] = 64,
    lease: Annotated[float, typer.Option(min=1, help="Seconds that texts are kept after their last use.")] = 3600,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds after which a request is given up.")] = 600,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds that requests are given to finish after a SIGTERM.")
    ] = 30,
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help="Score requests of several clients on the same texts in one forward: faster where the model is not "
            "busy with one; answers then depend on who else asks, in the last digits.",
        ),
    ] = False,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default=False, help="Certificate (PEM): answer over https.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default=False, help="Private key (PEM) of the certificate.")
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Write the address there once it answers, for `python -m bbprompt.serve.health FILE`.",
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer scores for candidates over HTTP, until SIGTERM.

    Clients must bring the token that the environment variable BBPROMPT_TOKEN holds, where it is set.
    """
    from bbprompt.config import load_method
    from bbprompt.connect import open_oracle, read_token
    from bbprompt.prompts import ModularPrompt, resolve_prompts
    from bbprompt.terminal import logging_to, open_console

    try:
        from bbprompt.serve.health import write_ready
        from bbprompt.serve.server import build_server, is_loopback, listen
        from bbprompt.serve.settings import ServeSettings
        from bbprompt.serve.tls import tls_context
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed; pip install 'bbprompt[serve]', or pip install '.[serve]' in a clone"
        ) from error
    tls = tls_context(tls_cert, tls_key)
    token = read_token(os.environ)
    with logging_to(open_console(quiet)), listen(host, port, token) as listening:
        if tls is None and not is_loopback(host):
            _log.warning("--host %s without --tls-cert: texts and token travel in the clear", host)
        name = prompts or load_method("mp2-deep").prompts
        prompt = ModularPrompt.load(resolve_prompts(name))
        oracle = open_oracle(
            "local",
            prompt,
            backbone=backbone,
            device=device or "auto",
            dtype=dtype or "float32",  # an answer must not depend on what else is asked for with it
            batch_tokens=tokens_of(batch_tokens),
            max_tokens=max_tokens,
            threads=threads,
        )
        shown = f"[{host}]" if ":" in host else host
        url = f"{'http' if tls is None else 'https'}://{shown}:{listening.getsockname()[1]}"

        def ready() -> None:
            if ready_file is not None:
                write_ready(ready_file, url, tls_cert)
            info = oracle.info
            if json:
                write_json({"url": url, "backbone": info.backbone, "device": info.device, "pid": os.getpid()})
            else:
                write(f"{info.backbone} with prompts {name} on {info.device}, ready at {url}")

        settings = ServeSettings(
            token=token,
            points=max_points,
            body=max_body * 2**20,
            at_once=at_once,
            lease=lease,
            deadline=deadline,
            drain=drain,
            together=together,
        )
        server = build_server(oracle, settings, tls=tls, ready=ready)
        server.run(sockets=[listening])
        if not server.idle:
            _log.warning("the model is still at a request that nobody waits for any more; it is left at that")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # a forward cannot be stopped, and any other end would wait for it
        oracle.close()
