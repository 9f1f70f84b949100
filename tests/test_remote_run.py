"""Runs on a served model: the numbers of a local run, also when the server is killed on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from servers import TOKEN, free_port, start, stop

from bbprompt import cli
from bbprompt.config import TuneConfig
from bbprompt.errors import OracleError
from bbprompt.result import Result
from bbprompt.run import Prepared, Watcher, prepare, reopen, tune
from bbprompt.store.rundir import RESULT, RunDirectory

pytestmark = pytest.mark.slow


def config(data: Path, prompts: Path, **changes: Any) -> TuneConfig:
    """As on this machine, but in the precision of the server, and without what reads a local model's states."""
    where = {"device": "auto", "dtype": "float32", "baselines": False}
    return tiny_run.config(data, prompts, **(where | changes))


def finish(run: Prepared, folder: Path, watcher: Watcher | None = None) -> Result:
    """Begin, or go on."""
    if folder.exists():
        directory, _ = reopen(folder, writable=True)
    else:
        directory = RunDirectory.create(folder, run.manifest())
    with directory:
        return tune(run, directory, watcher)


class Killer(Watcher):
    """Kills a server after some calls, without a warning."""

    def __init__(self, process: Any, calls: int) -> None:
        self.process, self.calls = process, calls

    def status(self, status: Any) -> None:
        if status.calls >= self.calls:
            self.process.kill()
            self.process.wait()


def numbers(result: Result) -> dict[str, Any]:
    """Everything of a result but where and how long."""
    value = result.model_dump(mode="json", exclude={"seconds", "backend"})
    for stage in value["stages"]:
        del stage["seconds"]
    return value


@pytest.fixture(scope="module")
def local(tiny_pair_data: Path, tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return finish(prepare(config(tiny_pair_data, tiny_prompts)), tmp_path_factory.mktemp("local") / "run")


def test_a_killed_server_ends_the_run_and_a_new_one_ends_it_as_if_nothing_had_been(
    tiny_pair_data: Path,
    tiny_prompts: Path,
    local: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("BBPROMPT_TOKEN", TOKEN)
    port = free_port()
    process, url = start(tiny_prompts, port=port)
    try:
        commands = Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path("/proc/self/cmdline").read_bytes()
        assert b"serve" in commands
        run = prepare(config(tiny_pair_data, tiny_prompts, backend=url, workers=2))
        assert "--workers 2 has no effect: a request takes all candidates" in caplog.text
        whole = finish(run, tmp_path / "whole")
        assert numbers(whole) == numbers(local)
        assert whole.digest == local.digest
        with pytest.raises(OracleError, match="bbprompt resume") as raised:
            finish(run, tmp_path / "killed", Killer(process, 20))
        assert raised.value.exit_code == 69
        run.oracle.close()
        assert not (tmp_path / "killed" / RESULT).exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    words = [sys.executable, "-m", "bbprompt", "resume", str(tmp_path / "killed"), "--json"]
    gone = subprocess.run(words, capture_output=True, text=True, check=False)
    assert gone.returncode == 69
    assert "cannot be reached" in gone.stderr.splitlines()[-1]
    assert "Traceback" not in gone.stderr
    process, _ = start(tiny_prompts, port=port)
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["digest"] == local.digest
        assert cli.run(["report", str(tmp_path / "killed"), "--out", str(tmp_path / "page.html")]) == 0
    finally:
        assert stop(process) == 0
    for name in ("journal.log", "prompt.safetensors"):
        killed, undisturbed = ((tmp_path / folder / name).read_bytes() for folder in ("killed", "whole"))
        assert name == "journal.log" or killed == undisturbed
    # The token stands nowhere: in no file, on no stream, in no page, in nothing that a traceback or a log shows.
    assert len(list(tmp_path.rglob("*.*"))) > 8
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or TOKEN.encode() not in file.read_bytes(), file
    told = capfd.readouterr()
    for text in (told.out, told.err, gone.stdout, gone.stderr, done.stdout, done.stderr, caplog.text):
        assert TOKEN not in text
    for shown in (run, run.oracle, run.config, whole, raised.value):
        assert TOKEN not in f"{shown!r} {shown}"
    assert TOKEN.encode() not in commands
