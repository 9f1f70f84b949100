"""`bbprompt doctor`: what is there, what is missing, what to fix."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from bbprompt.commands.flags import Debug, Json
from bbprompt.commands.output import write, write_json

__all__ = ["doctor"]


def doctor(
    backend: Annotated[
        str | None,
        typer.Option(show_default=False, help="Also open the default model there: `local` or a URL."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check this machine, and say what to fix.

    Looks at packages, device, precision, prompts, data, caches and disk; ends with 2 if something must be fixed.
    """
    from bbprompt.doctor import examine
    from bbprompt.terminal import logging_to, open_console

    findings = []
    with logging_to(open_console(quiet=True)):
        for finding in examine(backend):
            findings.append(finding)
            if not json:
                fix = f"\n{'':9}-> {finding.fix}" if finding.fix else ""
                write(f"{finding.state:8} {finding.name}: {finding.value}{fix}")
    problems = sum(finding.state == "problem" for finding in findings)
    if json:
        write_json({"problems": problems, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        write(f"\n{problems} to fix" if problems else "\nnothing to fix")
    if problems:
        raise typer.Exit(2)
