"""Populations that are cut into pieces: what the waiting thread notices."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import numpy as np
import pytest

from bbprompt.backends.remote import Pieces
from bbprompt.oracle import Scores

POINTS = np.zeros((3, 2), np.float32)


class Signalled(BaseException):
    """What the handler raises."""


@pytest.fixture
def raising() -> Iterator[None]:
    """SIGUSR1 raises `Signalled` in the main thread."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Signalled

    before = signal.signal(signal.SIGUSR1, handler)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_that_does_not_wake_the_waiting_thread_is_noticed(raising: None) -> None:
    """As one does that comes just before the thread begins to wait, or that another thread takes."""
    gate = threading.Event()
    pieces = Pieces("http://there", 1, patience=60.0)

    def piece(part: np.ndarray) -> Scores:
        time.sleep(0.2)  # until the other one waits
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        gate.wait(20)
        raise AssertionError("nobody waits for this")

    began = time.monotonic()
    try:
        with pytest.raises(Signalled):
            pieces.score(POINTS, 1, piece)
    finally:
        gate.set()
        pieces.close()
    assert time.monotonic() - began < 15
