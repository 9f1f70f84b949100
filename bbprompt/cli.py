"""The command line: `bbprompt COMMAND`. Each command's module imports what is heavy when it runs.

An error is one line on standard error, and the exit code says of which kind it is (see `bbprompt.errors`).
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from bbprompt import __version__
from bbprompt.commands import compare, doctor, export, exportserver, inspect, pretrain, report, serve, sweep, tune, use
from bbprompt.commands.stop import Stop
from bbprompt.errors import BBPromptError, Interrupted
from bbprompt.oneline import one_line

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="bbprompt",
    help="Tune the prompt of a frozen language model that you can only call forward.",
    add_completion=False,
    rich_markup_mode=None,
)
_TYPER_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt, without a word
_pretrain = typer.Typer(help="Train prompts with gradients, once, for many tasks.", rich_markup_mode=None)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"bbprompt {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command()(tune.tune)
app.command()(tune.resume)
app.command("eval")(use.evaluate)
app.command()(use.predict)
app.add_typer(_pretrain, name="pretrain")
_pretrain.command()(pretrain.mp2)
_pretrain.command()(pretrain.spot)
_pretrain.command()(pretrain.ppt)
_pretrain.command("lm-head")(pretrain.lm_head)
app.command()(sweep.sweep)
app.command()(compare.compare)
app.command()(report.report)
app.command()(export.export)
app.command()(inspect.tasks)
app.command()(inspect.methods)
app.command()(doctor.doctor)
app.command()(serve.serve)
app.command("export-server")(exportserver.export_server)


@_pretrain.callback()
def _pretrain_root() -> None:
    pass


def main(stop: Stop | None = None) -> None:
    """Run the command that the process was called with, and end it with the right exit code; `stop` as for `run`."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream may be replaced by one that cannot do this
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:], stop))


def run(arguments: Sequence[str], stop: Stop | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows `bbprompt`; nothing asks for help.
        stop: What signals do, already entered; by default one of the command's own.

    Returns:
        The exit code; the message of an error is on standard error.
    """
    if stop is None:
        with Stop() as own:
            return run(arguments, own)
    debug = "--debug" in arguments
    try:
        code = app(list(arguments) or ["--help"], prog_name="bbprompt", standalone_mode=False, obj=stop)
        if code == _TYPER_INTERRUPTED:
            return _stopped(stop, debug)
        return code if isinstance(code, int) else 0
    except BBPromptError as error:
        _say(str(error) if type(error) is Interrupted else f"error: {error}", debug)
        return error.exit_code
    except typer.TyperException as error:
        _say(f"error: {error.format_message()}{_hint(error)}", debug)
        return error.exit_code
    except typer.Abort:
        _say("error: aborted", debug)
        return 1
    except Exception as error:  # the outermost boundary: whatever comes here is a bug and is reported as one
        if stop.raised:  # or a module that was stopped while it was imported, which C code reports in its own way
            return _stopped(stop, debug)
        _say(
            f"error: {type(error).__name__}: {error} (a bug; please report it with the output of --debug)",
            debug,
        )
        return 1


def _stopped(stop: Stop, debug: bool) -> int:
    error = stop.interrupted()
    _say(str(error), debug)
    return error.exit_code


def _hint(error: typer.TyperException) -> str:
    """Where the flags of the command that was meant are explained."""
    context = getattr(error, "ctx", None)
    return f" (see `{context.command_path} --help`)" if context is not None else ""


def _say(message: str, debug: bool) -> None:
    """One line on standard error, behind the traceback if that is wanted."""
    if debug:
        traceback.print_exc()
    sys.stderr.write(one_line(message) + "\n")
