"""`bbprompt sweep`: many runs, resumable as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbprompt.commands.flags import AllowOverlap, Baselines, BatchTokens, Debug, Device, Dtype, Json, OnDoubt, Quiet
from bbprompt.commands.output import command, write, write_json
from bbprompt.commands.stop import stop_of
from bbprompt.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from bbprompt.sweep.experiment import Cell
    from bbprompt.sweep.job import Job
    from bbprompt.sweep.runner import Sweep

__all__ = ["sweep"]

_log = logging.getLogger("bbprompt")


def sweep(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="DIR", show_default=False, help="Holds a directory for each run, and sweep.json.")
    ],
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", show_default=False, help="Names or YAML files, comma-separated.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="X,Y", show_default=False, help="Names or YAML files, comma-separated.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,M", show_default=False, help="Comma-separated, such as 10,20,30,40,50.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_YAML",
            show_default=False,
            help="An experiment, bundled (configs/experiments) or a file: tasks, methods, seeds, variants and any "
            "setting of tune; flags win.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Runs at a time [default: 1, on Ray as many as the cluster's CPUs or GPUs hold].",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="local|auto|HOST:PORT",
            show_default=False,
            help="Spread the runs over a Ray cluster whose machines share the file system of --out.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH|hub|sample|auto", show_default=False, help="As `tune --data`."),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="ID_OR_DIR", show_default=False, help="As `tune --backbone`.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_DIR|none", show_default=False, help="As `tune --prompts`, for the methods that take prompts."
        ),
    ] = None,
    budget: Annotated[int | None, typer.Option(show_default=False, help="Most calls of a run [default: 8000].")] = None,
    shots: Annotated[int | None, typer.Option(show_default=False, help="As `tune --shots`.")] = None,
    backend: Annotated[str | None, typer.Option(show_default=False, help="As `tune --backend`.")] = None,
    on_doubt: OnDoubt = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = None,
    max_tokens: Annotated[int | None, typer.Option(show_default=False, help="As `tune --max-tokens`.")] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="CPU threads of a run [default: the cores divided by --workers; 1 on Ray].",
        ),
    ] = None,
    test_limit: Annotated[int | None, typer.Option(show_default=False, help="As `tune --test-limit`.")] = None,
    allow_overlap: AllowOverlap = None,
    baselines: Baselines = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", show_default=False, help="As `tune --set` (repeatable)."),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run tasks x methods x seeds, resumable as a whole.

    The same few-shot split for every method follows from the seed. With nothing but --out, a sweep goes on as it was
    begun. A failed run does not stop the others; at the end it is named, and the exit code is that of the first one.
    """
    grid = {"tasks": _listed(tasks), "methods": _listed(methods), "seeds": _seeds(seeds)}
    settings = {
        "data": data,
        "backbone": backbone,
        "prompts": prompts,
        "budget": budget,
        "shots": shots,
        "backend": backend,
        "on_doubt": on_doubt,
        "device": device,
        "dtype": dtype,
        "batch_tokens": batch_tokens,
        "max_tokens": max_tokens,
        "threads": threads,
        "test_limit": test_limit,
        "allow_overlap": allow_overlap,
        "baselines": baselines,
    }
    from bbprompt.connect import cores

    if ray is not None:
        from bbprompt.backends.cluster import normal_address

        normal_address(ray)  # wrong use begins nothing
    threads = 1 if ray is not None else max(1, cores() // (workers or 1))
    state = _opened(out, config, grid, settings, changes or [], threads)

    from bbprompt.commands.sweepview import SweepView
    from bbprompt.sweep.runner import run_sweep
    from bbprompt.terminal import logging_to, open_console

    console = open_console(quiet)
    interrupted: Interrupted | None = None
    stop = stop_of(context)
    with logging_to(console):
        stop.advice = f"go on with: {command('sweep', '--out', out)}"
        for (task, row), reason in state.unfit.items():
            _log.info("no runs of %s on %s: %s", row, task, reason)
        try:
            with _starter(ray, state, workers) as (start, at_once), SweepView(console) as view:
                run_sweep(state, at_once, stop.check, view.show, start)
        except Interrupted as error:
            interrupted = error
    _show(state, json)
    if interrupted is not None:
        raise interrupted
    if state.exit_code:
        raise typer.Exit(state.exit_code)


def _opened(
    out: Path, config: str | None, grid: dict[str, Any], settings: dict[str, Any], changes: list[str], threads: int
) -> Sweep:
    """The grid of the directory: as it was begun, or as the file and the flags say."""
    from bbprompt.config import parse_set
    from bbprompt.sweep.experiment import experiment_from
    from bbprompt.sweep.runner import Sweep, read_sweep, with_threads, write_sweep

    before = read_sweep(out)
    flags = {**settings, "set": parse_set(changes) or None}
    if before is not None and config is None and not any(v is not None for v in (*grid.values(), *flags.values())):
        experiment = before.located()  # a version before may have kept paths as seen from here
    else:
        experiment = experiment_from(config, grid, flags)
    experiment = with_threads(experiment, before, threads)
    return Sweep(out, {cell.name: cell for cell in write_sweep(out, experiment, before)}, experiment.unfit())


@contextmanager
def _starter(ray: str | None, state: Sweep, workers: int | None) -> Iterator[tuple[Callable[[Cell, Path], Job], int]]:
    """What starts a run, here or on a cluster, and how many at a time."""
    if ray is None:
        from bbprompt.sweep.job import start_local

        yield start_local, workers or 1
        return
    from bbprompt.backends.rayruns import open_ray_runs
    from bbprompt.connect import cores

    runs, at_once = open_ray_runs(ray, state.cells, workers, cores())
    try:
        yield runs.start, at_once
    finally:
        runs.close()


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text}: expected whole numbers, comma-separated, such as 10,20,30") from None


def _show(state: Sweep, json: bool) -> None:
    from bbprompt.commands.sweepview import counts_line

    if json:
        write_json(state.summary())
        return
    failed = [f"failed: {each['run']}: {each['error']} (exit {each['exit']})" for each in state.summary()["failed"]]
    logs = [f"Logs: {state.out / 'logs'}"] if failed else []
    following = f"Next: {command('compare', state.out)}"
    write("\n".join([counts_line(state), *failed, *logs, following]))
