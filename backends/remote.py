"""What the oracles of all remote servers share: populations cut into pieces, and models that describe themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import fields
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from bbprompt.errors import OracleError
from bbprompt.oracle import OracleInfo, ReadoutKind, Scores

__all__ = ["Pieces", "read_info", "read_size"]

_LOOK = 0.5  # seconds after which a waiting thread looks up


class Pieces:
    """Scores populations piece by piece.

    The number of workers decides how many pieces are under way, not what a piece is: replies do not depend on it.

    Args:
        url: Of the server, for messages.
        workers: Most pieces at once.
        patience: Seconds that one piece may take, all tries together.
    """

    def __init__(self, url: str, workers: int, patience: float) -> None:
        self._url, self._workers, self._patience = url, workers, patience
        self._threads = ThreadPoolExecutor(workers, "remote-oracle")

    def score(self, points: NDArray[np.float32], size: int, piece: Callable[[NDArray[np.float32]], Scores]) -> Scores:
        """Scores of `points`, cut into pieces of `size`, in their order.

        Raises:
            OracleError: A piece failed, or there is no answer in time.
        """
        ended = threading.Event()

        def unless_ended(part: NDArray[np.float32]) -> Scores:
            if ended.is_set():
                raise OracleError("not sent, because an earlier piece failed")
            try:
                return piece(part)
            except BaseException:
                ended.set()  # here, in the thread that would begin the next piece
                raise

        parts = [points[begin : begin + size] for begin in range(0, len(points), size)]
        running = [self._threads.submit(unless_ended, part) for part in parts]
        # A bound even for a server that drips its headers, which no single read times out at.
        turns = -(-len(running) // self._workers)
        done, late = _settled(running, turns * self._patience)
        failed = [future for future in running if future in done and future.exception() is not None]
        if failed or late:
            ended.set()
            for future in running:
                future.cancel()
        if failed:
            failed[0].result()
        if late:
            raise OracleError(f"{self._url}: no answer in time; check the server, then go on with `bbprompt resume`")
        return _joined([future.result() for future in running])

    def close(self) -> None:
        """Begin no more pieces; safe to call twice."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _settled(running: list[Future[Scores]], seconds: float) -> tuple[set[Future[Scores]], set[Future[Scores]]]:
    """Wait until all is done, one has failed or the time is over.

    It looks up now and then: a signal that comes just before a thread begins to wait does not wake it, and would go
    unnoticed until the wait ends.
    """
    ends = time.monotonic() + seconds
    while True:
        left = ends - time.monotonic()
        done, late = wait(running, max(min(left, _LOOK), 0.0), FIRST_EXCEPTION)
        if left <= _LOOK or not late or any(future.exception() is not None for future in done):
            return done, late


def read_info(model: Any) -> OracleInfo:
    """A model's description, as parsed from JSON.

    Raises:
        ValueError, TypeError, LookupError: It is none.
    """
    # What may be unknown is 0, and is not said by a server of before it was asked for.
    values = {
        field.name: _typed(model.get(field.name, 0), "int", 0)
        if field.default == 0
        else _typed(model[field.name], str(field.type))
        for field in fields(OracleInfo)
    }
    return OracleInfo(**values)


def read_size(value: Any) -> int:
    """A limit of a server, at least 1.

    Raises:
        ValueError: It is none.
    """
    return int(_typed(value, "int"))


def _typed(value: Any, kind: str, least: int = 1) -> Any:
    if kind == "ReadoutKind" and value in get_args(ReadoutKind):
        return value
    if type(value).__name__ != kind or (kind == "int" and value < least) or (kind == "str" and not value.isprintable()):
        raise ValueError
    return value


def _joined(parts: list[Scores]) -> Scores:
    best = [part.best for part in parts if part.best is not None]
    if any(part.cut != parts[0].cut for part in parts):
        raise OracleError("the server cut the same texts differently for different candidates")
    return Scores(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.normalizer for part in parts]),
        np.concatenate(best) if best else None,
        parts[0].cut,
    )
