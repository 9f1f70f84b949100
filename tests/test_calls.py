"""How often and after what pauses a request is made again."""

from __future__ import annotations

import math
from collections.abc import Iterator

import httpx2
import pytest
from httpfaults import Clock

from bbprompt.backends.calls import Answer, Caller, Policy, Retries, Transient
from bbprompt.errors import OracleError
from bbprompt.wire import WireError


def failing(retries: Retries, after: float | None = None) -> int:
    """Make a request that never succeeds; how often it was sent."""
    sent = 0

    def send() -> None:
        nonlocal sent
        sent += 1
        raise Transient("down", after)

    with pytest.raises(OracleError, match=r"tries: \d.*bbprompt resume"):
        retries.run(send, lambda answer: answer)
    return sent


def test_pauses_have_full_jitter_under_a_bound_that_doubles() -> None:
    pauses: list[float] = []
    for _ in range(1000):
        assert failing(Retries("http://a", Policy(attempts=8, sleep=pauses.append, quota=10))) == 8
    for turn in range(7):
        own, most = sorted(pauses[turn::7]), min(0.5 * 2**turn, 20.0)
        assert 0.0 <= own[0] <= own[-1] <= most
        # Kolmogorov and Smirnov: further from the uniform distribution than this once in a million.
        distance = max(abs(value / most - (number + 0.5) / 1000) for number, value in enumerate(own))
        assert distance < 2.7 / math.sqrt(1000)


@pytest.mark.parametrize(("asked", "waited"), [(0.0, 0.0), (7.0, 7.0), (60.0, 60.0), (86_400.0, 60.0)])
def test_what_the_server_asks_for_is_obeyed_up_to_a_bound(asked: float, waited: float) -> None:
    pauses: list[float] = []
    failing(Retries("http://a", Policy(sleep=pauses.append)), asked)
    assert pauses == [waited] * 3


def test_all_tries_together_end_in_time() -> None:
    clock = Clock()
    policy = Policy(total=100.0, attempts=99, sleep=clock.sleep, clock=clock)
    assert failing(Retries("http://a", policy), after=30.0) == 4
    assert clock.now == 90.0


def test_requests_share_a_quota() -> None:
    retries = Retries("http://a", Policy(quota=10, sleep=lambda seconds: None))
    assert [failing(retries) for _ in range(6)] == [4, 4, 4, 2, 1, 1], "ten repetitions, and no more"
    for _ in range(2):
        assert retries.run(lambda: "x", lambda answer: answer) == "x"
    assert [failing(retries) for _ in range(2)] == [3, 1], "each answer gives one back"
    for _ in range(100):
        retries.run(lambda: "x", lambda answer: answer)
    assert sum(failing(retries) - 1 for _ in range(20)) == 10, "and never more than there were"


def test_a_malformed_answer_is_no_answer() -> None:
    def read(answer: str) -> str:
        raise WireError("torn")

    retries = Retries("http://a", Policy(quota=2, sleep=lambda seconds: None))
    sent: list[int] = []
    for _ in range(3):
        with pytest.raises(OracleError, match="malformed: torn"):
            retries.run(lambda: sent.append(1) or "x", read)
    assert len(sent) == 5, "two each, until the quota is used up"


@pytest.mark.parametrize(
    ("answer", "sent"),
    [
        *((httpx2.Response(status), 4) for status in (408, 425, 429, 503)),
        *((httpx2.Response(status), 1) for status in (500, 502, 504)),
        *((error("gone"), 4) for error in (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)),
        *((error("gone"), 1) for error in (httpx2.ReadError, httpx2.WriteError, httpx2.ReadTimeout)),
    ],
    ids=repr,
)
def test_what_may_have_been_charged_is_not_sent_again(answer: httpx2.Response | Exception, sent: int) -> None:
    for resend, times in ((False, sent), (True, 4)):
        asked: list[httpx2.Request] = []

        def respond(request: httpx2.Request, asked: list[httpx2.Request] = asked) -> httpx2.Response:
            asked.append(request)
            if isinstance(answer, Exception):
                raise answer
            return httpx2.Response(answer.status_code)

        policy = Policy(resend=resend, sleep=lambda seconds: None)
        caller = Caller("http://a", None, policy, 1, httpx2.MockTransport(respond))
        with pytest.raises(OracleError, match=rf"\(tries: {times}\)"):
            caller.call("POST", "/", lambda reply: reply, most=100)
        assert len(asked) == times


def test_a_malformed_answer_was_charged() -> None:
    caller = Caller(
        "http://a", None, Policy(resend=False), 1, httpx2.MockTransport(lambda request: httpx2.Response(200))
    )

    def read(answer: Answer) -> None:
        raise WireError("torn")

    with pytest.raises(OracleError, match=r"malformed: torn \(tries: 1\)"):
        caller.call("POST", "/", read, most=100)


def test_an_answer_that_takes_too_long_is_cut_off() -> None:
    clock = Clock()

    def slow() -> Iterator[bytes]:
        for _ in range(10):
            clock.sleep(1.0)
            yield b"x"

    policy = Policy(attempts=1, deadline=5.5, sleep=clock.sleep, clock=clock)
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=slow()))
    with pytest.raises(OracleError, match=r"no whole answer within 5\.5 s"):
        Caller("http://a", None, policy, 1, transport).call("GET", "/", lambda reply: reply, most=100)
    assert clock.now == 6.0, "nothing is read behind the deadline"


@pytest.mark.parametrize(
    "error",
    [
        httpx2.UnsupportedProtocol("x"),
        httpx2.LocalProtocolError("x"),
        httpx2.DecodingError("x"),
        httpx2.InvalidURL("x"),
    ],
    ids=repr,
)
def test_what_is_wrong_on_this_side_is_not_tried_again(error: Exception) -> None:
    asked = []

    def fail(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        raise error

    with pytest.raises(OracleError, match="http://a: x; correct --backend"):
        Caller("http://a", None, Policy(), 1, httpx2.MockTransport(fail)).call("GET", "/", lambda reply: reply, most=9)
    assert len(asked) == 1
