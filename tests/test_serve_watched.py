"""What supervisors ask a server: whether it is well, and what it counted."""

from __future__ import annotations

import asyncio
import time

import httpx2
import pytest
from serveclient import AUTH, DIGEST, TEXTS, TYPE, Client, Counting, request
from servers import TOKEN


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
