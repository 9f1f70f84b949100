"""What supervisors ask a server: whether it is well, and what it counted."""

from __future__ import annotations

import asyncio
import time

import httpx2
import pytest
from serveclient import AUTH, BATCH, DIGEST, POINTS, TEXTS, TYPE, Client, Counting, request
from servers import TOKEN

from bbprompt.testing import ToyOracle


@pytest.mark.parametrize(("deadline", "status"), [(30.0, 200), (0.3, 503)])
def test_a_busy_server_is_healthy_until_its_model_is_late(deadline: float, status: int) -> None:
    oracle = Counting()
    client = Client(oracle, at_once=1, deadline=deadline, token=TOKEN)

    async def probed() -> tuple[list[int], float]:
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=client.app),  # type: ignore[arg-type]
            base_url="http://test",
            headers=AUTH,
        ) as sender:
            await sender.put(f"/v1/batches/{DIGEST}", content=TEXTS, headers=TYPE)
            oracle.gate.clear()
            working = asyncio.create_task(sender.post("/v1/score", content=request(), headers=TYPE))
            while not oracle.calls:
                await asyncio.sleep(0.01)
            if status == 503:
                assert (await working).status_code == 503
                async with asyncio.timeout(10):  # the model was given its work a moment after the server
                    while (await sender.get("/healthz")).status_code == 200:
                        await asyncio.sleep(0.01)
            else:
                assert (await sender.get("/v1/info")).status_code == 503, "the one place is taken"
            began = time.monotonic()
            found = [(await sender.get(path)).status_code for path in ("/healthz", "/metrics")]
            found.append((await sender.get("/healthz", headers={"authorization": "no"})).status_code)
            took = time.monotonic() - began
            oracle.gate.set()
            await working
            return found, took

    found, took = asyncio.run(probed())
    assert found == [status, 200, 401]
    assert took < 1
    assert oracle.calls == 1, "no forward waits behind the one that runs"


def counted(client: Client) -> dict[str, float]:
    """What `/metrics` says, by name and labels."""
    lines = client.one("GET", "/metrics", headers=AUTH).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_tokens_are_counted_for_each_candidate_that_was_computed() -> None:
    client = Client(Counting())
    client.keep()
    assert counted(client)["bbprompt_tokens_total"] == 0
    for _ in range(2):
        assert client.one("POST", "/v1/score", request()).status_code == 200
    assert counted(client)["bbprompt_tokens_total"] == len(POINTS) * ToyOracle().count_tokens(BATCH) > 0


def test_requests_are_timed_by_route() -> None:
    client = Client(Counting(), token=TOKEN)
    began = time.monotonic()
    sent = [("PUT", f"/v1/batches/{DIGEST}", TEXTS), ("POST", "/v1/score", request()), ("POST", "/v1/score", b"?")]
    sent += [("GET", "/healthz", None), ("DELETE", "/healthz", None), ("GET", "/elsewhere", None)]
    for method, path, body in sent:
        client.one(method, path, body, TYPE | AUTH)
    client.one("GET", "/v1/info")  # without the token
    took, found = time.monotonic() - began, counted(client)
    times = {"/v1/batches/{digest}": 1, "/v1/score": 2, "/healthz": 2, "none": 2}
    pattern = 'bbprompt_request_seconds_{}{{route="{}"}}'
    assert {route: found[pattern.format("count", route)] for route in times} == times
    assert 0 < sum(found[pattern.format("sum", route)] for route in times) < took
    assert counted(client)[pattern.format("count", "/metrics")] == 1
    assert "elsewhere" not in client.one("GET", "/metrics", headers=AUTH).text, "no label is a client's to make up"


def test_every_answer_of_400_or_more_is_counted() -> None:
    oracle = Counting()
    client = Client(oracle, token=TOKEN, body=5000)
    client.keep(AUTH)
    oracle.error = RuntimeError("broken")
    sent = [("POST", "/v1/score", request()), ("POST", "/v1/score", b"?"), ("GET", "/nowhere", None)]
    sent += [("POST", "/v1/score", request(model="0" * 64)), ("POST", "/v1/score", bytes(5001))]
    sent += [("GET", "/healthz", None), ("DELETE", "/healthz", None), ("GET", "/v1/info", None)]
    statuses = [client.one(method, path, body, TYPE | AUTH).status_code for method, path, body in sent]
    statuses.append(client.one("GET", "/v1/info").status_code)
    assert statuses == [500, 400, 404, 409, 413, 503, 405, 200, 401]
    found = {name: value for name, value in counted(client).items() if name.startswith("bbprompt_refused_total")}
    assert found == {f'bbprompt_refused_total{{status="{status}"}}': 1 for status in statuses if status != 200}
