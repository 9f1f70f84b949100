"""Flags and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bbprompt.errors import UsageError

__all__ = [
    "AllowOverlap",
    "Baselines",
    "BatchTokens",
    "Debug",
    "Device",
    "Dtype",
    "Json",
    "Moved",
    "OnDoubt",
    "Quiet",
    "Ray",
    "RunDir",
    "Threads",
    "Workers",
    "tokens_of",
]

Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON object on the last line of standard output."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no logs.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False, help="Directory of a run.")]
Moved = Annotated[
    str | None,
    typer.Option(
        "--backend", metavar="URL", show_default=False, help="The server, where it is no longer where the run began."
    ),
]
OnDoubt = Annotated[
    Literal["resend", "charge"] | None,
    typer.Option(
        "--on-doubt",
        show_default=False,
        help="Calls whose answer a crash lost: make them again, or count them [default: resend; charge at vLLM, which "
        "may charge for every request].",
    ),
]
AllowOverlap = Annotated[
    bool | None,
    typer.Option(
        "--allow-overlap/--no-allow-overlap",
        show_default=False,
        help="Go on where few-shot inputs stand in the test split too.",
    ),
]
Baselines = Annotated[
    bool | None,
    typer.Option(
        "--baselines/--no-baselines",
        show_default=False,
        help="Show cheap methods without prompts beside the result [default: yes].",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option("--device", show_default=False, help="Where the model runs; auto takes CUDA if there is one."),
]
Dtype = Annotated[
    Literal["auto", "float32", "mixed", "bfloat16"] | None,
    typer.Option(
        "--dtype",
        show_default=False,
        help="Precision of the model; auto is mixed where bfloat16 is in hardware (AVX-512 BF16, AMX, "
        "GPUs from Ampere on), else float32.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", show_default=False, min=1, help="CPU threads [default: all cores].")
]
BatchTokens = Annotated[
    str | None,
    typer.Option(
        "--batch-tokens",
        metavar="N|auto",
        show_default=False,
        help="Tokens that run through the model at once; auto: what is fast and fits into free memory [default: auto].",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="local|auto|HOST:PORT",
        show_default=False,
        help="Share the work out over a Ray cluster; local starts one here.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        show_default=False,
        min=1,
        help="Models on the Ray cluster [default: what it holds], or requests to a server at once [default: 1].",
    ),
]


def tokens_of(flag: str | None) -> int | None:
    """What a server's --batch-tokens says: a number, or None for what is fast and fits.

    Raises:
        UsageError: It is neither a number nor auto.
    """
    from bbprompt.settings import tokens_at_once

    try:
        return tokens_at_once(flag)
    except ValueError as error:
        raise UsageError(f"--batch-tokens: {error}") from error
