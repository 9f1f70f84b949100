"""`bbprompt tune` and `bbprompt resume`."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbprompt.commands.flags import (
    AllowOverlap,
    Baselines,
    BatchTokens,
    Debug,
    Device,
    Dtype,
    Json,
    Moved,
    OnDoubt,
    Quiet,
    Ray,
    RunDir,
    Threads,
    Workers,
)
from bbprompt.commands.output import command, write, write_json
from bbprompt.commands.stop import Stop, stop_of
from bbprompt.errors import UsageError

if TYPE_CHECKING:
    from bbprompt.config import TuneConfig
    from bbprompt.opened import Opened
    from bbprompt.result import Result
    from bbprompt.store.rundir import RunDirectory

__all__ = ["resume", "tune"]

_log = logging.getLogger(__name__)


def tune(
    context: typer.Context,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_YAML", show_default=False, help="Task; `bbprompt tasks` lists them."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH|hub|sample|auto", show_default=False, help="Where the data are [default: auto]."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_YAML",
            show_default=False,
            help="`bbprompt methods` lists them [default: mp2-deep].",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_DIR",
            show_default=False,
            help="Frozen model [default: the one the prompts are for].",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="ID_OR_DIR|none", show_default=False, help="Pre-trained prompts [default: the method's]."),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(show_default=False, help="Most calls, train and dev together [default: 8000]."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(show_default=False, help="Of the few-shot split and the search [default: 42]."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(show_default=False, help="Examples a label [default: the papers' rule].")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="local|URL",
            show_default=False,
            help="Where the model answers: here, at a `bbprompt serve` (http(s)://HOST:PORT), at Triton or MLServer "
            "(kserve://HOST:PORT/MODEL, kserve+grpc://HOST:PORT/MODEL), or at vLLM (vllm+http(s)://HOST:PORT) "
            "[default: local].",
        ),
    ] = None,
    on_doubt: OnDoubt = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = None,
    max_tokens: Annotated[
        int | None, typer.Option(show_default=False, help="Longest sequence [default: the model's limit].")
    ] = None,
    threads: Threads = None,
    ray: Ray = None,
    workers: Workers = None,
    test_limit: Annotated[
        int | None, typer.Option(show_default=False, help="Score at most so many test examples.")
    ] = None,
    allow_overlap: AllowOverlap = None,
    baselines: Baselines = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default=False, help="[default: runs/<task>-<method>-<seed>-<digest>]."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="YAML with any of these flags as keys; flags win."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            show_default=False,
            help="Change a setting of the method, such as prompt.sigma=0.02 (repeatable).",
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tune a prompt with forward calls, then score the test data."""
    flags = {
        "task": task,
        "data": data,
        "method": method,
        "backbone": backbone,
        "prompts": prompts,
        "budget": budget,
        "seed": seed,
        "shots": shots,
        "backend": backend,
        "on_doubt": on_doubt,
        "device": device,
        "dtype": dtype,
        "batch_tokens": batch_tokens,
        "max_tokens": max_tokens,
        "threads": threads,
        "ray": ray,
        "workers": workers,
        "test_limit": test_limit,
        "allow_overlap": allow_overlap,
        "baselines": baselines,
        "run_dir": str(run_dir) if run_dir is not None else None,
        "quiet": quiet or None,
    }
    settings, folder, silent = _merged(config, flags, changes or [])
    _run(stop_of(context), settings, folder, quiet=silent, json=json)


