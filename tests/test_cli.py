"""The command line as a whole: help, errors and exit codes. The commands have tests of their own."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import typer

import bbprompt
from bbprompt import cli, errors
from bbprompt.commands import inspect as inspecting


def _paths(group: Any, before: str = "") -> list[str]:
    """Every command as it is typed, a group before what is in it."""
    found = []
    for name, command in group.commands.items():
        found.append(f"{before}{name}")
        if hasattr(command, "commands"):
            found += _paths(command, f"{before}{name} ")
    return found


COMMANDS = _paths(typer.main.get_command(cli.app))
#: What the contract names.
PROMISED = {"tune", "resume", "eval", "predict", "sweep", "compare", "report", "serve", "export", "tasks", "methods"}
PROMISED |= {"doctor", "pretrain mp2", "pretrain ppt", "pretrain spot"}


def test_the_promised_commands_are_there() -> None:
    assert set(COMMANDS) >= PROMISED


@pytest.mark.parametrize("words", ["", *COMMANDS])
def test_help(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*words.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"Usage: bbprompt {words}".rstrip())
    assert err == ""
    if words and words != "pretrain":
        assert "--json" in out
        assert "--debug" in out


def test_no_arguments_show_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  {command.split()[0]} " in out
    assert "..." not in out.partition("Commands:")[2], "a summary is cut off"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"bbprompt {bbprompt.__version__}\n"


@pytest.mark.parametrize("words", ["", *COMMANDS])
def test_help_loads_nothing_heavy(words: str) -> None:
    code = (
        "import sys; from bbprompt.cli import run; run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'ray', 'botorch', 'cma', 'scipy', 'numpy', 'rich', 'matplotlib', 'fastapi'};"
        "found = heavy & set(sys.modules); sys.exit(repr(found) if found else 0)"
    )
    words += " --help"
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tune --bogus", "No such option: --bogus (see `bbprompt tune --help`)"),
        ("tune --device tpu", "--device"),
        ("tune --budget many", "--budget"),
        ("tune", "--task is missing"),
        ("tune --task nowhere", "no bundled task 'nowhere'"),
        ("tune --task lcqmc --method mp3-deep", "did you mean 'mp2-deep'"),
        ("tune --task lcqmc --set sigma", "--set sigma"),
        ("tune --task lcqmc --budget 0", "--budget 0"),
        ("tune --task lcqmc --budget -5", "--budget -5"),
        ("tune --task lcqmc --seed -1", "seed"),
        ("tune --task lcqmc --config nowhere.yaml", "nowhere.yaml: no such file"),
        ("resume", "RUN_DIR"),
        ("resume nowhere", "no such run directory"),
        ("eval nowhere", "no such run directory"),
        ("eval nowhere --split all", "--split"),
        ("pretrain", "Missing command"),
        ("pretrain mp2", "--config is missing"),
        ("pretrain mp2 --config mp2-deeep", "did you mean 'mp2-deep'"),
        ("pretrain mp2 --resume a --out b", "--out"),
        ("tasks lcmc", "did you mean 'lcqmc'"),
        ("methods mp2-deep --set prompt.sigm=1", "prompt.sigm"),
        ("serve --host 0.0.0.0", "set BBPROMPT_TOKEN"),
        ("serve --port 0 --tls-key nowhere.pem", "go together"),
        ("serve --port 0 --tls-key nowhere.pem --tls-cert nowhere.pem", "nowhere.pem"),
        ("tune --task lcqmc --backend ftp://a", "expected local, http://HOST:PORT"),
        ("tune --task lcqmc --backend http://a --device cpu", "--device"),
        ("tune --task lcqmc --workers 0", "workers"),
        ("frobnicate", "frobnicate"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in err


ERRORS = [getattr(errors, name) for name in errors.__all__]
CODES = {"BBPromptError": 1, "UsageError": 2, "DataError": 65, "ArtifactError": 65, "OracleError": 69, "DiskError": 74}
CODES |= {"JournalCorrupt": 74, "Interrupted": 75, "RunLocked": 75, "TextError": 65, "ResumeMismatch": 78}


@pytest.mark.parametrize("kind", ERRORS, ids=errors.__all__)
def test_each_error_has_its_code(
    kind: type[errors.BBPromptError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(value: object) -> None:
        raise kind("what is wrong:\n where, what to do")

    monkeypatch.setattr(inspecting, "write_json", fail)
    assert cli.run(["tasks", "lcqmc", "--json"]) == CODES[kind.__name__]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("what is wrong: where, what to do\n")
    assert len(err.splitlines()) == 1


def test_an_error_forges_no_line_and_moves_no_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(value: object) -> None:
        raise errors.OracleError("the server says: \x1b[2K\rdone\u2028error: \u202eno 中文\u3000字 \U0001f600")

    monkeypatch.setattr(inspecting, "write_json", fail)
    assert cli.run(["tasks", "lcqmc", "--json"]) == 69
    assert capsys.readouterr().err == "error: the server says: \\x1b[2K done error: \\u202eno 中文 字 \U0001f600\n"


def test_a_bug_is_reported_as_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(value: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(inspecting, "write_json", fail)
    assert cli.run(["tasks", "--json"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "ZeroDivisionError: oops" in err
    assert "please report" in err
    assert cli.run(["tasks", "--json", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_bug() -> None:
    # The output of 50 tasks fits a pipe, so the reader is gone before it is written.
    code = "import sys; sys.stdin.read(); from bbprompt.cli import main; sys.argv = ['bbprompt', 'tasks']; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 74
    assert err == "error: standard output: cannot be written: Broken pipe\n"


def test_the_console_script_runs_in_a_plain_locale() -> None:
    code = "from bbprompt.cli import main; import sys; sys.argv = ['bbprompt', 'tasks', 'lcqmc', *sys.argv[1:]]; main()"
    env = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    for more in ([], ["--json"]):
        done = subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        assert "\\u" in done.stdout


def test_every_flag_of_the_settings_is_a_flag_of_tune(capsys: pytest.CaptureFixture[str]) -> None:
    from bbprompt.config import TuneConfig

    cli.run(["tune", "--help"])
    out = capsys.readouterr().out
    for name in itertools.chain(TuneConfig.model_fields, ["run_dir", "config", "quiet"]):
        assert f"--{name.replace('_', '-')} " in out, name
