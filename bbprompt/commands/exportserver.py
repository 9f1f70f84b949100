"""`bbprompt export-server`: the oracle as a model of Triton or MLServer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bbprompt.commands.flags import BatchTokens, Debug, Device, Dtype, Json, Threads, tokens_of
from bbprompt.commands.output import write, write_json

__all__ = ["export_server"]


def export_server(
    kind: Annotated[
        Literal["triton", "mlserver"],
        typer.Option("--format", show_default=False, help="Server that the model repository is for."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", show_default=False, help="New folder for the repository.")],
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
    model: Annotated[str, typer.Option(metavar="NAME", help="Name of the model at the server.")] = "oracle",
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
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model repository for Triton or MLServer.

    They speak the Open Inference Protocol (KServe v2) and must have bbprompt installed; runs reach the model with
    --backend kserve://HOST:PORT/NAME.
    """
    from bbprompt.config import load_method
    from bbprompt.exportserver import ServedModel, write_repository
    from bbprompt.prompts import resolve_prompts

    if backbone is not None and Path(backbone).is_dir():
        backbone = str(Path(backbone).resolve())
    settings = ServedModel(
        backbone=backbone,
        device=device or "auto",
        dtype=dtype or "float32",  # an answer must not depend on what else is asked for with it
        batch_tokens=tokens_of(batch_tokens),
        max_tokens=max_tokens,
        threads=threads,
        max_points=max_points,
    )
    folder = write_repository(out, kind, model, resolve_prompts(prompts or load_method("mp2-deep").prompts), settings)
    start = f"tritonserver --model-repository {out}" if kind == "triton" else f"mlserver start {out}"
    port = {"triton": 8000, "mlserver": 8080}[kind]
    if json:
        write_json({"format": kind, "out": str(out), "model": str(folder), "start": start})
    else:
        write(f"wrote {folder}; start: {start}; then: bbprompt tune --backend kserve://127.0.0.1:{port}/{model} …")
