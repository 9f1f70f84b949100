"""The one model of a server: requests take turns at it, and a repeated request is not computed twice.

Requests of several clients are not put into one forward unless the server is told to: floating point sums depend on
what is computed together, and a reply should not depend on who else is asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bbprompt.errors import DataError, OracleError
from bbprompt.oracle import Oracle, OracleInfo, Support, TextBatch, can_count, check_scores
from bbprompt.serve.metrics import Metrics
from bbprompt.serve.settings import ServeSettings
from bbprompt.serve.turns import Turn, shares, take
from bbprompt.tasks.example import Form, Part
from bbprompt.wire import ScoreRequest, encode_reply

__all__ = ["Full", "OtherRequest", "Scorer"]

_log = logging.getLogger("bbprompt")

_FRESH = 2.0  # seconds in which a forward that worked proves that the model works
_COUNTED = 256  # batches whose tokens are remembered
#: A text that every readout can be asked about: two options, and a gap for one of them.
_PROBE = TextBatch((Form((Part("?", cut=True),), ("a", "b"), -1, gap=1),))


class OtherRequest(ValueError):
    """A call id that was used for another request."""


class Full(Exception):
    """As many requests wait for the model as may."""


class Scorer:
    """Answers requests with an oracle, one after the other, in a thread of its own.

    Args:
        oracle: The model.
        settings: What it may keep and how long a forward may take, before it counts as one that never ends.
        metrics: Where calls are counted.
    """

    def __init__(self, oracle: Oracle, settings: ServeSettings, metrics: Metrics) -> None:
        self._oracle, self._metrics = oracle, metrics
        self._most, self._deadline = settings.replies, settings.deadline
        self._room = settings.at_once
        self._together = settings.points if settings.together else 0
        self._thread = ThreadPoolExecutor(1, "model")
        self._waiting: deque[Turn] = deque()
        self._work: asyncio.Task[None] | None = None
        self._running: dict[str, tuple[bytes, asyncio.Future[bytes]]] = {}
        self._replies: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()
        self._counted: dict[tuple[str, Support], int] = {}
        self._size = 0
        self._parted = False  # whether it was said that a forward for several requests failed
        self._worked = -float("inf")
        self._began: float | None = None  # when the forward that is running began

    @property
    def info(self) -> OracleInfo:
        """What the model is."""
        return self._oracle.info

    async def score(self, request: ScoreRequest, batch: TextBatch) -> bytes:
        """The reply to a request, computed now, computed before, or being computed for somebody who left.

        Raises:
            OtherRequest: The call id belongs to another request.
            Full: Too many requests wait, those included whose clients gave them up.
            TextError: A text does not fit the model.
            OracleError: Points are not finite, or the model answers what it must not.
        """
        print_ = _fingerprint(request)
        known, reply = self._running.get(request.call_id), self._replies.get(request.call_id)
        if (known or reply or (print_,))[0] != print_:
            raise OtherRequest("this call_id was used for another request")
        if known is not None or reply is not None:
            self._metrics.repeated.inc()
        if reply is not None:
            self._replies.move_to_end(request.call_id)
            return reply[1]
        if known is None:
            # Whoever gives a request up may come again for its reply, so it is still computed.
            if len(self._waiting) >= self._room:
                raise Full
            future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            known = self._running[request.call_id] = (print_, future)
            self._metrics.waiting.inc()
            future.add_done_callback(functools.partial(self._done, request.call_id, print_))
            self._waiting.append(Turn(request, batch, future))
            if self._work is None:
                self._work = asyncio.create_task(self._answer())
        return await asyncio.shield(known[1])

    async def healthy(self) -> bool:
        """Whether the model answers: it is at work and not late, or worked a moment ago, or works when it is asked now.

        Never waits behind requests: those who probe a server give it a second or two.
        """
        began, now = self._began, time.monotonic()
        if began is not None:
            return now - began < self._deadline
        if self._running or now - self._worked < _FRESH:
            return True  # the next request is being taken up
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._probe)

    def close(self) -> bool:
        """Take up no request any more; whether the model is idle. A forward that it is at cannot be stopped."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        while self._waiting:
            self._waiting.pop().reply.cancel()
        return self._began is None and self._work is None

    def _probe(self) -> bool:
        info = self._oracle.info
        points = np.zeros((1, info.layers, info.dim), dtype=np.float32)
        try:
            with self._timed():
                check_scores(self._oracle.score(_PROBE, points), _PROBE, 1, channels=info.channels)
        except Exception:  # whatever it is: the model does not answer
            self._metrics.failed.inc()
            return False
        self._worked = time.monotonic()
        return True

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Remembers since when the model is at work."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    async def _answer(self) -> None:
        """Answer what waits, until nothing does."""
        loop, turns = asyncio.get_running_loop(), list[Turn]()
        try:
            while self._waiting:
                turns = take(self._waiting, self._together)
                replies = await loop.run_in_executor(self._thread, self._compute, turns)
                for turn, reply in zip(turns, replies, strict=True):
                    if isinstance(reply, Exception):
                        turn.reply.set_exception(reply)
                    else:
                        turn.reply.set_result(reply)
        finally:
            self._work = None
            for turn in turns:
                turn.reply.cancel()  # nothing but for those that have no answer, when the server ends

    def _compute(self, turns: list[Turn]) -> Sequence[bytes | Exception]:
        """Answers, or why there is none. What fails together is asked for alone: a request must not spoil another."""
        if len(turns) > 1:
            try:
                return self._forward(turns)
            except Exception as error:
                self._part(turns, error)
        replies: list[bytes | Exception] = []
        for turn in turns:
            try:
                replies += self._forward([turn])
            except Exception as error:
                replies.append(error)
        return replies

    def _part(self, turns: list[Turn], error: Exception) -> None:
        """Count that what was asked together failed; the first time, say why."""
        if not self._parted:
            _log.warning(
                "a forward for %d requests together failed (%s: %s); each is asked for alone, which is slower. Said "
                "once; bbprompt_parted_total of /metrics counts such failures",
                len(turns),
                type(error).__name__,
                error,
            )
        self._parted = True
        self._metrics.parted.inc()

    def _forward(self, turns: list[Turn]) -> list[bytes]:
        first, began = turns[0], time.monotonic()
        points = np.concatenate([turn.request.points for turn in turns])
        batch, longest, support = first.batch, first.request.longest_answer, first.request.support
        with self._timed():
            scores = self._oracle.score(batch, points, support, longest)
        check_scores(scores, batch, len(points), channels=self._oracle.info.channels, answers=longest is not None)
        self._worked = time.monotonic()
        self._metrics.seconds.observe(self._worked - began)
        self._metrics.together.observe(len(turns))
        for turn in turns:
            self._metrics.candidates.observe(len(turn.request.points))
        self._metrics.calls.inc(len(points))
        self._metrics.texts.inc(len(points) * len(batch.forms))
        self._metrics.tokens_cut.inc(scores.cut)
        self._metrics.tokens.inc(len(points) * self._tokens(first))
        found = zip(turns, shares(scores, turns), strict=True)
        return [encode_reply(turn.request.call_id, own) for turn, own in found]

    def _tokens(self, turn: Turn) -> int:
        """Tokens of the texts of a request, counted once for all requests on them."""
        asked = (turn.request.batch, turn.request.support)
        if asked not in self._counted:
            if len(self._counted) >= _COUNTED:
                self._counted.clear()
            oracle = self._oracle
            self._counted[asked] = oracle.count_tokens(turn.batch, asked[1]) if can_count(oracle) else 0
        return self._counted[asked]

    def _done(self, call_id: str, print_: bytes, future: asyncio.Future[bytes]) -> None:
        """Keep a reply; a failure is not kept, so that it can be tried again."""
        self._metrics.waiting.dec()
        del self._running[call_id]
        if future.cancelled():
            return
        error = future.exception()  # also marks it as seen when nobody waits any more
        if error is not None:
            if not isinstance(error, DataError | OracleError):
                self._metrics.failed.inc()
            return
        body = future.result()
        if len(body) <= self._most:
            self._replies[call_id] = (print_, body)
            self._size += len(body)
        while self._size > self._most:
            self._size -= len(self._replies.popitem(last=False)[1][1])


def _fingerprint(request: ScoreRequest) -> bytes:
    """SHA-256 of all of a request but its id."""
    head = (request.batch, request.model, request.support, request.longest_answer)
    return hashlib.sha256(repr((head, request.points.shape)).encode() + request.points.tobytes()).digest()