def resume(
    context: typer.Context,
    run_dir: RunDir,
    backend: Moved = None,
    ray: Ray = None,
    workers: Workers = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with a stopped run, to the identical result.

    Where it is computed may change: --ray and --workers are free, and a server may have moved.
    """
    where = {"ray": ray, "workers": workers}
    _run(stop_of(context), None, run_dir, quiet=quiet, json=json, where=where, moved=backend)


def _merged(file: Path | None, flags: Mapping[str, Any], changes: list[str]) -> tuple[TuneConfig, Path | None, bool]:
    """Settings of the file and the flags, the run directory and whether to be quiet; flags win.

    A key of the file may be spelled as the flag is, `batch-tokens` for `batch_tokens`.
    """
    from bbprompt.config import TuneConfig, parse_set
    from bbprompt.yamlfile import read_yaml, validate

    values: dict[str, Any] = {}
    for name, value in (read_yaml(file) if file is not None else {}).items():
        key = name.replace("-", "_")
        if key in values:
            raise UsageError(f"{file}: the key '{key}' stands twice, once as '{name}'")
        values[key] = value
    own = values.pop("set", None)
    values.update({key: value for key, value in flags.items() if value is not None})
    folder, quiet = values.pop("run_dir", None), values.pop("quiet", False)
    if folder is not None and not isinstance(folder, str):
        raise UsageError(f"{file}: run_dir: expected a path, got {folder!r}")
    if not isinstance(quiet, bool):
        raise UsageError(f"{file}: quiet: expected true or false, got {quiet!r}")
    if "task" not in values:
        raise UsageError("--task is missing; `bbprompt tasks` lists what is there")
    if own is not None and not isinstance(own, dict):
        raise UsageError(f"{file}: set: expected a mapping of dotted keys to values, got {own!r}")
    values["set"] = {**(own or {}), **parse_set(changes)}
    settings = validate(TuneConfig, values, str(file) if file is not None else "command line")
    return settings, Path(folder) if folder is not None else None, quiet


def _run(
    stop: Stop,
    config: TuneConfig | None,
    folder: Path | None,
    *,
    quiet: bool,
    json: bool,
    where: Mapping[str, Any] | None = None,
    moved: str | None = None,
) -> None:
    """Begin a run with `config`, or go on with the one in `folder`, with the settings `where` it is computed.

    The server of the latter may have `moved`.
    """
    from bbprompt.run import finished_result, prepare, reopen, tune
    from bbprompt.terminal import Terminal, logging_to, open_console

    console = open_console(quiet)
    with logging_to(console), Terminal(console, stop.check) as terminal, ExitStack() as opened:
        run = None
        if config is None:
            directory, config = reopen(folder or Path(), writable=True)
            config = config.model_copy(update=dict(where or {}))
        else:
            terminal.loading()
            run = prepare(config)
            opened.callback(run.close)
            directory = _claimed(run, folder)
        with directory:
            stop.advice = f"go on with: {command('resume', directory.path)}"
            if directory.finished:
                _log.info("%s: finished already; this is its result", directory.path)
                result = finished_result(directory)
            else:
                if run is None:
                    terminal.loading()
                    run = prepare(config, moved)
                    opened.callback(run.close)
                terminal.directory, terminal.replayed = directory.path, _calls_before(directory)
                # Libraries and model stay to the end: the collector need not look at them at every batch.
                gc.freeze()
                opened.callback(gc.unfreeze)
                result = tune(run, directory, terminal)
    _show(result, directory.path, json)


def _claimed(run: Opened, folder: Path | None) -> RunDirectory:
    """The run's directory: a new one, or the default one if it was begun there before.

    The default name holds a digest of all that decides the result, so what lies there is this very run.
    """
    from bbprompt.run import default_directory
    from bbprompt.store.rundir import MANIFEST, RunDirectory

    path = folder or default_directory(run)
    if folder is None and (path / MANIFEST).is_file():
        _log.info("%s: begun before; going on with it", path)
        return RunDirectory.open(path)
    return RunDirectory.create(path, run.manifest())


def _calls_before(directory: RunDirectory) -> int:
    """Calls in the last whole row of the curve: those that a resumed run does not make again."""
    from bbprompt.store.rundir import CURVE

    if not (directory.path / CURVE).is_file():
        return 0
    rows = directory.read_bytes(CURVE).decode("utf-8", errors="replace").split("\n")[1:-1]
    calls = rows[-1].split(",")[0] if rows else "0"
    return int(calls) if calls.isdecimal() else 0


def _show(result: Result, path: Path, json: bool) -> None:
    if json:
        write_json({**result.model_dump(mode="json"), "run_dir": str(path)})
        return
    from rich.console import Console

    from bbprompt.summary import notes, result_table

    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(result_table(result))
    lines = [line.rstrip() for line in captured.get().rstrip("\n").split("\n")]
    lines += ["", *notes(result), f"Kept in {path}", ""]
    following = command("predict", path, "--input", "texts.jsonl", "--output", "labels.jsonl")
    write("\n".join([*lines, f"Next: {following}"]))
