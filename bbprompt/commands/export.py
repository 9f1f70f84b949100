"""`bbprompt export`: the tuned prompt in the form that other tools load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from bbprompt.commands.flags import Debug, Json, Quiet, RunDir
from bbprompt.commands.output import write, write_json

__all__ = ["export"]


def export(
    run_dir: RunDir,
    out: Annotated[
        Path, typer.Option(metavar="DIR", show_default=False, help="Directory to make; must not exist yet.")
    ],
    form: Annotated[
        Literal["peft", "prompt-embeds", "safetensors"],
        typer.Option(
            "--format",
            show_default=False,
            help="peft: causal models (PROMPT_TUNING for input prompts, PREFIX_TUNING for deep ones); prompt-embeds "
            "(vLLM): input prompts of causal models; safetensors: any.",
        ),
    ],
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the tuned prompt of a run as files for other tools.

    What a form cannot represent exactly is refused, with the reason. Beside the tensors stand a README on how to apply
    them, and bbprompt.json with task, readout and model.
    """
    from bbprompt.export import export_prompt
    from bbprompt.terminal import logging_to, open_console

    with logging_to(open_console(quiet)):
        done = export_prompt(run_dir, form, out)
    if json:
        write_json(dataclasses.asdict(done))
    else:
        write(f"{done.out}: {', '.join(done.files)}")
