"""`bbprompt report`: one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bbprompt.commands.flags import Debug, Device, Dtype, Json, Moved, Quiet, Threads
from bbprompt.commands.output import whole_file, write, write_json
from bbprompt.errors import UsageError

if TYPE_CHECKING:
    from bbprompt.report.examples import Judged

__all__ = ["report"]


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_SWEEP_DIR",
            show_default=False,
            help="A run, a sweep, or prompts: their directory, or the name of ones that come with the package.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", show_default=False, help="The page, such as report.html.")],
    test: Annotated[
        bool,
        typer.Option(
            "--test/--no-test", help="Of a run: label the test examples again, for confusions and the worst of them."
        ),
    ] = True,
    test_limit: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Label at most so many test examples.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="So many of the worst examples.")] = 20,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="METHOD", show_default=False, help="Of a sweep: as `compare --baseline`."),
    ] = None,
    backend: Moved = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page of a run, a sweep or prompts.

    It needs no network and runs no script.

    A run: curves, scores, confusions, router, worst examples, settings. A sweep: the tables of `compare` and curves.
    Prompts: the routers of the upstream tasks and the groups they fall into.
    """
    folder = _directory(folder)
    kind = _kind(folder)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: there is no such directory")
    if out.is_dir():
        raise UsageError(f"--out {out}: is a directory; give the name of a file")
    if baseline is not None and kind != "sweep":
        raise UsageError(f"--baseline: {folder} is no sweep")
    if backend is not None and (kind != "run" or not test):
        why = "--no-test labels nothing again" if kind == "run" else f"{folder} is no run"
        raise UsageError(f"--backend {backend}: {why}, so no server is asked; leave it out")

    from bbprompt.terminal import logging_to, open_console

    console = open_console(quiet)
    with logging_to(console):
        if kind == "sweep":
            from bbprompt.report.sweep import sweep_page

            text = sweep_page(folder, baseline)
        elif kind == "prompts":
            from bbprompt.report.artifact import artifact_page

            text = artifact_page(folder)
        else:
            use = {"device": device or "auto", "dtype": dtype, "threads": threads, "backend": backend}
            text = _run(folder, test, test_limit, examples, use, quiet)
    with whole_file(out) as stream:
        stream.write(text)
    if json:
        write_json({"out": str(out), "kind": kind, "bytes": len(text.encode())})
    else:
        write(f"Written: {out}")


def _directory(named: Path) -> Path:
    if named.is_dir():
        return named
    from bbprompt.prompts import bundled_prompts

    bundled = bundled_prompts()
    if str(named) not in bundled:
        raise UsageError(f"{named}: there is no such directory, nor prompts of that name ({', '.join(bundled)})")
    return bundled[str(named)]


def _kind(folder: Path) -> Literal["run", "sweep", "prompts"]:
    from bbprompt.store.rundir import MANIFEST

    if (folder / MANIFEST).is_file():
        return "run"
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return "prompts"
    return "sweep"


def _run(
    folder: Path,
    test: bool,
    limit: int | None,
    most: int,
    use: Mapping[str, Any],
    quiet: bool,
) -> str:
    """The page of a run; `use` are arguments of `load_prompt`."""
    from bbprompt.report.run import run_page
    from bbprompt.result import read_result
    from bbprompt.store.rundir import RunDirectory
    from bbprompt.summary import notes

    with RunDirectory.open(folder, writable=False) as directory:
        if not directory.finished:
            raise UsageError(f"{folder}: this run is not finished; go on with `bbprompt resume {folder}`")
        said = notes(read_result(directory))
    judged = _judged(folder, limit, use, quiet) if test else None
    return run_page(folder, judged, said, most)


def _judged(folder: Path, limit: int | None, use: Mapping[str, Any], quiet: bool) -> list[Judged]:
    from bbprompt.predict import load_prompt
    from bbprompt.report.examples import judge
    from bbprompt.terminal import Meter, open_console

    meters: list[Meter] = []

    def show(done: int, total: int) -> None:
        if not meters:
            meters.append(Meter(open_console(quiet), total))
        meters[0].update("test", done, "examples")

    with load_prompt(folder, **use) as prompt:
        try:
            return judge(prompt, limit, show)
        finally:
            for meter in meters:
                meter.close()
