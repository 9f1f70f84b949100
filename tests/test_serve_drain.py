"""How a server ends: what is at hand is answered, what remains is told to come again, and the process ends with 0."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from serveclient import DIGEST, POINTS, TEXTS, TYPE, Counting, request
from servers import serving, start
from tiny_prompt import batch_of

from bbprompt import wire
from bbprompt.connect import open_oracle
from bbprompt.prompts import ModularPrompt

BATCH = batch_of("pair", 32)


def until(reached: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < ends
        time.sleep(0.005)


def at_work(url: str, requests: int = 1) -> bool:
    """Whether so many requests are at the model or wait for it."""
    return f"bbprompt_waiting {requests}.0" in httpx2.get(f"{url}/metrics", trust_env=False).text


def sent(url: str, body: bytes) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/score", content=body, headers=TYPE, timeout=120, trust_env=False)


@pytest.mark.parametrize("drain", [20.0, 0.2])
def test_what_is_at_hand_is_answered_and_what_remains_is_told_to_come_again(drain: float) -> None:
    oracle = Counting()
    with ThreadPoolExecutor(2) as threads:
        with serving(oracle, drain=drain) as url:
            httpx2.put(f"{url}/v1/batches/{DIGEST}", content=TEXTS, headers=TYPE, trust_env=False)
            oracle.gate.clear()
            works = [threads.submit(sent, url, request(POINTS + np.float32(n))) for n in range(2)]
            until(lambda: at_work(url, 2))  # one at the model, one that waits for it
            if drain > 1:
                threading.Timer(0.5, oracle.gate.set).start()
        answers = [work.result() for work in works]
        oracle.gate.set()
    if drain > 1:
        assert [answer.status_code for answer in answers] == [200, 200]
        return
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]) == (503, "stopping")
        assert answer.headers["retry-after"] == "10"
    assert oracle.calls == 1, "what waited is not computed for nobody"


@pytest.mark.slow
def test_a_server_that_is_told_to_end_answers_first(tiny_prompts: Path) -> None:
    process, url = start(tiny_prompts)
    try:
        prompt = ModularPrompt.load(tiny_prompts)
        points = np.random.default_rng(0).normal(size=(300, *prompt.space.shape)).astype(np.float32)
        oracle = open_oracle(url, prompt, threads=1)
        oracle.score(BATCH, points[:1])  # the texts are there
        with ThreadPoolExecutor(1) as threads:
            work = threads.submit(oracle.score, BATCH, points)
            until(lambda: at_work(url))
            process.terminate()
            until(lambda: refuses(url))
            assert not work.done(), "the request outlasts the signal"
            found = work.result()
        assert process.wait(30) == 0
        local = open_oracle("local", prompt, device="cpu", dtype="float32", threads=1)
        right = local.score(BATCH, points)
        assert np.array_equal(found.logits, right.logits)
        assert np.array_equal(found.normalizer, right.normalizer)
        oracle.close()
    finally:
        ended(process)


@pytest.mark.slow
def test_a_forward_that_outlasts_the_drain_does_not_keep_the_server(
    tiny_prompts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process, url = start(tiny_prompts, "--drain", "0.2")
    try:
        prompt, batch = ModularPrompt.load(tiny_prompts), batch_of("pair", 1000)
        httpx2.put(
            f"{url}/v1/batches/{batch.digest()}", content=wire.encode_batch(batch), headers=TYPE, trust_env=False
        )
        points = np.random.default_rng(0).normal(size=(1024, *prompt.space.shape))
        oracle = open_oracle(url, prompt, threads=1)
        info = replace(oracle.info, piece=0)  # as the server itself says
        body = wire.encode_request(wire.request_for(info, batch.digest(), points, "candidates", None))
        oracle.close()
        with ThreadPoolExecutor(1) as threads:
            work = threads.submit(sent, url, body)
            until(lambda: at_work(url))
            began = time.monotonic()
            process.terminate()
            answer = work.result()
            assert process.wait(30) == 0
            took = time.monotonic() - began
        assert (answer.status_code, answer.json()["error"]) == (503, "stopping")
        assert took < 10
        assert "the model is still at a request" in capfd.readouterr().err
    finally:
        ended(process)


def refuses(url: str) -> bool:
    """Whether nothing listens there any more."""
    try:
        httpx2.get(f"{url}/healthz", trust_env=False)
    except httpx2.TransportError:
        return True
    return False


def ended(process: Any) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
