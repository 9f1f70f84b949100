"""Stopping by a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from bbprompt import cli
from bbprompt.commands import inspect as inspecting
from bbprompt.commands.stop import Stop
from bbprompt.errors import Interrupted

FIRST, SECOND = signal.SIGINT, signal.SIGTERM


def stopped_by(*numbers: signal.Signals, advice: str | None, check: bool) -> None:
    """Receive signals one after the other, then check if so wanted."""
    with Stop() as stop:
        stop.advice = advice
        stop.check()
        for number in numbers:
            signal.raise_signal(number)
        if check:
            stop.check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_acted_upon_at_the_next_check(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name}; resume it"):
        stopped_by(number, advice="resume it", check=True)
    assert "once more" in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_a_signal_is_only_noted() -> None:
    stopped_by(FIRST, advice="resume it", check=False)


def test_a_second_signal_stops_at_once() -> None:
    with pytest.raises(Interrupted, match="SIGTERM; resume it"):
        stopped_by(FIRST, SECOND, advice="resume it", check=False)


def test_before_there_is_anything_to_resume_a_signal_stops_at_once() -> None:
    with pytest.raises(Interrupted, match="no half-written file is left: start again"):
        stopped_by(FIRST, advice=None, check=False)


def test_other_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), Stop():
        _ = 1 / 0


def cleaned_after(between: float) -> list[str]:
    """What a clean-up came to into which a second signal falls, so many seconds after the first."""
    now: list[float] = [0.0]
    done: list[str] = []

    def work() -> None:
        with Stop(lambda: now[0]):
            try:
                signal.raise_signal(FIRST)
            finally:
                now[0] += between
                signal.raise_signal(SECOND)
                done.append("cleaned")

    with pytest.raises(Interrupted):
        work()
    return done


def test_a_second_signal_at_nearly_the_same_instant_does_not_tear_the_clean_up() -> None:
    assert cleaned_after(0.9) == ["cleaned"]


def test_a_later_signal_ends_what_hangs() -> None:
    assert cleaned_after(1.1) == []


def test_a_second_signal_while_the_handlers_are_given_back_keeps_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = signal.signal, []

    def giving_back(number: int, handler: Any) -> Any:
        seen.append(number)
        before = real(number, handler)
        if len(seen) == 3:  # the first two were for entering
            signal.raise_signal(SECOND)
        return before

    monkeypatch.setattr(signal, "signal", giving_back)
    with pytest.raises((Interrupted, KeyboardInterrupt)) as caught:
        stopped_by(FIRST, advice=None, check=False)
    assert caught.type is Interrupted
    assert seen == [FIRST, SECOND] * 2


def test_a_thread_that_can_have_no_signals_may_enter_it() -> None:
    entered = []

    def work() -> None:
        with Stop() as stop:
            stop.check()
            entered.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(entered) == 1


def plainly(value: object) -> None:
    signal.raise_signal(FIRST)


def as_c_code_reports_it(value: object) -> None:
    try:
        signal.raise_signal(FIRST)
    except KeyboardInterrupt:
        raise ImportError("numpy failed to import") from None


def torn(value: object) -> None:
    try:
        signal.raise_signal(FIRST)
    finally:
        signal.raise_signal(SECOND)


@pytest.mark.parametrize("work", [plainly, as_c_code_reports_it, torn])
def test_any_command_that_a_signal_stops_says_so(
    work: Callable[[object], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in (FIRST, SECOND)]
    monkeypatch.setattr(inspecting, "write_json", work)
    assert cli.run(["tasks", "lcqmc", "--json"]) == 75
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stopped by SIG")
    assert err.count("\n") == 1
    assert [signal.getsignal(number) for number in (FIRST, SECOND)] == before
