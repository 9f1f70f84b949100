"""A process beside this one that answers a question while this one waits for a model elsewhere.

A process and no thread: it does not take turns with the interpreter that hands out work, and the number of threads,
which decides last digits, is its own. So are the libraries that fit, which take seconds to load.
`python -m bbprompt.optimizers.aside` is that process; it ends when its input does.
"""

from __future__ import annotations

import logging
import struct
import subprocess
import sys
import weakref
from contextlib import suppress
from threading import Thread
from typing import IO

import numpy as np
from numpy.typing import NDArray

from bbprompt.optimizers.proposal import Fits, Question

__all__ = ["Aside"]

_LENGTH = struct.Struct("<Q")

_log = logging.getLogger("bbprompt")


class Aside:
    """At most one question at a time.

    What comes back never depends on the process: where it is gone or was asked something else, the answer is worked
    out here.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: bytes | None = None
        self._fits = Fits()
        self._failed = False

    def start(self) -> None:
        """Start the process, so that it is ready when the first question comes; it may run already."""
        if self._process is None and not self._failed:
            try:
                # A session of its own: Ctrl-C reaches this process alone, which ends that one.
                self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                    [sys.executable, "-m", __name__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,
                )
            except OSError as error:
                self._fail(str(error))
            else:
                weakref.finalize(self, _end, self._process)

    def begin(self, question: Question) -> None:
        """Have a question answered from now on; one that was begun before and not fetched must be fetched first."""
        self.start()
        if self._process is None or self._failed or self._asked is not None:
            return
        self._asked = question.encode()
        # The process may be at its libraries still, and reads nothing before; one that is gone shows at the answer.
        Thread(target=_sent, args=(_stream(self._process.stdin), self._asked), daemon=True).start()

    def answer(self, question: Question) -> NDArray[np.float64]:
        """The answer `(n, dim)`, at once if it is ready; waits for the process if it is at it."""
        asked, self._asked = self._asked, None
        if asked is not None and self._process is not None:
            reply = _receive(_stream(self._process.stdout))
            if reply is None:
                self._fail(f"it ended with status {self._process.wait()}")
            elif asked == question.encode():
                return np.frombuffer(reply).reshape(-1, question.taken.shape[1]).copy()
        return question.answer(self._fits)

    def _fail(self, reason: str) -> None:
        _log.warning("the process that proposes beside this one was lost (%s); proposals are made in turn", reason)
        self._failed, self._asked = True, None
        if self._process is not None:
            _end(self._process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it, whatever it does now; twice is harmless."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:  # what was to be sent to it when it ended
                continue


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    """A pipe that `Popen` was asked for."""
    if stream is None:
        raise ValueError("the process was started without pipes")
    return stream


def _send(stream: IO[bytes], data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _sent(stream: IO[bytes], data: bytes) -> None:
    """Send a message as long as there is somebody at the other end."""
    with suppress(OSError, ValueError):  # ValueError: closed on this side since
        _send(stream, data)


def _receive(stream: IO[bytes]) -> bytes | None:
    """A message, or None where the other end is closed."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    data = stream.read(length := _LENGTH.unpack(head)[0])
    return data if len(data) == length else None


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    from bbprompt.optimizers import fitting  # noqa: F401  loaded before there is a question

    fits = Fits()
    while (data := _receive(questions)) is not None:
        _send(answers, Question.decode(data).answer(fits).tobytes())


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
