"""Signals to real processes, and two of them at one run."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_prompt
from processes import rows, start, until
from servers import serving
from tiny_run import finished

from bbprompt import cli
from bbprompt.backends.backbone import load_backbone
from bbprompt.backends.local import LocalOracle
from bbprompt.oracle import Scores
from bbprompt.prompts import ModularPrompt

pytestmark = pytest.mark.slow

INT, TERM = signal.SIGINT, signal.SIGTERM
# Sends signals to its own process just before a module is looked for, which is a known place of the load.
AT_IMPORT = """
import os, sys
module, numbers = sys.argv[1:3]
sys.argv[1:3] = []
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            for number in numbers.split(","):
                os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Hook())
from bbprompt.__main__ import main
main()
"""


def flags(data: Path, prompts: Path, run: Path, budget: int = 600) -> list[str]:
    words = ["tune", "--task", "lcqmc", "--data", str(data), "--prompts", str(prompts), "--run-dir", str(run)]
    words += ["--threads", "1", "--seed", "7", "--dtype", "float32", "--budget", str(budget)]
    return [*words, "--set", "router=null", "--set", "prompt.patience=null"]


def catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal, which Python has none for SIGTERM."""
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("signals", [(INT,), (TERM,), (INT, TERM), (INT, INT)])
@pytest.mark.parametrize("module", ["bbprompt.cli", "torch"])
def test_while_tune_loads(
    module: str, signals: tuple[signal.Signals, ...], tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    numbers = ",".join(str(int(number)) for number in signals)
    process = start(flags(tiny_pair_data, tiny_prompts, tmp_path / "run"), ("-c", AT_IMPORT, module, numbers))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert out == ""
    assert "Traceback" not in err
    assert re.fullmatch(r"stopped by SIG(INT|TERM); no half-written file is left: start again", err.splitlines()[-1])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [INT, TERM])
