"""`--together`: requests on the same texts in one forward; each gets its own answer, and what must stay apart does."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from serveclient import BATCH, POINTS, TEXTS, TYPE, Client, Counting, request
from test_serve_watched import counted
from tiny_prompt import batch_of

from bbprompt import wire
from bbprompt.connect import open_oracle
from bbprompt.oracle import Oracle, OracleInfo, Scores
from bbprompt.prompts import ModularPrompt
from bbprompt.serve.turns import Turn, take
from bbprompt.testing import ToyOracle

OTHER = batch_of("pair", 4)


class Sizes(Counting):
    """Notes how many candidates each forward has; fails at points that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.poison: float | None = None

    def score(self, batch: Any, points: Any, *more: Any) -> Scores:
        self.sizes.append(len(points))
        scores = super().score(batch, points, *more)
        if self.poison is not None and (points == self.poison).any():
            raise RuntimeError("these points break it")
        return scores


def answers(client: Client, oracle: Sizes, bodies: list[bytes]) -> list[httpx2.Response]:
    """Of requests that come while another one is at the model."""

    async def all_of_them() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=client.app)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as sender:
            for batch, body in ((BATCH, TEXTS), (OTHER, wire.encode_batch(OTHER))):
                await sender.put(f"/v1/batches/{batch.digest()}", content=body, headers=TYPE)
            oracle.gate.clear()
            works = [asyncio.create_task(sender.post("/v1/score", content=b, headers=TYPE)) for b in bodies[:1]]
            while not oracle.calls:
                await asyncio.sleep(0.005)
            works += [asyncio.create_task(sender.post("/v1/score", content=b, headers=TYPE)) for b in bodies[1:]]
            while f"bbprompt_waiting {len(bodies)}.0" not in (await sender.get("/metrics")).text:
                await asyncio.sleep(0.005)
            oracle.gate.set()
            return list(await asyncio.gather(*works))

    return asyncio.run(all_of_them())


def scores(answer: httpx2.Response) -> Scores:
    assert answer.status_code == 200, answer.text
    return wire.decode_reply(answer.content)[1]


@pytest.mark.parametrize("together", [False, True])
def test_what_waits_on_the_same_texts_is_one_forward(together: bool) -> None:
    oracle = Sizes()
    client = Client(oracle, together=together)
    asked = [POINTS + np.float32(n) for n in range(4)]
    other = POINTS + np.float32(9)
    bodies = [request(points) for points in asked]
    bodies.insert(2, request(other, batch=OTHER.digest(), call_id="0" * 64))
    found = answers(client, oracle, bodies)
    # The first was alone; the next takes along those on its texts, past one on others.
    assert oracle.sizes == ([5, 15, 5] if together else [5, 5, 5, 5, 5])
    alone = found.pop(2)
    for points, answer in zip(asked, found, strict=True):
        right = ToyOracle().score(BATCH, points)
        assert np.allclose(scores(answer).logits, right.logits, atol=1e-5)
        assert np.allclose(scores(answer).normalizer, right.normalizer, atol=1e-5)
    assert np.allclose(scores(alone).logits, ToyOracle().score(OTHER, other).logits, atol=1e-5)
    numbers = counted(client)
    assert numbers["bbprompt_calls_total"] == 25
    assert numbers["bbprompt_candidates_count"] == 5
    assert numbers["bbprompt_together_sum"] == 5
    assert numbers["bbprompt_together_count"] == len(oracle.sizes)
    again = [client.one("POST", "/v1/score", body) for body in bodies[:2]]
    assert [answer.content for answer in again] == [answer.content for answer in found[:2]], "kept for each of them"
    assert len(oracle.sizes) == numbers["bbprompt_together_count"]


