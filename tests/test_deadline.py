"""The time limit of an exchange, over real sockets; and who stands between us and a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpcore2
import httpx2
import pytest
import rawserver

from bbprompt.backends.calls import Caller, Policy
from bbprompt.backends.deadline import ENDS, DeadlineTransport, proxy_for
from bbprompt.backends.http import HttpOracle
from bbprompt.errors import OracleError


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(2.0)
        assert not thread.is_alive(), f"{thread.name} goes on"


@pytest.mark.parametrize("trick", rawserver.TRICKS)
def test_whatever_a_socket_does_ends_in_time(trick: str) -> None:
    assert rawserver.exchange(trick, 3)["tricks"] == 1
    assert rawserver.exchange(trick, 3, 99)["tricks"]


@pytest.mark.parametrize("trick", [name for name, trick in rawserver.TRICKS.items() if trick.slow])
def test_first_contact_ends_in_time_too(trick: str) -> None:
    assert rawserver.exchange(trick, 1)["tricks"] == 1


def test_what_is_said_of_a_late_answer() -> None:
    server = rawserver.RawServer(lambda request: httpx2.Response(200), lambda number: "silence")
    with server.running() as url, pytest.raises(OracleError, match=r"no whole answer within 0\.4 s \(tries: 1\)"):
        HttpOracle(url, policy=Policy(attempts=1, deadline=0.4))


def test_an_exchange_that_is_over_asks_for_nothing() -> None:
    server = rawserver.RawServer(lambda request: httpx2.Response(200), lambda number: None)
    with server.running() as url, httpx2.Client(transport=DeadlineTransport(httpx2.Limits())) as client:
        late = {ENDS: time.monotonic() - 1}
        with pytest.raises(httpx2.ConnectTimeout, match="the whole exchange is over"):
            client.get(url, extensions=late)
    assert not server.exchanges


@pytest.mark.parametrize(
    ("url", "environment", "proxy"),
    [
        ("http://gpu.example", {"http_proxy": "http://proxy:3128"}, "http://proxy:3128"),
        ("http://gpu.example", {"http_proxy": "proxy:3128"}, "http://proxy:3128"),
        ("https://gpu.example", {"http_proxy": "http://proxy:3128"}, None),
        ("https://gpu.example", {"all_proxy": "socks5://proxy:1080"}, "socks5://proxy:1080"),
        ("http://gpu.example", {"http_proxy": "http://proxy:3128", "no_proxy": "gpu.example"}, None),
        ("http://127.0.0.1:8765", {"http_proxy": "http://proxy:3128"}, None),
        ("http://localhost:8765", {"http_proxy": "http://proxy:3128"}, None),
    ],
)
def test_proxies_of_the_environment(
    url: str, environment: dict[str, str], proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(httpx2.URL(url)) == proxy


@pytest.mark.parametrize("trick", ["silence", "silence in the body"])
def test_closing_ends_what_is_under_way(trick: str) -> None:
    server = rawserver.RawServer(lambda request: httpx2.Response(200, content=b"x" * 99), lambda number: trick)
    said: list[str] = []

    def ask() -> None:
        try:
            caller.call("GET", "/", lambda answer: None, most=100)
        except OracleError as error:
            said.append(str(error))

    with server.running() as url:
        caller = Caller(url, None, Policy(deadline=60.0), 1)
        thread = threading.Thread(target=ask)
        thread.start()
        while not server.exchanges:
            time.sleep(0.01)
        began = time.monotonic()
        caller.close()
        thread.join(20)
        assert time.monotonic() - began < 5
    assert said == [f"{url}: closed, while there was no answer yet"]


def test_closing_ends_a_pause() -> None:
    refused = httpx2.MockTransport(lambda request: httpx2.Response(503, headers={"retry-after": "50"}))
    caller = Caller("http://a", None, Policy(), 1, refused)
    ended: list[OracleError] = []

    def ask() -> None:
        try:
            caller.call("GET", "/", lambda answer: None, most=100)
        except OracleError as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    caller.close()
    thread.join(5)
    assert [str(error) for error in ended] == ["http://a: closed, while there was no answer yet"]


def test_nobody_waits_on_a_connection_that_is_opened_after_the_end() -> None:
    server = rawserver.RawServer(lambda request: httpx2.Response(200), lambda number: "silence")
    transport = DeadlineTransport(httpx2.Limits())
    with server.running() as url:
        transport.close()
        transport._exchange.ends = time.monotonic() + 60
        stream = transport._network.connect_tcp("127.0.0.1", httpx2.URL(url).port or 0)
        began = time.monotonic()
        assert stream.read(1) == b""
        assert time.monotonic() - began < 5
        stream.close()


def test_what_wakes_a_connection_is_a_shutdown_and_a_closed_one_needs_none() -> None:
    server = rawserver.RawServer(lambda request: httpx2.Response(200), lambda number: "silence")
    transport = DeadlineTransport(httpx2.Limits())
    with server.running() as url:
        transport._exchange.ends = time.monotonic() + 60
        stream = transport._network.connect_tcp("127.0.0.1", httpx2.URL(url).port or 0)
        stream.close()
        transport.close()
        with pytest.raises(httpcore2.ReadError):
            stream.read(1)
