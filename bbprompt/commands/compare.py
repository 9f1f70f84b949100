"""`bbprompt compare`: paired statistics over tasks and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bbprompt.commands.flags import Debug, Json
from bbprompt.commands.output import whole_file, write, write_json
from bbprompt.errors import DiskError

__all__ = ["compare"]


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", show_default=False, help="Of a sweep, or any directory of runs; several are read as one."
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(metavar="METHOD", show_default=False, help="What all others stand against [default: the first]."),
    ] = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="Also the prompt chosen at the end of each earlier stage, as rows.")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default=False, help="Also write the main table as CSV.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Also write compare.md, table.csv, runs.csv, differences.csv, costs.csv and curves.csv.",
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods over tasks and seeds, paired.

    Of the finished runs: scores by task, paired differences, cost, and dev scores against calls.

    Markdown in percent on standard output; CSV and JSON hold fractions. Runs that are missing are named.
    """
    from bbprompt.compare.comparison import compare as compared
    from bbprompt.compare.runs import read_runs
    from bbprompt.compare.text import as_json, csv_files, markdown
    from bbprompt.terminal import logging_to, open_console

    with logging_to(open_console()):
        found = compared(*read_runs(*folders), baseline, stages)
    text, files = markdown(found), csv_files(found)
    if csv is not None:
        _put(csv, files["table.csv"])
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"--out {out}: cannot be made: {error.strerror or error}") from None
        for name, content in {"compare.md": text + "\n", **files}.items():
            _put(out / name, content)
    if json:
        write_json(as_json(found))
    else:
        write(text)


def _put(path: Path, content: str) -> None:
    with whole_file(path) as stream:
        stream.write(content)
