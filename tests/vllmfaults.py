"""What a vLLM server that misbehaves answers, by what should become of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx2
from clients import failing
from vllmdouble import Double


def embeds(number: int, said: Callable[[httpx2.Request], Any]) -> Callable[[httpx2.Request], Any]:
    """Answers this one of the requests for texts with `said`; 0 is the first after the connection is made."""
    turns = itertools.count()

    def handle(request: httpx2.Request) -> Any:
        body = json.loads(request.read() or b"{}")
        return said(request) if isinstance(body.get("prompt_embeds"), list) and next(turns) == number + 1 else None

    return handle


def plain(*more: Any, **settings: Any) -> Callable[[httpx2.Request], httpx2.Response]:
    return lambda request: httpx2.Response(*more, **settings)


def changed(change: Callable[[Any], Any]) -> Callable[[Double], Callable[[httpx2.Request], httpx2.Response]]:
    """What the double answers, but for a change."""

    def of(double: Double) -> Callable[[httpx2.Request], httpx2.Response]:
        def answer(request: httpx2.Request) -> httpx2.Response:
            value = json.loads(double.http("POST", "/v1/completions", request.headers, request.read())[2])
            change(value)
            return httpx2.Response(200, content=json.dumps(value).encode())

        return answer

    return of


def number(value: Any) -> Callable[[Any], Any]:
    def change(reply: Any) -> None:
        table = reply["choices"][1]["logprobs"]["top_logprobs"][0]
        table.update(dict.fromkeys(table, value))

    return change


TRANSIENT: dict[str, Callable[[httpx2.Request], Any]] = {
    **{str(code): plain(code, text="no") for code in (408, 425, 429, 500, 502, 503, 504)},
    "refused": failing(httpx2.ConnectError),
    "reset": failing(httpx2.ReadError),
    "cut off": failing(httpx2.RemoteProtocolError),
    "late": failing(httpx2.ReadTimeout),
    "unresolved": failing(httpx2.ConnectTimeout),
}
MALFORMED: dict[str, Any] = {
    "empty": lambda double: plain(200),
    "html": lambda double: plain(200, html="<html>log in</html>"),
    "list": lambda double: plain(200, json=[]),
    "no usage": changed(lambda r: r.pop("usage")),
    "a text too few": changed(lambda r: r["choices"].pop()),
    "a text too many": changed(lambda r: r["choices"].append({**r["choices"][0], "index": len(r["choices"])})),
    "a text twice": changed(lambda r: r["choices"][0].update(index=r["choices"][1]["index"])),
    "other texts": changed(lambda r: r["usage"].update(prompt_tokens=r["usage"]["prompt_tokens"] + 1)),
    "no log-probabilities": changed(lambda r: r["choices"][0].update(logprobs=None)),
    "no token": changed(lambda r: r["choices"][0]["logprobs"].update(top_logprobs=[])),
    "a table twice": changed(lambda r: r["choices"][0]["logprobs"]["top_logprobs"].append({})),
    "no table": changed(lambda r: r["choices"][0]["logprobs"].update(top_logprobs=[None])),
    "a word missing": changed(lambda r: r["choices"][0]["logprobs"].update(top_logprobs=[{"token_id:5": -1.0}])),
    "nan": changed(number(float("nan"))),
    "infinity": changed(number(float("-inf"))),
    "nothing": changed(number(-9999.0)),
    "a probability above 1": changed(number(0.5)),
    "text": changed(number("-1.0")),
    "true": changed(number(False)),
}
FINAL: dict[str, tuple[Callable[[httpx2.Request], Any], str]] = {
    "400": (plain(400, json={"error": {"message": "too long\x1b[31m"}}), r"refused \(status 400\): too long"),
    "401": (plain(401, json={"error": "Unauthorized"}), "BBPROMPT_TOKEN"),
    "403": (plain(403), "BBPROMPT_TOKEN"),
    "404": (plain(404, json={"error": {"message": "The model `tiny` does not exist."}}), "status 404.*does not exist"),
    "413": (plain(413, text="large"), "status 413"),
    "301": (plain(301, headers={"location": "http://elsewhere/"}), "redirect"),
    "gzip": (plain(200, headers={"content-encoding": "br"}, content=b"x"), "compressed"),
    "endless": (plain(200, content=b" " * 10**6), "longer than"),
}