@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["eval", "run"], "bbprompt.predict"),
        (["predict", "run", "--input", "in.jsonl", "--output", "-"], "bbprompt.predict"),
        (["export", "run", "--format", "safetensors", "--out", "out"], "bbprompt.export"),
        (["report", ".", "--out", "out.html"], "bbprompt.report"),
        (["compare", "run", "--out", "out"], "bbprompt.compare"),
        (["pretrain", "mp2", "--config", "mp2-shallow"], "bbprompt.pretrain.run"),
        (
            ["sweep", "--tasks", "lcqmc", "--methods", "majority", "--seeds", "1", "--out", "out"],
            "bbprompt.sweep.runner",
        ),
        (["serve"], "bbprompt.serve.server"),
        (["doctor"], "bbprompt.doctor"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_while_any_command_begins(words: list[str], module: str, number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", AT_IMPORT, module, str(int(number)), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 75, process.stderr
    assert "Traceback" not in process.stderr
    assert re.match(rf"stopped by {number.name}; ", process.stderr.splitlines()[-1])
    assert process.stdout == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_signal_when_all_is_said_changes_nothing(number: signal.Signals) -> None:
    # What is registered first is called last: as late as can be, just before Python gives up its handlers.
    late = f"import atexit, os; atexit.register(lambda: os.kill(os.getpid(), {int(number)}))\n"
    process = start(["tasks", "lcqmc"], ("-c", late + "from bbprompt.__main__ import main\nmain()"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "lcqmc" in out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_two_signals_from_outside_while_tune_loads(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    process = start(flags(tiny_pair_data, tiny_prompts, tmp_path / "run"))
    until(process, lambda: catches(process, TERM))
    for number in (INT, TERM):
        process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert err.splitlines()[-1].endswith("; no half-written file is left: start again")


class Held(LocalOracle):
    """A model that lets a caller wait, from some call on."""

    free = 5

    def __init__(self, prompts: Path) -> None:
        prompt = ModularPrompt.load(prompts)
        super().__init__(load_backbone(prompt.config.backbone), prompt)
        self.waits, self.gate = threading.Event(), threading.Event()

    def score(self, *request: Any) -> Scores:
        self.free -= 1
        if self.free < 0:
            self.waits.set()
            self.gate.wait(60)
        return super().score(*request)


@pytest.mark.parametrize("signals", [(INT, INT), (TERM, INT), (INT, TERM)])
def test_a_second_signal_does_not_wait_for_a_call_that_is_under_way(
    signals: tuple[signal.Signals, ...], tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    oracle, run = Held(tiny_prompts), tmp_path / "run"
    with serving(oracle) as url:
        process = start([*flags(tiny_pair_data, tiny_prompts, run), "--backend", url])
        try:
            assert oracle.waits.wait(60)
            process.send_signal(signals[0])
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)  # the call is waited for; and what comes within a second is the same wish
            process.send_signal(signals[1])
            out, err = process.communicate(timeout=30)
            assert not oracle.gate.is_set(), "it ended before the call did"
        finally:
            oracle.gate.set()
            process.kill()
    assert (process.returncode, out) == (75, ""), err
    assert err.splitlines()[-1] == f"stopped by {signals[1].name}; go on with: bbprompt resume {run}"
    assert "Traceback" not in err


@pytest.mark.parametrize("signals", [(INT,), (TERM,)])
def test_a_run_that_is_stopped_and_resumed_ends_as_if_undisturbed(
    signals: tuple[signal.Signals, ...],
    tiny_pair_data: Path,
    tiny_prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    words = flags(tiny_pair_data, tiny_prompts, run)
    process = start(words)
    until(process, lambda: rows(run) > 3)
    # It cannot go on or end while others try to work on the same run.
    process.send_signal(signal.SIGSTOP)
    try:
        assert cli.run(["resume", str(run)]) == 75
        assert f"{run}: another process (pid {process.pid}) works on this run; wait" in last_line(capsys)
        assert cli.run(words) == 2
        assert f"{run}: this run was begun already; go on with `bbprompt resume {run}`" in last_line(capsys)
        for number in signals:
            process.send_signal(number)
    finally:
        process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert out == ""
    assert err.splitlines()[-1] == f"stopped by {signals[0].name}; go on with: bbprompt resume {run}"
    assert not (run / "result.json").exists()
    (tmp_path / "in.jsonl").write_text('{"text_a": "a", "text_b": "b"}\n', encoding="utf-8")
    assert cli.run(["predict", str(run), "--input", str(tmp_path / "in.jsonl"), "--output", "-"]) == 2
    assert f"{run / 'prompt.safetensors'}: not there, for this run is not finished" in last_line(capsys)
    assert cli.run(["resume", str(run), "--quiet"]) == 0
    assert cli.run([*flags(tiny_pair_data, tiny_prompts, tmp_path / "alone"), "--quiet"]) == 0
    assert digest(run) == digest(tmp_path / "alone")


def test_of_two_that_begin_one_run_at_once_one_does(tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = flags(tiny_pair_data, tiny_prompts, run, budget=300)
    pair = [start(words) for _ in range(2)]
    said = [process.communicate(timeout=240)[1] for process in pair]
    codes = [process.returncode for process in pair]
    assert sorted(codes)[0] == 0, said
    loser = codes.index(max(codes))
    expected = {2: "this run was begun already; go on with `bbprompt resume", 75: "works on this run; wait for it or"}
    assert expected[codes[loser]] in said[loser].splitlines()[-1]
    assert "Traceback" not in said[loser]
    assert cli.run([*flags(tiny_pair_data, tiny_prompts, tmp_path / "alone", budget=300), "--quiet"]) == 0
    assert digest(run) == digest(tmp_path / "alone")


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_stopped_predict_leaves_what_was_there(
    number: signal.Signals, tiny_pair_data: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    run = finished(tmp_path / "run", tiny_pair_data, tiny_prompts)
    record = json.dumps(tiny_prompt.pair_records(1, 6)[0], ensure_ascii=False) + "\n"
    (tmp_path / "in.jsonl").write_text(record * 100_000, encoding="utf-8")
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "out.jsonl").write_text("old\n", encoding="utf-8")
    words = ["--input", str(tmp_path / "in.jsonl"), "--output", str(folder / "out.jsonl"), "--threads", "1"]
    process = start(["predict", str(run), *words])
    until(process, lambda: any(path.stat().st_size for path in folder.glob(".out.jsonl.*.tmp")))
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert out == ""
    assert err.splitlines()[-1] == f"stopped by {number.name}; no half-written file is left: start again"
    assert [path.name for path in folder.iterdir()] == ["out.jsonl"]
    assert (folder / "out.jsonl").read_text(encoding="utf-8") == "old\n"


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def digest(run: Path) -> str:
    found: str = json.loads((run / "result.json").read_text(encoding="utf-8"))["digest"]
    return found
