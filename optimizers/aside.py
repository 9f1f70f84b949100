"""A process beside this one that answers a question while this one waits for a model elsewhere.

A process and no thread: it does not take turns with the interpreter that hands out work, and the number of threads,
which decides last digits, is its own. It fits hyperparameters as well, once the libraries for that are loaded, which
takes seconds; what must be fitted before is fitted here. `python -m bbprompt.optimizers.aside` is that process; it ends
when its input does.
"""

from __future__ import annotations

import logging
import select
import struct
import subprocess
import sys
import weakref
from contextlib import suppress
from threading import Lock, Thread
from typing import IO

import numpy as np
from numpy.typing import NDArray

from bbprompt.optimizers.posterior import Hyperparameters
from bbprompt.optimizers.proposal import Fits, Question

__all__ = ["Aside"]

_LENGTH = struct.Struct("<Q")
_LOADED = b"loaded"  # what the process says once it can fit; no answer, whose length is a multiple of 8

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
        self._failed = self._fitting = False

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
        hyper = self._fits.known(question)
        if hyper is None and not self._fits_there():
            hyper = self._fits.of(question)
        messages = (b"" if hyper is None else _packed(hyper), self._asked)
        # The process may be at its libraries and slow to read; one that is gone shows at the answer.
        Thread(target=_sent, args=(_stream(self._process.stdin), messages), daemon=True).start()

    def answer(self, question: Question) -> NDArray[np.float64]:
        """The answer `(n, dim)`, at once if it is ready; waits for the process if it is at it."""
        asked, self._asked = self._asked, None
        if asked is not None and self._process is not None:
            replies = _stream(self._process.stdout)
            reply = _receive(replies)
            if reply == _LOADED:
                self._fitting, reply = True, _receive(replies)
            if reply is None:
                self._fail(f"it ended with status {self._process.wait()}")
            elif asked == question.encode():
                return np.frombuffer(reply).reshape(-1, question.taken.shape[1]).copy()
        return question.answer(self._fits)

    def _fits_there(self) -> bool:
        """Whether the process has said that it can fit."""
        if not self._fitting and self._process is not None:
            replies = _stream(self._process.stdout)
            if select.select([replies], [], [], 0)[0]:
                self._fitting = _receive(replies) == _LOADED
        return self._fitting

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


def _sent(stream: IO[bytes], messages: tuple[bytes, ...]) -> None:
    """Send messages as long as there is somebody at the other end."""
    with suppress(OSError, ValueError):  # ValueError: closed on this side since
        for data in messages:
            _send(stream, data)


def _packed(hyper: Hyperparameters) -> bytes:
    return np.array([hyper.noise, hyper.mean, *hyper.lengthscale]).tobytes()


def _unpacked(data: bytes) -> Hyperparameters:
    noise, mean, *lengthscale = np.frombuffer(data).tolist()
    return Hyperparameters(np.array(lengthscale), noise, mean)


def _receive(stream: IO[bytes]) -> bytes | None:
    """A message, or None where the other end is closed."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    data = stream.read(length := _LENGTH.unpack(head)[0])
    return data if len(data) == length else None


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    fits, turn = Fits(), Lock()

    def load() -> None:
        from bbprompt.optimizers import fitting  # noqa: F401

        with turn:
            _send(answers, _LOADED)

    Thread(target=load, daemon=True).start()
    while (hyper := _receive(questions)) is not None and (data := _receive(questions)) is not None:
        question = Question.decode(data)
        if hyper:
            fits.keep(question, _unpacked(hyper))
        found = question.answer(fits).tobytes()
        with turn:
            _send(answers, found)


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
