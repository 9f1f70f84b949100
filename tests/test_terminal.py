"""What a person sees, on a terminal and elsewhere."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bbprompt.config import TuneConfig
from bbprompt.errors import Interrupted
from bbprompt.run import Prepared, prepare
from bbprompt.search.tuner import Status
from bbprompt.terminal import Meter, Terminal, duration, facts, logging_to


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def console(terminal: bool, quiet: bool = False) -> Console:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=80, quiet=quiet, highlight=False, color_system=None)


def text(shown: Console) -> str:
    file = shown.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.fixture(scope="module")
def prepared(tiny_pair_data: Path, tiny_prompts: Path) -> Prepared:
    return prepare(TuneConfig(task="lcqmc", data=str(tiny_pair_data), prompts=str(tiny_prompts), threads=1))


@pytest.fixture(scope="module")
def on_sample(tiny_prompts: Path) -> Prepared:
    return prepare(TuneConfig(task="lcqmc", data="sample", prompts=str(tiny_prompts), threads=1))


def test_facts_tell_what_runs(prepared: Prepared, tiny_pair_data: Path) -> None:
    told = dict(facts(prepared, Path("runs/x")))
    assert told["data"] == f"{tiny_pair_data}: 32 train, 32 dev, 30 test"
    assert told["budget"] == "8000 calls, seed 42"
    assert told["task"] == "lcqmc (pair, 2 labels, accuracy)"
    assert "K = 3, d = 4, P = 2" in told["prompts"]
    assert "1 threads" in told["device"]
    assert told["directory"] == "runs/x"
    assert list(told) == ["model", "prompts", "task", "data", "method", "budget", "device", "directory"]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_sample_is_called_one(terminal: bool, on_sample: Prepared) -> None:
    shown = console(terminal)
    with Terminal(shown) as watcher:
        watcher.prepared(on_sample)
    assert "bundled SAMPLE" in text(shown)


def test_a_run_elsewhere_than_on_a_terminal(prepared: Prepared) -> None:
    shown, clock = console(terminal=False), Clock()
    with Terminal(shown, clock=clock) as watcher:
        watcher.loading()
        watcher.prepared(prepared)
        start = len(text(shown).splitlines())
        for step in range(1, 101):
            clock.now = float(step)
            watcher.status(Status(10 * step, "router" if step <= 50 else "prompt", 0.5, 0.75))
        watcher.testing(64, 100)
        watcher.testing(128, 100)
    lines = text(shown).splitlines()[start:]
    # The first of each stage, then every 30 seconds; and the test split at its start and end.
    assert [line.split(":")[0].split("] ")[1] for line in lines] == ["router"] * 2 + ["prompt"] * 2 + ["test"] * 2
    assert lines[1] == (
        "[    31 s] router: 310/8000 calls, best train loss 0.5000, best dev 0.750, 10.0 calls/s, at most 13 min left"
    )
    assert lines[-1].endswith("test: 100/100 examples")
    assert "\x1b" not in text(shown)
    assert "\r" not in text(shown)


def test_a_run_on_a_terminal(prepared: Prepared) -> None:
    shown, clock = console(terminal=True), Clock()
    with Terminal(shown, clock=clock) as watcher:
        watcher.prepared(prepared)
        clock.now = 10.0
        watcher.status(Status(7999, "prompt", 0.5, 0.75))
        watcher.testing(64, 100)
    assert "bbprompt tune" in text(shown)
    assert " 7999/8000 calls, train 0.5000, dev 0.750, 799.9/s, ≤ 0 s left" in text(shown)
    assert "64/100 examples" in text(shown)


def test_quiet_is_silent(prepared: Prepared) -> None:
    for terminal in (False, True):
        shown = console(terminal, quiet=True)
        with Terminal(shown) as watcher:
            watcher.loading()
            watcher.prepared(prepared)
            watcher.status(Status(10, "router", 0.5, 0.75))
            watcher.testing(64, 100)
        assert text(shown) == ""


def test_replayed_calls_say_nothing_about_speed(prepared: Prepared) -> None:
    shown, clock = console(terminal=False), Clock()
    with Terminal(shown, clock=clock) as watcher:
        watcher.replayed = 1000
        watcher.prepared(prepared)
        for calls in range(100, 1001, 100):
            clock.now += 0.01
            watcher.status(Status(calls, "router", 0.5, 0.75))
        clock.now += 40.0
        watcher.status(Status(1040, "router", 0.5, 0.75))
    assert "1.0 calls/s" in text(shown).splitlines()[-1]


def test_speed_is_that_of_the_last_minute(prepared: Prepared) -> None:
    shown, clock = console(terminal=False), Clock()
    with Terminal(shown, clock=clock) as watcher:
        watcher.prepared(prepared)
        for step in range(1, 200):
            clock.now = float(step)
            watcher.status(Status(min(step, 100) + 5 * max(step - 100, 0), "router", 0.5, 0.75))
    assert " 5.0 calls/s" in text(shown).splitlines()[-1]


def test_a_log_line_of_a_server_is_one_line() -> None:
    shown = console(terminal=False)
    with logging_to(shown):
        logging.getLogger("bbprompt").warning("server: %s", "ok\n[  9999 s] prompt: 8000/8000 calls\x1b]0;title\x07")
    assert text(shown) == "warning: server: ok [ 9999 s] prompt: 8000/8000 calls\\x1b]0;title\\x07\n"


def test_what_check_raises_stops_the_run(prepared: Prepared) -> None:
    def stop() -> None:
        raise Interrupted("enough")

    with Terminal(console(terminal=False), stop) as watcher:
        watcher.prepared(prepared)
        with pytest.raises(Interrupted):
            watcher.status(Status(10, "router", 0.5, 0.75))
        with pytest.raises(Interrupted):
            watcher.testing(64, 100)


def test_a_meter_without_a_total() -> None:
    shown, clock = console(terminal=False), Clock()
    meter = Meter(shown, None, clock)
    for done in (1, 2, 3):
        clock.now += 20.0
        meter.update("predict", done, "texts")
    meter.close()
    meter.close()
    assert text(shown).splitlines() == ["[    20 s] predict: 1 texts", "[    60 s] predict: 3 texts"]


def test_the_log_goes_through_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    log, shown = logging.getLogger("bbprompt.somewhere"), console(terminal=False)
    level = logging.getLogger("bbprompt").level
    with logging_to(shown):
        log.info("one [line] %s", "x" * 100)
        log.warning("two")
    log.warning("three")
    assert text(shown) == f"one [line] {'x' * 100}\nwarning: two\n"
    assert logging.getLogger("bbprompt").level == level
    with logging_to(console(terminal=False, quiet=True)):
        log.info("four")
        log.warning("five")
    assert capsys.readouterr().err == "warning: five\n"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (89.6, "90 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_facts_name_a_hub(prepared: Prepared) -> None:
    class Hub:
        source, id = "hub", "owner/name@abc"

    told = dict(facts(replace(prepared, data=Hub()), None))  # type: ignore[arg-type]
    assert told["data"].startswith("hub owner/name@abc: ")
    assert told["directory"] == "none"
