"""What the HTTP oracle refuses before it asks for a score: servers, limits, addresses, tokens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import httpx2
import pytest
from clients import BATCH, EAGER, POINTS, close_all
from httpstage import Stage, connect
from servers import TOKEN

from bbprompt.errors import OracleError, UsageError
from bbprompt.testing import ToyOracle


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    close_all()


INFOS: dict[str, tuple[Any, str]] = {
    "newer": ({"protocol": 2}, "protocol 2"),
    "no model": ({"model": None}, "malformed"),
    "odd layers": ({"model": {**asdict(ToyOracle().info), "layers": 0}}, "malformed"),
    "float layers": ({"model": {**asdict(ToyOracle().info), "layers": 3.0}}, "malformed"),
    "odd name": ({"model": {**asdict(ToyOracle().info), "backbone": "a\nb"}}, "malformed"),
    "no limits": ({"limits": {}}, "malformed"),
}


@pytest.mark.parametrize("case", INFOS)
def test_a_server_that_is_none_of_ours(case: str) -> None:
    stage = Stage()
    change, said = INFOS[case]
    stage.info.update(change)
    with pytest.raises(OracleError, match=said):
        stage.oracle()


def test_limits_of_the_server_are_kept_before_anything_is_sent() -> None:
    stage = Stage()
    stage.info["limits"] = {"points": 9, "texts": 2, "body": 10**6}
    with pytest.raises(OracleError, match="3 texts"):
        stage.oracle().score(BATCH, POINTS)
    stage.info["limits"] = {"points": 9, "texts": 9, "body": 100}
    with pytest.raises(OracleError, match="--max-body"):
        stage.oracle().score(BATCH, POINTS)
    assert "/v1/score" not in stage.sent


@pytest.mark.parametrize(
    "url", ["ftp://a", "http://", "http://user:secret@a", "http://a/?token=secret", "http://a:99999999", "a b"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        connect(url)
    assert "secret" not in str(raised.value)


INJECTIONS = ("\r\nX: 1", "\n", "\r", "\0", "\t", " ", "\x0b", "\x7f", "\x85", "\xa0", "é", "是", "\u2028", "\ud800")


@pytest.mark.parametrize("odd", INJECTIONS)
def test_nothing_is_smuggled_into_a_header(odd: str) -> None:
    stage = Stage()
    for token in (odd, f"a{odd}b", f"{odd}b"):
        with pytest.raises(UsageError) as raised:
            connect("http://test", f"sec{token}ret", transport=httpx2.MockTransport(stage))
        assert "sec" not in str(raised.value)
    for url in (f"http://te{odd}st", f"http://test{odd}"):
        with contextlib.suppress(UsageError, OracleError):
            connect(url, transport=httpx2.MockTransport(stage))
    assert all(name.isascii() and name.isprintable() for name in stage.sent)
    assert all("X:" not in name for name in stage.sent)


def test_the_token_is_nowhere_to_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(lambda number, request: httpx2.Response(500, text=request.headers["authorization"][:6]))
    oracle = connect("http://test", TOKEN, policy=EAGER, transport=httpx2.MockTransport(stage))
    with pytest.raises(OracleError) as raised:
        oracle.score(BATCH, POINTS)
    assert TOKEN not in str(raised.value) + repr(oracle) + repr(vars(oracle)) + json.dumps(stage.info)


def test_nobody_there() -> None:
    with pytest.raises(OracleError, match="cannot be reached"):
        connect("http://127.0.0.1:1", policy=EAGER)
