"""Stopping by a signal."""

from __future__ import annotations

import signal

import pytest

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
    with pytest.raises(Interrupted, match="nothing was begun"):
        stopped_by(FIRST, advice=None, check=False)


def test_other_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), Stop():
        _ = 1 / 0