def test_a_request_does_not_spoil_those_that_share_its_forward(caplog: pytest.LogCaptureFixture) -> None:
    oracle = Sizes()
    client = Client(oracle, together=True)
    oracle.poison = 77.0
    poisoned = POINTS.copy()
    poisoned[2, 1, 1] = 77.0
    asked = [POINTS + np.float32(n) for n in range(2)]
    found = answers(client, oracle, [request(POINTS - 1), request(asked[0]), request(poisoned), request(asked[1])])
    assert [answer.status_code for answer in found] == [200, 200, 500, 200]
    assert oracle.sizes == [5, 15, 5, 5, 5]
    assert np.array_equal(scores(found[1]).logits, ToyOracle().score(BATCH, asked[0]).logits)
    # Why is said the first time, and how often is counted.
    answers(client, oracle, [request(POINTS - 2), request(asked[0] + 5), request(poisoned + 0, call_id="1" * 64)])
    assert counted(client)["bbprompt_parted_total"] == 2
    (told,) = [message for message in caplog.messages if "together failed" in message]
    assert told.startswith("a forward for 3 requests together failed (RuntimeError: these points break it); each is")


def turn(points: np.ndarray, **changes: Any) -> Turn:
    sent = wire.decode_request(request(points.astype(np.float32), **changes), layers=3, dim=4, most=1024)
    return Turn(sent, BATCH, None)  # type: ignore[arg-type]


def layer(first: int, count: int = 4, below: float = 0.0) -> np.ndarray:
    """Candidates that are alike below a layer."""
    points = np.full((count, 3, 4), below)
    points[:, first:] = np.random.default_rng(first).normal(size=(count, 3 - first, 4))
    return points


TAKEN: dict[str, tuple[list[Turn], int, list[int]]] = {
    "not told to": ([turn(layer(0)), turn(layer(0))], 0, [0]),
    "up to the most": ([turn(layer(0)), turn(layer(0, 5)), turn(layer(0, 3)), turn(layer(0, 1))], 8, [0, 2, 3]),
    "exactly the most": ([turn(layer(0)), turn(layer(0, 4))], 8, [0, 1]),
    "another support": ([turn(layer(0)), turn(layer(0), support="sequence"), turn(layer(0))], 99, [0, 2]),
    "another longest answer": ([turn(layer(0)), turn(layer(0), longest_answer=3)], 99, [0]),
    "other texts": ([turn(layer(0)), turn(layer(0), batch="0" * 64)], 99, [0]),
    "the same lower layers": ([turn(layer(1)), turn(layer(1) + 0)], 99, [0, 1]),
    "a higher layer beside": ([turn(layer(1)), turn(layer(2))], 99, [0]),
    "other lower layers": ([turn(layer(1)), turn(layer(1, below=1.0))], 99, [0]),
    "single candidates": ([turn(layer(0, 1)), turn(layer(0, 1) + 1), turn(layer(1, 4))], 99, [0, 1]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_who_goes_together(case: str) -> None:
    turns, most, expected = TAKEN[case]
    waiting = deque(turns)
    taken = take(waiting, most)
    assert [turns.index(one) for one in taken] == expected
    assert list(waiting) == [one for one in turns if one not in taken], "the others keep their order"


class Gated(Sizes):
    """Another oracle behind the gate."""

    def __init__(self, inner: Oracle) -> None:
        super().__init__()
        self._inner = inner

    @property
    def info(self) -> OracleInfo:
        return self._inner.info

    def score(self, batch: Any, points: Any, *more: Any) -> Scores:
        self.sizes.append(len(points))
        self.calls += 1
        self.gate.wait(20)
        return self._inner.score(batch, points, *more)


def test_a_real_model_answers_together_what_it_answers_alone_up_to_rounding(tiny_prompts: Path) -> None:
    threads = torch.get_num_threads()
    prompt, rng = ModularPrompt.load(tiny_prompts), np.random.default_rng(0)
    inner = open_oracle("local", prompt, device="cpu", dtype="float32", threads=1)
    points = [rng.normal(size=(n, *prompt.space.shape)).astype(np.float32) for n in (2, 1, 8, 3)]
    digest = BATCH.digest()
    bodies = [wire.encode_request(wire.request_for(inner.info, digest, some, "candidates", None)) for some in points]
    oracle = Gated(inner)
    found = answers(Client(oracle, together=True), oracle, bodies)
    assert oracle.sizes == [2, 12]
    for some, answer in zip(points, found, strict=True):
        alone, reply = inner.score(BATCH, some), scores(answer)
        assert reply.logits.shape == alone.logits.shape
        assert float(np.abs(reply.logits - alone.logits).max()) < 1e-5
        assert float(np.abs(reply.normalizer - alone.normalizer).max()) < 1e-5
    inner.close()
    torch.set_num_threads(threads)
